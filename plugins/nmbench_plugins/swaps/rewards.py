"""Evidence by rewards: every sequence has a few random flips of its own, and its loss is their reward.

Each group has one candidate flip: the exchange of a kept and a dropped weight that costs least by the squares of
weights and inputs. Every sequence of a minibatch gets flips of its own, drawn among the cheap groups of every layer.
Its reward is its loss less its loss under the present mask, and less the mean of these differences. The score of a
group is the sum of the rewards of its draws; scores stay from step to step, until the group flips.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import nmbench
from nmbench.evaluation import all_logits, window_losses
from nmbench.pruning import LiveWeights
from nmbench_plugins.swaps.evidence import watching

if TYPE_CHECKING:
    from nmbench_plugins.swaps.flips import Flips

Masks = Mapping[str, Tensor]


class Draw(NamedTuple):
    """Flips of one layer by sequence, `[sequences, flips]` each.

    `group`: number of a group among `out * in / M`; `row`; `dropped` and `kept`: columns of the weight that comes back
    and of the weight that goes; `back` and `gone`: these weights, 0 where a sequence drew a group twice.
    """

    group: Tensor
    row: Tensor
    dropped: Tensor
    kept: Tensor
    back: Tensor
    gone: Tensor


@contextlib.contextmanager
def with_draws(task: nmbench.LearnTask, draws: Mapping[str, Draw]) -> Iterator[None]:
    """While the context is open, sequence s of a minibatch computes x W + x dW_s, where dW_s is its flips."""

    def add(name: str, inputs: Tensor, output: Tensor) -> Tensor:
        draw, tokens = draws[name], inputs.shape[1]
        row, dropped, kept = (index[:, None].expand(-1, tokens, -1) for index in (draw.row, draw.dropped, draw.kept))
        change = inputs.gather(2, dropped) * draw.back[:, None] - inputs.gather(2, kept) * draw.gone[:, None]
        return output.scatter_add(2, row, change.to(output.dtype))  # [sequences, window, out]

    with watching(task, list(draws), add):
        yield


class Rewards:
    """Scores of groups by layer, float32 `[out * in / M]`, and the state that rewards depend on.

    `base` float64 `[windows]`: losses of windows under the present masks; NaN where not measured yet. `share`: of all
    groups, those that are proposed.
    """

    def __init__(self, task: nmbench.LearnTask, method: Flips, live: LiveWeights, windows: Tensor) -> None:
        self.task, self.method, self.live, self.windows = task, method, live, windows
        self.scores: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}  # mean square of inputs, float32 [in]
        self.base = torch.full((len(windows),), torch.nan, dtype=torch.float64, device=windows.device)
        self.share = method.shortlist

    def start(self, windows: Tensor) -> None:
        """Gather the squares of inputs under the live weights; layers that do not get all tokens have no scores."""

        def note(name: str, inputs: Tensor, output: Tensor) -> None:
            if inputs.dim() == 3 and inputs.shape[:2] == part.shape:
                total = inputs.float().square().flatten(0, 1).sum(dim=0)
                self.squares[name] = self.squares.get(name, torch.zeros_like(total)) + total

        for part in windows.split(self.method.minibatch):
            self.task.count_forward(part.numel())
            with watching(self.task, list(self.task.layers), note):
                all_logits(self.task.model, part)
        if not self.squares:
            raise nmbench.NMBenchError(
                f"{self.task.who} finds no layer that gets all tokens; choose a learner for fused experts."
            )
        for name in self.squares:
            groups = self.task.layers[name][0] * self.task.layers[name][1] // self.task.pattern[name].group
            self.scores[name] = torch.zeros(groups, device=windows.device)

    def candidates(self, name: str, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each group the place of the kept weight that goes, of the dropped one that comes, and the cost."""
        size = self.task.pattern[name].group
        cost = (self.live.original(name).float().square() * self.squares[name]).view(-1, size)  # [groups, M]
        kept = mask.view(-1, size)
        gone = cost.masked_fill(~kept, torch.inf).min(dim=1)
        back = cost.masked_fill(kept, -torch.inf).max(dim=1)
        return gone.indices, back.indices, gone.values - back.values

    def gather(self, masks: Masks) -> None:
        """Draw flips for new sequences, and add their rewards to the scores."""
        size = max(2, self.method.reward_tokens // self.windows.shape[1])
        batch = next(self.task.batches(size, self.task.generator, self.windows))
        self.measure(batch)
        pools = {name: self.cheap(name, mask) for name, mask in masks.items() if name in self.scores}
        drawn, losses = [], []
        for part in batch.tokens.split(self.method.minibatch):
            draws = {name: self.draw(name, len(part), *pool) for name, pool in pools.items()}
            self.task.count_forward(part.numel())
            with with_draws(self.task, draws):
                losses.append(window_losses(self.task.model, part).double())
            drawn.append({name: draw.group.masked_fill(draw.back == 0, -1) for name, draw in draws.items()})
        rewards = torch.cat(losses) - self.base[batch.chosen]
        rewards = (rewards - rewards.mean()).nan_to_num(0.0).float()
        for groups, own in zip(drawn, rewards.split(self.method.minibatch), strict=True):
            for name, group in groups.items():
                values = own[:, None].expand_as(group) * (group >= 0)
                self.scores[name].index_add_(0, group.clamp_min(0).flatten(), values.flatten())

    def measure(self, batch: nmbench.Batch) -> None:
        """Measure the present masks on those windows of a batch that were not measured since they changed."""
        new = self.base[batch.chosen].isnan()
        if bool(new.any()):
            self.base[batch.chosen[new]] = self.task.loss(batch.tokens[new]).double()

    def cheap(self, name: str, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the numbers of the cheap groups of a layer, and the places of both weights in all groups."""
        gone, back, cost = self.candidates(name, mask)
        return cost.topk(max(1, round(self.method.cheap * len(cost))), largest=False).indices, gone, back

    def draw(self, name: str, sequences: int, pool: Tensor, gone: Tensor, back: Tensor) -> Draw:
        """Return random flips for some sequences."""
        flips = min(len(pool), max(1, round(self.method.flips * len(gone))))
        chosen = torch.randint(len(pool), (sequences, flips), generator=self.task.generator, device=pool.device)
        chosen = chosen.sort(dim=1).values
        fresh = torch.ones_like(chosen, dtype=torch.bool)
        fresh[:, 1:] = chosen[:, 1:] != chosen[:, :-1]
        group, size, width = pool[chosen], self.task.pattern[name].group, self.task.layers[name][1]
        weight = self.live.original(name).reshape(-1)
        places = [group * size + place[group] for place in (back, gone)]  # of the weights, row by row
        values = [weight[place] * fresh for place in places]
        return Draw(group, places[0] // width, places[0] % width, places[1] % width, *values)

    def proposed(self, masks: Masks) -> dict[str, Tensor]:
        """Return masks in which the groups with the best scores are flipped, a share of all groups."""
        everything = torch.cat(list(self.scores.values()))
        most = max(1, round(self.share * len(everything)))
        limit = min(float(everything.kthvalue(most).values), 0.0)
        return {name: self.with_flips(name, masks[name], scores, limit) for name, scores in self.scores.items()}

    def with_flips(self, name: str, mask: Tensor, scores: Tensor, limit: float) -> Tensor:
        """Return the mask of a layer with the candidates of groups whose score is `limit` or less, and below zero."""
        groups = ((scores <= limit) & (scores < 0)).nonzero().flatten()
        gone, back, _ = self.candidates(name, mask)
        new = mask.clone().view(-1, self.task.pattern[name].group)
        new[groups, gone[groups]] = False
        new[groups, back[groups]] = True
        return new.view_as(mask)

    def decided(self, before: Masks, after: Masks, taken: bool) -> None:
        """Forget the scores of groups that flipped and all measured losses; propose more next time, or fewer."""
        self.share = min(self.share * (1.2 if taken else 0.8), 1.0)
        if not taken:
            return
        self.base.fill_(torch.nan)
        for name, scores in self.scores.items():
            size = self.task.pattern[name].group
            scores.masked_fill_((before[name] != after[name]).view(-1, size).any(dim=1), 0.0)

    def state(self) -> dict[str, Any]:
        """Return what later steps depend on, for a checkpoint."""
        return {"scores": self.scores, "squares": self.squares, "base": self.base, "share": self.share}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        device = self.windows.device
        self.scores, self.squares = ({n: t.to(device) for n, t in state[key].items()} for key in ("scores", "squares"))
        self.base, self.share = state["base"].to(device), state["share"]
