"""Laws of the bundle: blocks and prunable layers are found, named, read and restored whatever the architecture."""

import hashlib

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.models.bundle import Bundle
from nmbench.models.coverage import weights_by_kind
from nmbench.models.dense_weights import DenseWeights
from nmbench.models.hashing import THREADED_BYTES, tensors_digest
from nmbench.models.sanity import check_finite
from nmbench_plugins.tiny import FAMILIES, TinyModel

WEIGHTS_PER_BLOCK = {"phi3": 4, "gptneox": 4, "gpt2": 4, "opt": 6, "mixtral": 4 + 2 * 4, "qwen3moe": 4 + 2 * 8}
SEVEN = 7  # in the others
families = pytest.mark.parametrize("family", sorted(FAMILIES))


class ToyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)
        self.experts = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.fused = nn.Parameter(torch.randn(3, width, width))


class Toy(nn.Module):
    """Two decoder blocks, each with a list of its own inside, and a smaller stack beside them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.front = nn.ModuleList([nn.Linear(width, width)])
        self.stack = nn.ModuleList([ToyBlock(width), ToyBlock(width)])


def load(family: str = "llama") -> Bundle:
    return TinyModel().load(family)


def state(bundle: Bundle) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What is found


@families
def test_blocks_and_layers(family):
    """Both decoder blocks are found, with every linear layer and expert in them, and each layer knows its block."""
    bundle = load(family)
    assert len(bundle.blocks) == 2
    assert len(bundle.layers) == 2 * WEIGHTS_PER_BLOCK.get(family, SEVEN)
    for index, block in enumerate(bundle.blocks):
        names = [layer.name for layer in bundle.block_layers(index)]
        assert names == [name for name in bundle.layers if name.startswith(f"{block}.")] != []


@families
def test_every_matrix_is_pruned_or_skipped_with_a_reason(family):
    """Every matrix of a model is either a prunable layer or skipped with a reason, never both, never neither."""
    bundle = load(family)
    matrices = {n for n, p in bundle.model.named_parameters(remove_duplicate=False) if p.dim() >= 2}
    layers = {layer.where.stored for layer in bundle.layers.values()}
    assert layers | set(bundle.skipped) == matrices
    assert not layers & set(bundle.skipped)
    for name, reason in bundle.skipped.items():
        assert reason.startswith("not a linear layer" if name.endswith("mlp.gate.weight") else "outside the decoder")


@families
def test_loading_freezes_the_model(family):
    """A bundle's model is in evaluation mode and none of its parameters asks for a gradient."""
    model = load(family).model
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@families
def test_coverage(family):
    """Coverage counts the weights of the layers and their share of all parameters inside the blocks."""
    bundle = load(family)
    sizes = {n: p.numel() for n, p in bundle.model.named_parameters()}
    inside = sum(size for n, size in sizes.items() if n.startswith(tuple(f"{block}." for block in bundle.blocks)))
    weights = sum(sizes[name] for name in {layer.where.stored for layer in bundle.layers.values()})
    assert bundle.coverage() == {
        "layers": len(bundle.layers),
        "weights": weights,
        "share_of_decoder": pytest.approx(weights / inside),
        "kinds": bundle.coverage()["kinds"],
    }
    assert sum(bundle.coverage()["kinds"].values()) == weights
    assert 0.9 < weights / inside < 1


def test_nested_lists_and_fused_experts():
    """The outermost list with the most linear weights is the decoder; fused 3-D weights are reported, not missed."""
    bundle = Bundle.of("toy", Toy(), None)
    assert list(bundle.blocks) == ["stack.0", "stack.1"]
    assert [layer.name for layer in bundle.block_layers(1)] == [
        "stack.1.proj",
        "stack.1.experts.0",
        "stack.1.experts.1",
    ]
    assert bundle.skipped["stack.0.fused"] == "not a linear layer but ToyBlock (3, 8, 8)"
    assert bundle.skipped["front.0.weight"] == "outside the decoder blocks (8, 8)"
    assert bundle.coverage()["share_of_decoder"] == pytest.approx(3 * 64 / (3 * 64 + 2 * 8 + 3 * 64))


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(4, 4)), nn.ModuleList([nn.LayerNorm(4)])])
def test_model_without_decoder_is_refused(model):
    """A model without a list of blocks that hold linear layers is refused by name."""
    with pytest.raises(NMBenchError, match="model odd has no stack of decoder blocks"):
        Bundle.of("odd", model, None)


# Reading and writing


def test_conv1d_is_read_and_written_transposed():
    """GPT-2 stores `[in, out]`; layers are read and written as `[out, in]`, and hold the same numbers."""
    layer = load("gpt2").layers["transformer.h.0.mlp.c_fc"]
    stored = layer.module.weight
    assert layer.transposed
    assert layer.shape == (96, 64)
    assert tuple(stored.shape) == (64, 96)
    new = torch.arange(96 * 64.0).view(96, 64)
    layer.write(new)
    assert torch.equal(stored, new.t())
    assert torch.equal(layer.read(), new)


@families
def test_layer_computes_with_its_canonical_weight(family):
    """Every layer maps x to x W^T + b, with W as it is read."""
    for layer in (layer for layer in load(family).layers.values() if not layer.fused):
        x = torch.randn(3, layer.shape[1], generator=torch.Generator().manual_seed(0))
        bias = getattr(layer.module, "bias", None)
        expected = x @ layer.read().t() + (0 if bias is None else bias)
        torch.testing.assert_close(layer.module(x), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_written_weights_are_live(family):
    """Zeroing every layer through `write` changes the logits of the model."""
    bundle, tokens = load(family), torch.arange(12)[None]
    before = bundle.model(input_ids=tokens).logits
    for layer in bundle.layers.values():
        layer.write(torch.zeros(layer.shape))
    assert not torch.allclose(bundle.model(input_ids=tokens).logits, before)


def test_broken_weights_are_named():
    """A NaN or infinite weight is refused with the name of its layer; a sound model is not."""
    bundle = load()
    check_finite(bundle)
    for value in (torch.nan, torch.inf):
        bundle.layers["model.layers.1.mlp.up_proj"].read()[3, 5] = value
        with pytest.raises(NumericalFailure, match=r"layer model\.layers\.1\.mlp\.up_proj of tiny:llama"):
            check_finite(bundle)


# Leaving layers dense


def test_without_moves_layers_to_skipped():
    """`without` leaves out exactly the layers whose name, or its end, matches a glob, and says which glob it was."""
    bundle = load()
    smaller = bundle.without(["q_proj", "mlp.*", "model.layers.1.self_attn.k_proj"])
    left = {name for name in bundle.layers if not name.endswith("q_proj") and ".mlp." not in name}
    assert set(smaller.layers) == left - {"model.layers.1.self_attn.k_proj"}
    assert smaller.skipped["model.layers.0.mlp.up_proj"] == "left dense by --skip mlp.*"
    assert set(smaller.layers) | set(smaller.skipped) == set(bundle.layers) | set(bundle.skipped)
    assert smaller.coverage()["share_of_decoder"] < bundle.coverage()["share_of_decoder"]
    assert "model.layers.0.mlp.up_proj" in bundle.layers


def test_overlapping_globs():
    """A second glob may match layers that a first one has left out already."""
    bundle = load()
    assert set(bundle.without(["mlp.*", "up_proj"]).layers) == {n for n in bundle.layers if ".mlp." not in n}


def test_glob_that_matches_nothing_is_refused():
    """A glob without a match is an error that shows an example of a layer name."""
    with pytest.raises(NMBenchError, match=r"--skip 'w1' matches no prunable layer.*'model\.layers\.0"):
        load().without(["w1"])


def test_nothing_left_is_refused():
    """Leaving every layer dense is an error."""
    with pytest.raises(NMBenchError, match="leaves no layer of tiny:llama to prune"):
        load().without(["*"])


# Dense weights again


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_restore(family):
    """After any change of parameters, inside and outside the layers, `restore` brings back every bit."""
    bundle = load(family)
    dense, before = DenseWeights(bundle), state(bundle)
    for parameter in bundle.model.parameters():
        parameter.copy_(torch.full_like(parameter, torch.nan))
    assert bundle.digest() != dense.digest
    dense.restore()
    assert same(state(bundle), before)
    assert bundle.digest() == dense.digest


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dense_copies_are_not_live(family):
    """The dense copy of a layer is what was read at first, and stays so when the live layer changes."""
    bundle = load(family)
    dense = DenseWeights(bundle)
    for layer in bundle.layers.values():
        before = layer.read().clone()
        layer.write(before + 1)
        assert torch.equal(dense.layer(layer), before)


def test_failed_restore_is_noticed():
    """Restoring is verified by hash: dense copies that were tampered with are never taken for the dense weights."""
    bundle = load()
    dense = DenseWeights(bundle)
    dense.copies["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    with pytest.raises(AssertionError, match="could not be restored"):
        dense.restore()


def test_a_digest_is_that_of_its_parts():
    """A tensor is hashed in parts, by threads if there is much to hash: every byte counts, and where."""
    values = torch.arange(40, dtype=torch.float32)
    rolled = [{"a": values.roll(shift), "b": torch.zeros(0), "c": values[0]} for shift in range(40)]
    digests = {tensors_digest(tensors, part_bytes=16) for tensors in rolled}
    assert len(digests) == 40
    total = hashlib.sha256(b"a torch.float32 (5,);")
    for part in (values[:4], values[4:5]):
        total.update(hashlib.sha256(part.numpy().tobytes()).digest())
    assert tensors_digest({"a": values[:5]}, part_bytes=16) == total.hexdigest()
    large = torch.arange(THREADED_BYTES, dtype=torch.uint8)
    total = hashlib.sha256(f"a torch.uint8 ({THREADED_BYTES},);".encode())
    for part in large.split(THREADED_BYTES // 8):
        total.update(hashlib.sha256(part.numpy().tobytes()).digest())
    assert tensors_digest({"a": large}, part_bytes=THREADED_BYTES // 8) == total.hexdigest()


def test_digest_sees_everything():
    """The digest changes with one bit of one weight, with the sign of a zero, and with the dtype."""
    bundle = load()
    weight = bundle.layers["model.layers.0.mlp.up_proj"].read()
    weight[0, 0] = 0.0
    zero = bundle.digest()
    weight[0, 0] = -0.0
    negative = bundle.digest()
    bundle.model.double()
    assert len({zero, negative, bundle.digest()}) == 3
    assert load().digest() == load().digest()


# Another dtype


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_dtype_is_a_copy(family):
    """A bundle in another dtype has its own model, blocks and layers; the first one stays as it was."""
    bundle = load(family)
    before, double = state(bundle), bundle.in_dtype(torch.float64)
    assert double.dtype == torch.float64
    assert list(double.layers) == list(bundle.layers)
    for name, layer in double.layers.items():
        assert layer.module is double.model.get_submodule(layer.where.module)
        assert torch.equal(layer.read(), bundle.layers[name].read().double())
        layer.write(torch.zeros(layer.shape))
    assert all(block is double.model.get_submodule(name) for name, block in double.blocks.items())
    assert bundle.dtype == torch.float32
    assert same(state(bundle), before)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_in_dtype_is_the_model_loaded_in_that_dtype(family, tmp_path):
    """Changing the dtype afterwards gives the logits of a model that transformers loads in that dtype, bit for bit."""
    bundle = load(family)
    bundle.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    tokens = torch.arange(200).view(2, 100)
    with torch.no_grad():
        ours, theirs = (model(input_ids=tokens).logits for model in (bundle.in_dtype(torch.bfloat16).model, loaded))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


def test_in_its_own_dtype_is_itself():
    """A bundle in the dtype it has already is not copied."""
    bundle = load()
    assert bundle.in_dtype(torch.float32) is bundle


def test_in_dtype_keeps_what_was_left_dense():
    """Skipped layers stay skipped in another dtype."""
    bundle = load().without(["mlp.*"])
    moved = bundle.in_dtype(torch.bfloat16)
    assert (list(moved.layers), moved.skipped) == (list(bundle.layers), bundle.skipped)


def test_defaults_and_provenance_are_optional():
    """`Bundle.of` needs a model only."""
    bundle = Bundle.of("toy", Toy(), None)
    assert bundle.provenance == {}
    assert bundle.device == torch.device("cpu")


def test_leaving_layers_dense_with_a_reason():
    """`leaving` moves the named layers to `skipped` with their reasons; names that are no layers are ignored."""
    bundle = load()
    name = "model.layers.0.mlp.up_proj"
    smaller = bundle.leaving({name: "because", "lm_head.weight": "outside", "no.such.layer": "x"})
    assert set(bundle.layers) - set(smaller.layers) == {name}
    assert smaller.skipped == {**bundle.skipped, name: "because"}
    assert smaller.left_dense() == {"because": bundle.layers[name].read().numel()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("model.layers.0.mlp.experts.down_proj[3]", "experts"),
        ("transformer.h.0.mlp.c_fc", "mlp"),
        ("backbone.layers.0.mixer.in_proj", "other"),
    ],
)
def test_kinds_of_layers(name, kind):
    """The kind of a layer follows the words of its name."""
    assert weights_by_kind([(name, 8), (name, 4)]) == {kind: 12}
