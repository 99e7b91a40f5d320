r"""The time of a run whose rows several processes make, beside the same run in one process.

    python jobs.py --jobs 4 --model FOLDER --json results/jobs_h100x4.json -- \
        --calibration jsonl:web.jsonl.gz --metric ppl:text:test.txt@512
    python jobs.py --jobs 2 --rows 2                     the demo, on a CPU

Without `--metric` a model other than the demo is measured on WikiText-2 and C4, which come from the hub.

Both runs have the same rows: `--rows` seeds of `--method` (with its options after `--`), which take equally long.
Seconds are those of whole commands, loading and the dense row included; those of each row are in the JSON. `equal`:
the measured weights are the same. `--runs DIR` keeps both run directories.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nmbench.experiment.environment import cpu_name
from nmbench.results.records import read_records


def timed(flags: list[str], out: Path) -> dict[str, Any]:
    """Seconds of one command, and the digests of its rows."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "nmbench.cli", "run", *flags, "--out", str(out), "--quiet"], check=True)
    seconds = time.perf_counter() - start
    records = read_records(out / "records.jsonl")
    names = [" ".join(str(row[part]) for part in ("label", "pattern", "seed")) for row in records]
    digests = dict(zip(names, (row["measured_digest"] for row in records), strict=True))
    totals = dict(zip(names, (row["seconds"]["total"] for row in records), strict=True))
    return {"seconds": seconds, "totals": totals, "digests": digests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=Path, help="a new directory for both runs  [a temporary one]")
    parser.add_argument("flags", nargs="*", help="more flags of nmbench run")
    args = parser.parse_args()
    seeds = [flag for seed in range(args.rows) for flag in ("--seed", str(seed))]
    flags = ["--model", args.model, "--method", args.method, *seeds, *args.flags]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.runs or Path(temporary)
        alone = timed(flags, folder / "alone")
        together = timed([*flags, "--jobs", f"local:{args.jobs}"], folder / "together")
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "gpus": torch.cuda.device_count(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "jobs": args.jobs,
        "flags": flags,
        "one process": alone["seconds"],
        "jobs at once": together["seconds"],
        "ratio": alone["seconds"] / together["seconds"],
        "seconds of rows": {"one process": alone["totals"], "jobs at once": together["totals"]},
        "equal": alone["digests"] == together["digests"],
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
