"""The perplexity of `nmbench run`'s dense row beside that of fifteen lines that share no code with nmbench.

    python perplexity_check.py --model FOLDER --text wiki.valid.raw --rows --calibration jsonl:FILE --window 1024 \
        --windows 20 --json results/perplexity_check.json

The text is cut to about the given number of windows; both sides read the same file. nmbench also prunes by magnitude,
because a run needs a method. Prints both figures and their relative difference, adds the figures to the JSON file under
the name of the text, and fails if the figures differ in the fourth digit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

AGREE = 1e-4  # relative: four digits


def perplexity(folder: str, text: str, window: int) -> float:
    """exp of the mean loss over non-overlapping windows, tail dropped, computed by transformers alone in float32."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids  # [1, n]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for start in range(0, tokens.shape[1] - window + 1, window):
        part = tokens[:, start : start + window]  # [1, window]
        with torch.no_grad():
            losses.append(model(input_ids=part, labels=part).loss.item())
    return math.exp(math.fsum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a transformers folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", action="store_true", help='join lines by "\\n\\n", the protocol of WikiText-2')
    parser.add_argument("--calibration", required=True, help="as for nmbench run: text that is not the test's")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    text = beginning(args)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "text.txt"
        file.write_text(text, encoding="utf-8", newline="")
        rows = by_nmbench(args, file, Path(scratch) / "run")
    alone = perplexity(args.model, text, args.window)
    dense = rows["dense"]["metrics"].popitem()[1]
    found = {
        "model": Path(args.model).name,
        "window": args.window,
        "windows": dense["n"],
        "nmbench": dense["value"],
        "transformers alone": alone,
        "relative difference": dense["value"] / alone - 1,
        "magnitude 2:4": rows["magnitude"]["metrics"].popitem()[1]["value"],
        "versions": {name: importlib.metadata.version(name) for name in ("nmbench", "torch", "transformers")},
    }
    print(json.dumps(found, indent=1))
    if args.json:
        kept = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
        args.json.write_text(json.dumps({**kept, args.text.name: found}, indent=1) + "\n", encoding="utf-8")
    if abs(found["relative difference"]) > AGREE:
        sys.exit("the two differ")


def beginning(args: argparse.Namespace) -> str:
    """The beginning of the text with the given number of windows and less than one more."""
    text = args.text.read_text(encoding="utf-8")
    rows = [row if row.strip() else "" for row in text.splitlines(keepends=True)]  # as the data set of the hub has them
    text = "\n\n".join(rows) if args.rows else text
    encoded = AutoTokenizer.from_pretrained(args.model)(text, return_offsets_mapping=True, verbose=False)
    last = min(args.windows * args.window + args.window // 2, len(encoded["input_ids"]) - 1)
    return text[: encoded["offset_mapping"][last][1]]


def by_nmbench(args: argparse.Namespace, file: Path, out: Path) -> dict[str, dict[str, Any]]:
    """The rows by label of a run through the command line."""
    command = [sys.executable, "-m", "nmbench.cli", "run", "--model", args.model, "--method", "magnitude"]
    command += ["--calibration", args.calibration, "--windows", "1", "--window-tokens", "64", "--out", str(out)]
    command += ["--metric", f"ppl:text:{file}@{args.window}", "--device", "cpu", "--dtype", "float32"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = map(json.loads, (out / "records.jsonl").read_text(encoding="utf-8").splitlines())
    return {record["label"]: record for record in records}


if __name__ == "__main__":
    main()
