"""Size and time of the HTML page: `report_page.py RUN_DIRECTORY [--records 10 100 1000]` prints JSON.

The records of a finished run, with their losses, are copied under other labels until there are as many as asked for.
`first_seconds` includes the bundling of the library of charts, which the cache folder keeps for later pages.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
import time
from pathlib import Path

from nmbench.results.ranking import file_name
from nmbench.results.records import newest, read_records
from nmbench.results.results import load_results
from nmbench_plugins.publish.page import charts
from nmbench_plugins.publish.page.document import document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--records", type=int, nargs="+", default=[10, 100, 1000])
    arguments = parser.parse_args()
    started = time.perf_counter()
    library = charts.javascript()
    bundled = time.perf_counter() - started
    pages = [measured(arguments.run, count) for count in arguments.records]
    print(json.dumps({"library_bytes": len(library), "library_seconds": round(bundled, 2), "pages": pages}, indent=1))


def measured(run: Path, count: int) -> dict[str, float]:
    """Return the size of the page of `count` records, and its wall-clock and processor seconds."""
    with tempfile.TemporaryDirectory() as folder:
        multiplied(run, Path(folder), count)
        results = load_results(folder)
        wall, cpu = time.perf_counter(), time.process_time()
        page = document(results)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {
            "records": len(results.records), "bytes": len(page.encode()), "seconds": round(wall, 2),
            "cpu_seconds": round(cpu, 2),
        }  # fmt: skip


def multiplied(run: Path, folder: Path, count: int) -> None:
    """Write a run directory of `count` records, copies of those of `run`."""
    dense, *rows = (record for record in newest(read_records(run / "records.jsonl")) if record["status"] == "ok")
    copies = ({**row, "label": f"{row['label']}-{turn}"} for turn in itertools.count() for row in rows)
    more = itertools.islice(zip(copies, itertools.cycle(rows), strict=False), count - 1)
    chosen = [(dense, dense), *more]
    (folder / "losses").mkdir()
    for copy, row in chosen:
        shutil.copy(run / f"losses/{file_name(row)}.safetensors", folder / f"losses/{file_name(copy)}.safetensors")
    shutil.copy(run / "spec.toml", folder / "spec.toml")
    (folder / "records.jsonl").write_text("".join(json.dumps(copy) + "\n" for copy, _ in chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
