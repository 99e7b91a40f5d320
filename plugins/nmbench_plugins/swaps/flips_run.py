"""One run of flips: evidence, proposal, screening, confirmation; checkpoints, and the choice by held-out windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import nmbench
from nmbench.evaluation import groups_changed, standard_error
from nmbench.pruning import LiveWeights
from nmbench.results import pack, unpack
from nmbench_plugins.swaps.descent import descend
from nmbench_plugins.swaps.evidence import Evidence, gathered, writers
from nmbench_plugins.swaps.mixtures import Effects, effects, of_rows
from nmbench_plugins.swaps.problem import Problem
from nmbench_plugins.swaps.rewards import Rewards

if TYPE_CHECKING:
    from nmbench_plugins.swaps.flips import Flips

RISE, FALL = 1.1, 0.85  # of all step sizes, when flips are confirmed, and when not
AT_ONCE = 2**24  # weights of layers that are swept together; large ones fill a device one by one
Masks = dict[str, Tensor]


class FlipsRun:
    """The state of a run: masks bool `[out, in]` by layer, and step sizes float64 `[layers, units]`.

    `earlier`: sums of earlier evidence, one float32 a weight, empty if the learner keeps none. `taken`: steps whose
    flips were confirmed.
    """

    def __init__(self, task: nmbench.LearnTask, method: Flips, live: LiveWeights) -> None:
        self.task, self.method, self.live = task, method, live
        device = task.bundle.device
        self.masks: Masks = {name: mask.to(device) for name, mask in task.initial.items()}
        self.selection: nmbench.Selection[Masks] = nmbench.Selection(task, dict(self.masks), method.tolerance)
        self.sizes = torch.zeros(len(task.layers), method.units, dtype=torch.float64, device=device)
        self.windows = self.pool()
        self.earlier: dict[str, Tensor] = {}
        self.step = self.taken = 0
        self.writing: list[str] = []
        self.local: list[str] = []
        self.rewards = Rewards(task, method, live, self.windows) if method.evidence == "rewards" else None

    def pool(self) -> Tensor:
        """Return the windows to screen and confirm by. Raises `NMBenchError` if the pool has fewer than asked for."""
        length, wanted = min(self.method.window_tokens, self.task.pool.shape[1]), self.method.pool_windows
        windows = self.task.windows(length)
        if wanted and wanted > len(windows):
            raise nmbench.NMBenchError(
                f"{self.task.who} asks for {wanted} windows of {length} tokens, the pool has {len(windows)}; raise "
                f"--pool-tokens to {wanted * length}."
            )
        return windows[:wanted]

    @property
    def evident(self) -> Tensor:
        """The windows that evidence is from: those of the pool, or the few that the learner may read."""
        return self.windows if self.method.pool_windows else self.task.pool

    def learnt(self) -> dict[str, Tensor]:
        """Do the whole run, or the rest of a run from its last checkpoint; return the masks by layer."""
        self.start()
        while self.step < self.method.steps:
            self.advance()
            if self.task.checkpoints.due(self.step, self.method.checkpoint_every) and self.step < self.method.steps:
                self.save()
        return self.conclude()

    def start(self) -> None:
        """Find the layers of each kind of evidence; measure the initial mask, or restore the last checkpoint."""
        saved = self.task.checkpoints.load()
        writing = set[str]() if self.method.evidence in ("local", "rewards") else writers(self.task)
        others = [] if self.method.evidence == "output" else [name for name in self.task.layers if name not in writing]
        self.writing, self.local = [name for name in self.task.layers if name in writing], others
        if saved is None:
            for number, name in enumerate(self.task.layers):
                self.sizes[number] = self.method.output_step if name in writing else self.method.local_step
            self.selection.start(self.losses(self.selection.looked_at, self.masks))
            if self.rewards:
                self.rewards.start(self.draw(self.method.evidence_tokens, self.evident))
            return
        self.selection.restore(saved["selection"])
        self.step, self.taken = saved["step"], saved["taken"]
        device = self.task.bundle.device
        self.sizes = saved["sizes"].to(device)
        self.earlier = {name: tensor.to(device) for name, tensor in saved["earlier"].items()}
        for name, bits in saved["masks"].items():
            self.masks[name] = unpack(bits.to(device), tuple(self.masks[name].shape))
        self.task.generator.set_state(saved["generator"].cpu())
        if self.rewards:
            self.rewards.restore(saved["rewards"])
        self.live.apply(self.masks)

    def advance(self) -> None:
        """Take one step."""
        proposed = self.by_rewards(self.rewards) if self.rewards else self.by_errors()
        screened = self.screened(proposed)
        self.confirm(self.combined(proposed, screened), screened)
        self.step += 1
        if self.step % self.method.check_every == 0 or self.step == self.method.steps:
            losses = self.losses(self.selection.looked_at, self.masks)
            self.selection.look(self.step, dict(self.masks), losses)
            self.report(held_out=float(losses.mean()))

    def by_rewards(self, rewards: Rewards) -> Masks:
        """Return the masks that the rewards of this step and of earlier ones propose."""
        rewards.gather(self.masks)
        return rewards.proposed(self.masks)

    def by_errors(self) -> Masks:
        """Return the masks that the errors of activations propose."""
        evidence = self.evidence()
        found = {name: mask for names in self.alike(evidence) for name, mask in self.proposed(names, evidence).items()}
        return {name: found[name] for name in self.task.layers if name in found}

    def alike(self, evidence: Evidence) -> list[list[str]]:
        """Return the layers to sweep together: with one H and one pattern, as many as have few weights."""
        found: dict[tuple[int, nmbench.Pattern], list[list[str]]] = {}
        for name, gram in evidence.gram.items():
            groups = found.setdefault((id(gram), self.task.pattern[name]), [[]])
            if sum(evidence.error[one].numel() for one in (*groups[-1], name)) > AT_ONCE and groups[-1]:
                groups.append([])
            groups[-1].append(name)
        return [names for groups in found.values() for names in groups]

    def evidence(self) -> Evidence:
        """Gather the evidence of this step, with that of earlier steps if the learner keeps it."""
        method = self.method
        windows = self.draw(method.evidence_tokens, self.evident)
        given = (self.writing, self.local, method.minibatch, method.skip_tokens)
        evidence = gathered(self.task, self.live, self.masks, windows, *given)
        if not evidence.error:
            raise nmbench.NMBenchError(
                f"{self.task.who} finds no layer that it can flip with --set {self.task.who}.evidence="
                f"{method.evidence}; try evidence=both, or another learner for fused experts."
            )
        if not method.decay:
            return evidence
        for name, error in evidence.error.items():
            kept = self.earlier.setdefault(name, torch.zeros_like(error))
            kept.mul_(method.decay).add_(error, alpha=1 - method.decay)
            torch.div(kept, 1 - method.decay ** (self.step + 1), out=error)  # the weights so far do not add up to 1
        return evidence

    def draw(self, tokens: int, windows: Tensor) -> Tensor:
        """Return windows with about `tokens` tokens, at least two windows."""
        size = max(2, tokens // windows.shape[1])
        return next(self.task.batches(size, self.task.generator, windows)).tokens

    def proposed(self, names: Sequence[str], evidence: Evidence) -> Masks:
        """Return the masks that sweeps reach from the present ones, of layers with one H and one pattern; the module
        `flips` states the objective.
        """
        originals = [self.live.original(name).float() for name in names]
        weight, mask = torch.cat(originals), torch.cat([self.masks[name] for name in names])  # [out of all, in]
        gram, error = evidence.gram[names[0]], torch.cat([evidence.error[name] for name in names])
        sizes = [of_rows(self.sizes[self.number(n)], len(one)) for n, one in zip(names, originals, strict=True)]
        linear = -(weight * ~mask) @ gram - torch.cat(sizes).float()[:, None] * error
        problem = Problem.of(weight, gram, None, linear, self.task.pattern[names[0]])
        refined, _ = descend(problem, (~mask).t().float().contiguous(), self.method.sweeps)
        parts = (refined == 0).t().split([len(one) for one in originals])
        return {name: part.contiguous() for name, part in zip(names, parts, strict=True)}

    def number(self, name: str) -> int:
        """Return the number of a layer among all."""
        return list(self.task.layers).index(name)

    def screened(self, proposed: Masks) -> Effects:
        """Return the effects of the proposed flips by unit, and let the step sizes follow."""
        changes = Changes(self.live, self.masks, proposed)
        tokens = self.draw(self.method.screen_tokens, self.windows)
        found = effects(self.task, changes, self.method.units, tokens, self.method.minibatch)
        numbers = [self.number(name) for name in proposed]
        harm = (found.ratio / 2).tanh().nan_to_num(1.0)
        self.sizes[numbers] *= (-self.method.adapt * harm).exp()
        return found

    def combined(self, proposed: Masks, screened: Effects) -> Masks:
        """Return the proposed masks where the screening found no harm, and the present masks elsewhere."""
        helpful = screened.ratio < self.method.doubt  # NaN is not
        masks = {}
        for (name, mask), units in zip(proposed.items(), helpful, strict=True):
            masks[name] = torch.where(of_rows(units, len(mask))[:, None], mask, self.masks[name])
        return masks

    def confirm(self, masks: Masks, screened: Effects) -> None:
        """Take masks that clearly lower the loss of fresh windows; else all step sizes fall."""
        tokens = self.draw(self.method.confirm_tokens, self.windows)
        before = self.losses(tokens, self.masks)
        gain = before - self.finite_losses(tokens, masks)
        better = len(gain) > 1 and float(gain.mean()) > self.method.margin * standard_error(gain)
        share = groups_changed({**self.masks, **masks}, self.masks, self.task.pattern)
        if self.rewards:
            self.rewards.decided(self.masks, masks, better)
        if better:
            self.masks.update(masks)
            self.taken += 1
        else:
            self.live.apply({name: self.masks[name] for name in masks})
        self.sizes *= RISE if better else FALL
        self.report(gain=float(gain.mean()), flipped=share if better else 0.0, screened=float(screened.mean.sum()))

    def report(self, **values: float) -> None:
        """Report this step; a measurement on selection windows is that of the step before."""
        checked = "held_out" in values
        step = self.step if checked else self.step + 1
        masks = self.masks if checked else None
        self.task.report(step, total=self.method.steps, masks=masks, **values)

    def losses(self, windows: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """Return the losses float64 `[n]` of the model with `masks`. Raises `NumericalFailure` if one is not finite."""
        losses = self.finite_losses(windows, masks)
        if not losses.isfinite().all():
            raise nmbench.NumericalFailure(
                f"{self.task.who}: the loss of a window is NaN or infinite; another --dtype may help."
            )
        return losses

    def finite_losses(self, windows: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """Return the losses float64 `[n]`, in host memory, finite or not."""
        self.live.apply(masks)
        return self.task.loss(windows).double().cpu()

    def save(self) -> None:
        """Store everything that the rest of the run depends on."""
        state = {"step": self.step, "taken": self.taken, "selection": self.selection.state()}
        masks = {name: pack(mask).cpu() for name, mask in self.masks.items()}
        generator = self.task.generator.get_state()
        tensors: dict[str, Any] = {"sizes": self.sizes, "earlier": self.earlier, "generator": generator}
        rewards = {"rewards": self.rewards.state()} if self.rewards else {}
        self.task.checkpoints.save({**state, **tensors, **rewards, "masks": masks})

    def conclude(self) -> dict[str, Tensor]:
        """Return the masks by layer, and write the notes of the record."""
        masks = {name: mask.cpu() for name, mask in self.selection.verdict(self.losses).items()}
        self.task.notes.update(
            **self.selection.notes("flipped"),
            best_step=self.selection.best_at,
            steps_taken=self.taken,
            groups_changed=groups_changed(masks, self.task.initial, self.task.pattern),
            step_sizes=dict(zip(self.task.layers, self.sizes.mean(dim=1).tolist(), strict=True)),
        )
        return masks


class Changes(Mapping[str, Tensor]):
    """dW `[out, in]` by layer, from the masks `before` to the masks `after`, computed when it is read and not kept."""

    def __init__(self, live: LiveWeights, before: Masks, after: Masks) -> None:
        self.live, self.before, self.after = live, before, after

    def __getitem__(self, name: str) -> Tensor:
        weight = self.live.original(name)
        return weight * (self.after[name].to(weight.dtype) - self.before[name].to(weight.dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self.after)

    def __len__(self) -> int:
        return len(self.after)
