"""The plot of docs/benchmarks/flips.md: nats gained over swaps against forward tokens, from the figures in results/.

`python forward_tokens.py --plot ../docs/benchmarks/forward_tokens.png`
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plots import read, two_panels

DEMO = ("flips_beside_judged_demo.json", "learners_demo_gradients.json", "straight_through_demo.json")
SMOLLM2 = ("learners_smollm2_h100.json", "learners_smollm2_h200.json", "soft_web_smollm2_h200.json")
NAMES = {"judged": "swaps-judged", "judged-long": "swaps-judged", "swaps-judged, preset long": "swaps-judged"}
NAMES |= {"straight-through, rate 0.01": "straight-through"}
MARKS = {"flips": "D", "swaps-judged": "o", "maskpro": "s", "soft": "^", "straight-through": "v", "maskllm": "P"}
COLOURS = {"flips": "#b03030", "swaps-judged": "#3060a0", "maskpro": "#409050"}  # forward passes alone; others grey


def main() -> None:
    with two_panels(__doc__, height=4.8) as (left, right):
        panel(left, DEMO, "demo (4 blocks)")
        for run in read("flips_demo.json")["runs"][:2]:  # the default options
            tokens = [point["forward_tokens"] for point in run["curve"]]
            gained = [run["held_out_start"] - point["held_out"] for point in run["curve"]]
            label = "flips, on validation text" if run["seed"] == 0 else None
            left.plot(tokens, gained, color=COLOURS["flips"], alpha=0.6, label=label)
        panel(right, SMOLLM2, "SmolLM2-135M (30 blocks)")
        for axes in (left, right):
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
            axes.set_ylim(bottom=0)


def panel(axes: Any, names: tuple[str, ...], title: str) -> None:
    """Draw a mark for every learner that begins with swaps at 2:4: nats gained on the test text."""
    met = set()
    for learner, gain in (one for name in names for one in gains(read(name))):
        if gain["init"] != "swaps" or gain["pattern"] != "2:4" or learner not in MARKS:
            continue
        style = {"color": COLOURS.get(learner, "grey"), "marker": MARKS[learner]}
        label = None if learner in met else learner + (" (backward too)" if learner not in COLOURS else "")
        axes.plot(gain["forward_tokens"], gain["nats_gained"], linestyle="", label=label, **style)
        met.add(learner)
    axes.set(xscale="log", xlabel="forward tokens", ylabel="nats gained over swaps", title=title)


def gains(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every gain with its learner; the straight-through estimator of soft counts as a learner of its own."""
    straight = {row["label"] for row in found["rows"] if (row["options"] or {}).get("estimator") == "straight-through"}
    for gain in found["gains"]:
        label = gain["label"]
        yield "straight-through" if label in straight else NAMES.get(label, label), gain


if __name__ == "__main__":
    main()
