"""Laws of routers: a layer that chooses among experts stays dense, wherever it stands; others do not."""

import pytest
import torch
import transformers
from torch import nn

from nmbench.models.bundle import Bundle
from nmbench.models.routers import routers_of
from nmbench_plugins.tiny import COMMON, LLAMA

WIDTH, EXPERTS = 16, 4
FOUR = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
FAMILIES = {
    "Llama4TextConfig": ({**LLAMA, **FOUR, "intermediate_size_mlp": 96}, "feed_forward.router.weight"),
    "JetMoeConfig": ({**LLAMA, **FOUR, "kv_channels": 16}, "mlp.router.layer.weight"),
    "PhimoeConfig": ({**LLAMA, **FOUR}, "mlp.router.weight"),
    "Qwen2MoeConfig": (
        {**LLAMA, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "mlp.shared_expert_gate.weight",
    ),
}


class Expert(nn.Module):
    def __init__(self, inner: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, inner, bias=False), nn.Linear(inner, WIDTH, bias=False)


class Gate(nn.Module):
    """A router that is a module of its own, with one linear layer."""

    def __init__(self, outputs: int = EXPERTS) -> None:
        super().__init__()
        self.norm, self.score = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs, bias=False)


class Stacked(nn.Module):
    """Experts whose matrices are rows of one matrix; the module states their number."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.up = nn.Parameter(torch.zeros(EXPERTS * 32, WIDTH))


def experts(count: int = EXPERTS) -> nn.ModuleList:
    return nn.ModuleList([Expert() for _ in range(count)])


def found(**parts: nn.Module) -> set[str]:
    """The names of the routers in a block with an attention layer and a mixture of `parts`."""
    block = nn.ModuleDict({"out": nn.Linear(WIDTH, WIDTH), "moe": nn.ModuleDict(parts)})
    block = Holder(out=nn.Linear(WIDTH, WIDTH), moe=Holder(**parts))
    ids = routers_of(block)
    return {name for name, module in block.named_modules() if id(module) in ids}


class Holder(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_beside_experts_of_their_own_modules():
    """A gate beside a list or a dictionary of experts is a router, also inside a module of its own."""
    assert found(gate=nn.Linear(WIDTH, EXPERTS), experts=experts()) == {"moe.gate"}
    assert found(gate=Gate(), experts=experts()) == {"moe.gate.score"}
    named = nn.ModuleDict({f"expert_{index}": Expert() for index in range(EXPERTS)})
    assert found(router=Gate(), experts=named) == {"moe.router.score"}


def test_beside_stacked_experts():
    """Experts in one parameter have a router too, whether the parameter has three dimensions or two."""
    fused = Holder()
    fused.weight = nn.Parameter(torch.zeros(EXPERTS, 32, WIDTH))
    assert found(gate=nn.Linear(WIDTH, EXPERTS), experts=fused) == {"moe.gate"}
    assert found(router=Gate(), experts=Stacked()) == {"moe.router.score"}


def test_a_router_further_up():
    """The router of experts that are wrapped once more is found beside the wrapper."""
    assert found(router=Gate(), wrapper=Holder(experts=experts())) == {"moe.router.score"}


def test_the_weight_of_a_shared_expert():
    """A layer of one output beside a router weighs the shared expert."""
    parts = {"gate": nn.Linear(WIDTH, EXPERTS), "experts": experts(), "shared": Expert()}
    assert found(**parts, shared_gate=nn.Linear(WIDTH, 1)) == {"moe.gate", "moe.shared_gate"}


def test_routers_of_several_layers():
    """All layers of a router stay dense; the layers of a shared expert do not, whatever its width."""
    router = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, EXPERTS))
    assert found(router=router, experts=experts(), shared=Expert()) == {"moe.router.0", "moe.router.2"}
    router = nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH))
    assert found(gate=nn.Linear(WIDTH, WIDTH), other=router, experts=experts(WIDTH)) == {"moe.gate"}


def test_experts_of_nothing():
    """A lone layer that scores a few more than the experts is their router; it may choose no expert at all."""
    assert found(gate=nn.Linear(WIDTH, EXPERTS + 1), experts=experts(), shared=Expert()) == {"moe.gate"}
    assert found(gate=nn.Linear(WIDTH, EXPERTS), low=nn.Linear(WIDTH, EXPERTS + 1), experts=experts()) == {"moe.gate"}


def test_what_is_no_router():
    """Layers of another number of outputs, those of a shared expert, and layers without experts are pruned."""
    assert found(gate=nn.Linear(WIDTH, 2 * EXPERTS + 1), experts=experts()) == set()
    assert found(gate=nn.Linear(WIDTH, WIDTH), shared=Expert(), experts=experts(WIDTH)) == {"moe.gate"}
    assert found(gate=nn.Linear(WIDTH, EXPERTS), one=Expert(), two=Expert()) == set()
    assert found(conv=nn.Conv1d(EXPERTS, 8, 3), gate=nn.Linear(WIDTH, EXPERTS)) == set()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", FAMILIES)
def test_families_of_transformers(config):
    """The routers of families in transformers stay dense with the reason."""
    settings, name = FAMILIES[config]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**COMMON, **settings}))
    bundle = Bundle.of("it", model, None)
    assert bundle.skipped[f"model.layers.0.{name}"].startswith("chooses among experts (")
    assert bundle.left_dense()["chooses among experts"] > 0
    assert not any(layer.endswith(("router", "router.layer", "gate")) for layer in bundle.layers)
