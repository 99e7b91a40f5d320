"""The plot of docs/benchmarks/scaling.md: speed on several GPUs, and streamed walks, from the figures in results/.

`python scaling.py --plot ../docs/benchmarks/scaling_h200.png`
"""

from __future__ import annotations

from typing import Any

from plots import read, two_panels

RANKS = {
    "ranks_smollm2_h200x2.json": "SmolLM2-135M",
    "ranks_8b_h200x2.json": "4 blocks of Llama 3.1 8B",
    "ranks_8b_walks_h200x2.json": "4 blocks of Llama 3.1 8B",
}
STREAMED = "streaming_8b_h200.json"
WHENCE = {
    "host": "blocks in\nhost memory",
    "host, passes too": "hidden states\nas well",
    "disk": "blocks on disk,\nin the page cache",
    "disk, cold": "blocks on disk,\nnot in memory",
}
BLUE, ORANGE = "#3060a0", "#d08030"


def main() -> None:
    with two_panels(__doc__, height=4.2) as (left, right):
        bars(left, [one for name, model in RANKS.items() for one in speeds(name, model)])
        left.axvline(2, color="grey", linestyle=":")
        left.set(xlabel="tokens a second, 2 GPUs over 1", title="One row on two GPUs", xlim=(0, 2.3))
        bars(right, walks(STREAMED))
        right.axvline(1, color="grey", linestyle=":")
        right.set(xlabel="seconds of a Wanda walk, times those resident", xlim=(0, 2.1))
        right.set_title("4 blocks of Llama 3.1 8B, streamed")


def speeds(name: str, model: str) -> list[tuple[str, float, str]]:
    """Label, ratio and colour of every row on two GPUs."""
    rows = [row for row in read(name)["rows"] if row["ranks"] == 2]
    colours = {"per rank": BLUE, "in all": ORANGE}
    return [
        (f"{row['method']}, {model},\n{what(row)}", row["ratio"], colours[row["fixed"]] if "minibatch" in row else BLUE)
        for row in rows
    ]


def what(row: dict[str, Any]) -> str:
    """What is the same on one GPU and on two."""
    if "minibatch" not in row:
        return f"{row['windows']} windows"
    return "16 windows a GPU" if row["fixed"] == "per rank" else "16 windows in all"


def walks(name: str) -> list[tuple[str, float, str]]:
    """Label, ratio and colour of every streamed mode."""
    return [(WHENCE[row["mode"]], row["ratio"], BLUE) for row in read(name)["rows"] if row["mode"] in WHENCE]


def bars(axes: Any, found: list[tuple[str, float, str]]) -> None:
    """Draw horizontal bars, the first one on top, each with its number."""
    labels, values, colours = zip(*reversed(found), strict=True)
    drawn = axes.barh(labels, values, color=colours)
    axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)


if __name__ == "__main__":
    main()
