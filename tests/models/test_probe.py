"""Laws of the probe: what cannot be pruned or measured is found by a few forward passes, and nothing else is."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from nmbench.errors import NMBenchError
from nmbench.models.bundle import Bundle
from nmbench.models.causality import cuts_of, with_other_tail
from nmbench.models.probe import check_length, examined
from nmbench_plugins.tiny import COMMON, FAMILIES, LLAMA, TinyModel

TEXT = torch.tensor(list(b"It was the best of times, it was the worst of times"))
WIDTH, WORDS = 32, 256


class Block(nn.Module):
    """x + mix(x) + mlp(x): `mix` adds the mean of the tokens up to `ahead` places on; none: of all tokens."""

    def __init__(self, ahead: int | None = 0) -> None:
        super().__init__()
        self.ahead = ahead
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        seen = torch.ones(len(places), len(places))
        if self.ahead is not None:
            seen = (places[None, :] <= places[:, None] + self.ahead).float()
        seen = (seen / seen.sum(1, keepdim=True)).to(x.dtype)
        return x + self.mix(seen @ x) + self.mlp(x).relu()


class Reading(Block):
    """A block that reads the weight of its layer without calling the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(x, self.mix.weight) + self.mlp(x)


class Model(nn.Module):
    """A model of `blocks`; `beside` is a stack that text does not run through."""

    def __init__(self, *blocks: nn.Module, beside: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.pictures = nn.ModuleList(beside)
        self.text = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        for block in self.text:
            x = block(x)
        return SimpleNamespace(logits=self.head(x))


def bundle_of(*blocks: nn.Module, beside: tuple[nn.Module, ...] = ()) -> Bundle:
    torch.manual_seed(0)
    return Bundle.of("toy", Model(*blocks, beside=beside), None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_causal_models_pass(family, dtype):
    """Every layer of every family stays, mixtures of experts in 16 bits as well."""
    bundle = TinyModel(dtype=dtype).load(family)
    assert examined(bundle, TEXT).layers == bundle.layers


# Tokens that see later ones


@pytest.mark.parametrize("ahead", [1, 3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_see_the_future(ahead, dtype):
    """A token that sees one later token is enough, in one of two blocks."""
    bundle = bundle_of(Block(), Block(ahead))
    bundle.model.to(dtype)
    with pytest.raises(NMBenchError, match="toy is no causal language model: its logits at a token change with later"):
        examined(bundle, TEXT)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", ["BertConfig", "RobertaConfig"])
def test_masked_language_models(config):
    """Masked language models are refused, also where transformers loads them as causal ones."""
    sizes = {key: LLAMA[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    made = getattr(transformers, config)(**COMMON, **sizes, num_attention_heads=4)
    model = transformers.AutoModelForCausalLM.from_config(made)
    with pytest.raises(NMBenchError, match="no causal language model"):
        examined(Bundle.of("it", model, None), TEXT)
    made.is_decoder = True
    examined(Bundle.of("it", transformers.AutoModelForCausalLM.from_config(made), None), TEXT)


class Crowded(Block):
    """A causal block whose tokens share a capacity: their scale depends on all rows of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-3 * x.abs().mean())


def test_effects_of_other_rows_are_no_future():
    """Tokens that change with the other rows of their batch, as by the capacity of experts, do not see the future."""
    bundle = bundle_of(Crowded(), Crowded())
    assert examined(bundle, TEXT).layers == bundle.layers


@pytest.mark.parametrize("length", range(1, 30))
def test_tails(length):
    """Every row has a tail behind its first token; each token of the tail is changed, and none before it."""
    for cut in cuts_of(length):
        for row in (torch.arange(length) % 3, torch.zeros(length, dtype=torch.long)):
            assert length == 1 or 1 <= cut < length
            differs = with_other_tail(row, cut) != row
            assert differs.tolist() == [index >= cut for index in range(length)]


# Blocks and layers that are not reached


def test_the_wrong_stack():
    """A stack that text does not run through is refused, with the name of the one that it does run through."""
    large = tuple(Block() for _ in range(3))
    bundle = bundle_of(Block(), Block(), beside=large)
    assert list(bundle.blocks) == ["pictures.0", "pictures.1", "pictures.2"]
    with pytest.raises(NMBenchError, match=r"no token reaches block pictures\.0 of toy \(3 of its 3 .* through text\."):
        examined(bundle, TEXT)


@pytest.mark.filterwarnings("ignore")
def test_the_text_decoder_of_transformers():
    """Of a model with a larger stack for images, the decoder that transformers names is pruned."""
    text = {**COMMON, **LLAMA}
    images = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 4}
    images |= {"image_size": 32, "patch_size": 16}
    config = transformers.Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4)
    bundle = Bundle.of("it", transformers.Gemma3ForConditionalGeneration(config), None)
    assert all("language_model" in name for name in bundle.blocks)
    assert examined(bundle, TEXT).layers == bundle.layers


def test_a_layer_that_is_never_called():
    """A layer whose weight is read stays dense with the reason; the others stay."""
    found = examined(bundle_of(Block(), Reading()), TEXT)
    assert set(found.layers) == {"text.0.mix", "text.0.mlp", "text.1.mlp"}
    assert found.skipped["text.1.mix"] == "never called in a forward pass, its inputs cannot be observed"
    assert found.left_dense() == {found.skipped["text.1.mix"]: WIDTH * WIDTH}


def test_a_model_that_calls_no_layer():
    """If no layer is called, nothing can be pruned."""
    bundle = bundle_of(Reading()).without(["mlp"])
    with pytest.raises(NMBenchError, match=r"reads the weights of its layers .* first text\.0\.mix"):
        examined(bundle, TEXT)


class Mixture(Block):
    """A block of which one of four experts is called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.experts[2](x)


def test_experts_without_tokens():
    """An expert that no token of the probe was routed to may be reached by others, and stays."""
    bundle = bundle_of(Mixture(), Mixture())
    assert examined(bundle, TEXT).layers == bundle.layers


def test_a_model_that_fails():
    """What the code of a model raises is one line with the model's name."""
    bundle = bundle_of(Block())
    with pytest.raises(NMBenchError, match="toy fails on 24 tokens of text: IndexError: "):
        examined(bundle, TEXT + WORDS)


class Plain(Model):
    """A model that returns a tuple, and takes no `use_cache`."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (super().forward(input_ids).logits,)


def test_models_that_return_tuples():
    """The first of a tuple is the logits."""
    bundle = Bundle.of("toy", Plain(Block()), None)
    assert examined(bundle, TEXT).layers == bundle.layers


class Prefix(Block):
    """A block whose first eight tokens see each other; the others see what is before them."""

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.ones(x.shape[1], x.shape[1]).tril()
        seen[:8, :8] = 1
        return x + self.mix((seen / seen.sum(1, keepdim=True)) @ x) + self.mlp(x).relu()


def test_a_prefix_that_sees_itself():
    """A model that sees later tokens in its first few alone is refused as well."""
    with pytest.raises(NMBenchError, match="is no causal language model"):
        examined(bundle_of(Prefix(), Prefix()), TEXT)


class Both(Model):
    """A model whose text runs through both stacks."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        for block in (*self.text, *self.pictures):
            x = block(x)
        return SimpleNamespace(logits=self.head(x))


def test_two_stacks():
    """Two stacks that run one after the other are refused: one of them would stay dense."""
    bundle = Bundle.of("toy", Both(Block(), Block(), Block(), beside=(Block(), Block())), None)
    with pytest.raises(NMBenchError, match=r"text runs through pictures of toy as well \(2 blocks, 4096 weights\)"):
        examined(bundle, TEXT)
    one = bundle_of(Block(), Block(), Block(), beside=(Block(), Block()))
    assert len(examined(one, TEXT).layers) == 6


class Noisy(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.2, training=True))


def test_other_logits_each_time():
    """Dropout that is never off is refused before anything is measured."""
    with pytest.raises(NMBenchError, match="computes other logits each time"):
        examined(bundle_of(Noisy(), Noisy()), TEXT)


class Last(Model):
    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=super().forward(input_ids).logits[:, -1:])


def test_logits_of_the_last_token_alone():
    """Logits that are not one row for each token are refused with their shape."""
    with pytest.raises(NMBenchError, match=r"logits of shape \(3, 1, 256\) for 3 rows of 24 tokens"):
        examined(Bundle.of("toy", Last(Block(), Block()), None), TEXT)


class Placed(Model):
    """A model of 30 positions in a parameter that nothing names."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.places = nn.Parameter(torch.randn(30, WIDTH))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        self.places[torch.arange(input_ids.shape[1])]
        return super().forward(input_ids)


def test_a_context_that_nothing_names():
    """A window beyond a limit that is found nowhere is one line, before anything is pruned."""
    bundle = examined(Bundle.of("toy", Placed(Block()), None), TEXT)
    check_length(bundle, TEXT[:30])
    with pytest.raises(NMBenchError, match=r"fails on 31 tokens of text: IndexError.*choose shorter windows"):
        check_length(bundle, TEXT[:31])


def test_a_weight_that_is_computed():
    """A layer whose weight is computed from other parameters stays dense, with the reason; others are pruned."""
    block = Block()
    block.mix = nn.utils.parametrizations.weight_norm(block.mix)
    bundle = examined(bundle_of(block), TEXT)
    assert list(bundle.layers) == ["text.0.mlp"]
    assert bundle.left_dense()
