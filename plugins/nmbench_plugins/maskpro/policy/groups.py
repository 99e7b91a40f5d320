"""Groups of logits: checks, chunks, columns, and the weights of kept and dropped positions relative to each other."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nmbench import NMBenchError, NotStrict, NumericalFailure
from nmbench_plugins.maskpro.limits import MAX_GROUP

CHUNK_WEIGHTS = {"cpu": 2**17, "cuda": 2**24}  # CPU: temporaries stay in cache; CUDA: few launches, bounded memory


def check_logits(logits: Tensor, keep: int) -> Tensor:
    """Return the logits as rows [groups, group].

    Raises NumericalFailure for NaN or Inf, NMBenchError for a wrong dtype, group or `keep`.
    """
    group = logits.shape[-1] if logits.dim() else 0
    if not logits.is_floating_point() or not 2 <= group <= MAX_GROUP:
        raise NMBenchError(
            f"policy logits are {logits.dtype} {list(logits.shape)}; expected floating point "
            f"[..., group] with 2 <= group <= {MAX_GROUP}."
        )
    if not 1 <= keep < group:
        raise NMBenchError(f"policy keeps {keep} of {group} weights; expected 1 to {group - 1} of {group}.")
    # The cheap sum is not finite if one logit is not; the elements are tested only then, as a sum may overflow.
    if not logits.sum().isfinite() and not logits.isfinite().all():
        raise NumericalFailure(
            f"policy logits have {int((~logits.isfinite()).sum())} NaN or Inf values of "
            f"{logits.numel()}; lower the learning rate, or check the losses that the logits were updated with."
        )
    return logits.reshape(-1, group)


def check_mask(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return logits and mask as rows [groups, group], and the number of positions that every group keeps.

    Raises NotStrict where groups keep different numbers, NMBenchError for a wrong dtype or shape, and the errors of
    `check_logits`.
    """
    if mask.dtype != torch.bool or mask.shape != logits.shape:
        raise NMBenchError(
            f"policy mask is {mask.dtype} {list(mask.shape)}; expected bool {list(logits.shape)}, "
            "the shape of the logits."
        )
    if not mask.numel():
        return check_logits(logits, 1), mask.reshape(-1, mask.shape[-1]), 1
    kept = mask.reshape(-1, mask.shape[-1])  # [groups, group]
    counts = kept.sum(-1, dtype=torch.uint8)
    keep = int(counts[0])
    if (counts != keep).any():
        wrong = int((counts != keep).nonzero()[0])
        raise NotStrict(
            f"policy mask keeps {keep} weights in group 0 and {int(counts[wrong])} in group {wrong}; "
            "expected the same number in every group."
        )
    return check_logits(logits, keep), kept, keep


def chunks(rows: Tensor) -> Iterator[slice]:
    """Return slices over all groups in order, so small that temporaries fit (`CHUNK_WEIGHTS`)."""
    size = max(1, CHUNK_WEIGHTS.get(rows.device.type, CHUNK_WEIGHTS["cuda"]) // rows.shape[-1])
    return (slice(start, start + size) for start in range(0, len(rows), size))


def working_dtype(logits: Tensor) -> torch.dtype:
    """Return float64 for float64 logits and float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def columns(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy rows [n, group] to [group, n]: sums over a short axis are fast when that axis comes first."""
    result = torch.empty(rows.shape[::-1], dtype=dtype, device=rows.device)
    for column, values in zip(result, rows.unbind(-1), strict=True):  # several times faster than one copy of `.t()`
        column.copy_(values)
    return result


def gaps_and_shares(rows: Tensor, kept: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return gap = log D - logit of the kept, [keep, n], and share = w_k / D of the dropped, [group - keep, n].

    rows [n, group], kept bool [n, group]; D is the total weight of the dropped. Gap and share are computed from
    differences to the largest dropped logit, so that large logits lose no digits of these differences.
    """
    dropped = columns(rows[~kept].view(-1, rows.shape[-1] - keep), rows.dtype)
    top = dropped.amax(0)  # [n]
    share = dropped.sub_(top).exp_()
    total = share.sum(0)  # [n], between 1 and group
    gap = top - columns(rows[kept].view(-1, keep), rows.dtype)
    return gap.add_(total.log()), share.div_(total)
