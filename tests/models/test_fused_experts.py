"""Laws of fused experts whose module does not declare its layout: it follows from their sizes, or they stay dense."""

import pytest
import torch
import transformers
from torch import Tensor, nn

from nmbench.calibration.walk import walk
from nmbench.errors import NMBenchError
from nmbench.methods import Stat
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.models.fused_experts import fused_experts
from nmbench.pattern import Pattern
from nmbench.pruning.one_shot import prune_one_shot
from nmbench_plugins.tiny import COMMON, LLAMA
from nmbench_plugins.wanda import Wanda

EXPERTS, INNER, WIDTH = 4, 24, 32
FOUR = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
FAMILIES = {  # configuration -> settings; experts are given tokens sorted by expert, all tokens, tokens and choices
    "JetMoeConfig": {**LLAMA, **FOUR, "kv_channels": 16},
    "Llama4TextConfig": {**LLAMA, **FOUR, "intermediate_size_mlp": 96},
    "LongcatFlashConfig": {
        **LATENT,
        **{"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "head_dim": 8, "ffn_hidden_size": 96},
        **{"expert_ffn_hidden_size": 32, "n_routed_experts": EXPERTS, "zero_expert_num": 2, "moe_topk": 2},
    },
}
families = pytest.mark.parametrize("family", FAMILIES)


class Holder(nn.Module):
    def __init__(self, *shapes: tuple[int, ...], **attributes: object) -> None:
        super().__init__()
        for index, shape in enumerate(shapes):
            self.register_parameter(f"p{index}", nn.Parameter(torch.zeros(shape)))
        for name, value in attributes.items():
            setattr(self, name, value)


def layout(*shapes: tuple[int, ...], **attributes: object) -> bool | None:
    found = fused_experts(Holder(*shapes, **attributes))
    return None if found is None else found.transposed


def test_a_declared_layout_is_taken():
    """A module that says how its experts are stored needs no sizes."""
    for transposed in (False, True):
        assert layout((EXPERTS, 8, 8), is_transposed=transposed) is transposed


def test_a_layout_of_stated_sizes():
    """One parameter whose module states inputs and outputs; equal sizes would fit both layouts, and say nothing."""
    sizes = {"num_experts": EXPERTS, "input_size": WIDTH, "output_size": INNER}
    assert layout((EXPERTS, INNER, WIDTH), **sizes) is False
    assert layout((EXPERTS, WIDTH, INNER), **sizes) is True
    assert layout((EXPERTS, WIDTH, WIDTH), num_experts=EXPERTS, input_size=WIDTH, output_size=WIDTH) is None


@pytest.mark.parametrize("inner", [INNER, WIDTH, WIDTH // 2, 2 * WIDTH])
def test_a_layout_of_a_gate(inner):
    """A gate above an up projection has twice the outputs that the down projection has inputs, in any order."""
    up, down = (EXPERTS, 2 * inner, WIDTH), (EXPERTS, WIDTH, inner)
    turned = [(experts, columns, rows) for experts, rows, columns in (up, down)]
    for order in (1, -1):
        assert layout(*(up, down)[::order], num_experts=EXPERTS) is False
        assert layout(*turned[::order], num_experts=EXPERTS) is True


@pytest.mark.parametrize(
    ("shapes", "attributes"),
    [
        (((EXPERTS, INNER, WIDTH), (EXPERTS, WIDTH, INNER)), {"num_experts": EXPERTS}),  # no gate: fits neither
        (((EXPERTS, INNER, WIDTH),) * 3, {"num_experts": EXPERTS}),
        (((EXPERTS, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER)), {}),  # who says that these are experts?
        (((EXPERTS, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER)), {"num_experts": EXPERTS + 1}),
    ],
)
def test_an_unknown_layout_is_not_guessed(shapes, attributes):
    """Sizes that fit no layout, and parameters that nobody calls experts, are left alone."""
    assert layout(*shapes, **attributes) is None


def test_experts_that_all_parameters_hold():
    """Rows for experts that compute nothing, as those of LongCat-Flash, are no experts."""
    module = Holder((EXPERTS + 2, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER), num_routed_experts=EXPERTS)
    assert fused_experts(module).number == EXPERTS


def load(family: str) -> Bundle:
    torch.manual_seed(0)
    settings = {**COMMON, **FAMILIES[family]}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, family)(**settings))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)  # so that all experts are chosen
    return Bundle.of(family, model, None)


def windows() -> Tensor:
    return torch.randint(256, (6, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def inputs(bundle: Bundle, name: str) -> Tensor:
    """The inputs `[tokens, in]` of one expert in a plain forward pass, from what its module was given."""
    where, given = bundle.layers[name].where, []
    module = bundle.model.get_submodule(where.module)
    handle = module.register_forward_pre_hook(lambda module, args: given.append(args))
    bundle.model(input_ids=windows())
    handle.remove()
    (arguments,) = given
    if len(arguments) == 2:  # rows, and how many there are for each expert
        return arguments[0].split(arguments[1])[where.expert]
    if len(arguments) == 1:  # one copy of the rows for each expert, zero where a token is not routed
        rows = arguments[0].view(EXPERTS, -1, arguments[0].shape[-1])[where.expert]
        rows = rows[rows.abs().sum(-1) > 0]
    else:
        rows = arguments[0][(arguments[1] == where.expert).any(-1)]
    if where.parameter == "gate_up_proj":
        return rows
    up = module.gate_up_proj[where.expert]
    gate, up = (rows @ (up if where.transposed else up.T)).chunk(2, dim=-1)
    return module.act_fn(gate) * up


@pytest.mark.filterwarnings("ignore")
@families
def test_experts_are_pruned_by_their_own_tokens(family):
    """Every expert of these families is a layer, and its statistics are those of the tokens routed to it."""
    bundle = load(family)
    fused = [name for name, layer in bundle.layers.items() if layer.fused]
    assert len(fused) >= 2 * EXPERTS
    assert not any("Experts" in reason for reason in bundle.skipped.values())
    for step in walk(bundle, windows(), Stat.GRAM, False):
        for layer in (layer for layer in step.layers if layer.fused):
            x, got = inputs(bundle, layer.name).double(), step.stats[layer.name]
            assert got.tokens == len(x) > 0
            scale = float(got.gram.abs().max())
            torch.testing.assert_close(got.gram.double(), 2 / 6 * x.T @ x, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.filterwarnings("ignore")
def test_an_expert_of_jetmoe_without_tokens_is_refused():
    """Where tokens cannot be sent to an expert by changing the routing, an expert without any is an error."""
    bundle = load("JetMoeConfig")
    few = torch.full((1, 2), 7)
    with pytest.raises(NMBenchError, match=r"no calibration token reached .*; give more --windows"):
        prune_one_shot(bundle, DenseWeights(bundle), Wanda(), dict.fromkeys(bundle.layers, Pattern(2, 4)), few, "it")
