"""Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774) in plain PyTorch, written from the papers.

Every block is given to whole forward passes of the model as it is then: blocks above pruned, the block itself and those
below dense. Nothing of nmbench is used. Masks are chosen by NumPy, group by group, lower index first among equals.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from reference import experts

Rule = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]  # weight, inputs, keep, group -> mask, new weight
BLOCK = 128  # columns that SparseGPT sweeps before it updates the later ones


def inputs(model: nn.Module, names: Iterable[str], tokens: Tensor) -> dict[str, Tensor]:
    """What the named modules are given in one plain forward pass: name -> `[windows, window_tokens, in]`.

    A name as `experts.down_proj[3]` is that of one of several experts in one parameter: name -> `[tokens, in]`.
    """
    found: dict[str, Tensor] = {}
    fused = experts.modules(list(names))

    def listener(name: str) -> Callable[..., None]:
        def listen(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found[name] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

        return listen

    def expert_listener(parts: list[str]) -> Callable[..., None]:
        return lambda module, args, kwargs: found.update(experts.of(parts, module, args[0].detach(), args[1]))

    modules = {name: model.get_submodule(name) for name in names if not name.endswith("]")}
    handles = [m.register_forward_pre_hook(listener(name), with_kwargs=True) for name, m in modules.items()]
    for name, parts in fused.items():
        handles.append(model.get_submodule(name).register_forward_pre_hook(expert_listener(parts), with_kwargs=True))
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def seen(model: nn.Module, tokens: Tensor) -> dict[tuple[str, str], Tensor]:
    """What every module is given first ("input"), and what it returns first ("output"), in one plain forward pass."""
    found: dict[tuple[str, str], Tensor] = {}

    def listener(name: str) -> Callable[..., None]:
        def listen(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            result = output[0] if isinstance(output, tuple) else output
            named = {"input": args[0] if args else None, "output": result}
            found.update({(name, side): value.clone() for side, value in named.items() if isinstance(value, Tensor)})

        return listen

    handles = [module.register_forward_hook(listener(name)) for name, module in model.named_modules()]
    model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def prune(
    model: nn.Module, blocks: Sequence[Sequence[str]], tokens: Tensor, keep: int, group: int, rule: Rule
) -> dict[str, Tensor]:
    """Prune a model of `nn.Linear` layers in place, block by block; return its masks, bool `[out, in]` by name."""
    masks = {}
    for names in blocks:
        seen = inputs(model, names, tokens)
        for name in names:
            weight = model.get_submodule(name).weight
            masks[name], repaired = rule(weight.clone(), seen[name], keep, group)
            weight.copy_(repaired)
    return masks


def best(score: Tensor, keep: int, group: int) -> Tensor:
    """The mask of the `keep` best of every `group` consecutive scores of a row."""
    rows, columns = score.shape
    cells = score.numpy().reshape(rows * columns // group, group)
    order = np.argsort(-cells, axis=1, kind="stable")
    mask = np.zeros(cells.shape, dtype=bool)
    np.put_along_axis(mask, order[:, :keep], True, axis=1)
    return torch.from_numpy(mask.reshape(rows, columns))


def wanda(weight: Tensor, x: Tensor, keep: int, group: int) -> tuple[Tensor, Tensor]:
    """|W_ij| times the norm of input j; the norm is the root of the mean over windows of the sum of squares."""
    norm = torch.sqrt(torch.sum(x.flatten(0, 1) ** 2, 0) / len(x))
    mask = best(weight.abs() * norm, keep, group)
    return mask, weight * mask


def sparsegpt(weight: Tensor, x: Tensor, keep: int, group: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper with N:M masks, blocks of at most 128 whole groups, 1 % damping."""
    flat = x.flatten(0, 1)
    hessian = (flat.T @ flat) * (2.0 / len(x))
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += torch.diag(0.01 * hessian.diagonal().mean().expand(len(hessian)))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    width = BLOCK // group * group
    for start in range(0, weight.shape[1], width):
        end = min(start + width, weight.shape[1])
        spread = torch.zeros(len(weight), end - start)
        for c in range(start, end):
            if (c - start) % group == 0:
                score = weight[:, c : c + group] ** 2 / torch.diag(upper)[c : c + group] ** 2
                mask[:, c : c + group] = best(score, keep, group)
            error = weight[:, c] * ~mask[:, c] / upper[c, c]
            weight[:, c] *= mask[:, c]
            weight[:, c + 1 : end] -= error[:, None] * upper[c, c + 1 : end]
            spread[:, c - start] = error
        weight[:, end:] -= spread @ upper[start:end, end:]
    return mask, weight


def optimal_brain_surgeon(weight: Tensor, hessian: Tensor, keep: int, group: int) -> tuple[Tensor, Tensor]:
    """SparseGPT as section 3 of the paper states it, in float64, one row and one column at a time.

    F is the set of columns from c on. A weight is dropped at the cost w^2 / [H_F^-1]_cc, and the columns to its right
    move by -w / [H_F^-1]_cc times row c of H_F^-1, which is inverted anew for every column.
    """
    work, hessian = weight.double().clone(), hessian.double()
    inverses = [torch.linalg.inv(hessian[c:, c:]) for c in range(len(hessian))]
    first = torch.stack([inverse[0, 0] for inverse in inverses])
    mask = torch.zeros_like(work, dtype=torch.bool)
    for c, inverse in enumerate(inverses):
        if c % group == 0:
            mask[:, c : c + group] = best(work[:, c : c + group] ** 2 / first[c : c + group], keep, group)
        for row in (~mask[:, c]).nonzero()[:, 0].tolist():
            work[row, c:] -= work[row, c] / inverse[0, 0] * inverse[0]
            work[row, c] = 0
    return mask, work
