"""What the experts of a mixture are given, by a plain loop over them, as Mixtral (arXiv 2401.04088) defines them.

Expert e maps x to D_e (act(G_e x) * (U_e x)), with G_e above U_e in one parameter; it is given the tokens that the
router chose it for. Nothing of nmbench is used, and nothing of how transformers computes it.
"""

import re

import torch
from torch import Tensor, nn

EXPERT = re.compile(r"(.+)\.(\w+)\[(\d+)\]")  # module, parameter, expert


def modules(names: list[str]) -> dict[str, list[str]]:
    """The names of fused experts by that of the module that holds them."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := EXPERT.fullmatch(name):
            found.setdefault(match[1], []).append(name)
    return found


@torch.no_grad()
def inputs(experts: nn.Module, hidden: Tensor, chosen: Tensor, expert: int, parameter: str) -> Tensor:
    """The inputs `[tokens, in]` of one expert; `hidden` `[tokens, width]`, `chosen` int64 `[tokens, choices]`."""
    rows = [row for row, choices in zip(hidden, chosen.tolist(), strict=True) if expert in choices]
    x = torch.stack(rows) if rows else hidden[:0]
    if parameter == "gate_up_proj":
        return x
    gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
    return experts.act_fn(gate) * up


def of(names: list[str], experts: nn.Module, hidden: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """The same for several weights, by name."""
    parts = {name: EXPERT.fullmatch(name) for name in names}
    return {name: inputs(experts, hidden, chosen, int(match[3]), match[2]) for name, match in parts.items()}
