"""Looks into the built distributions: `check_wheel.py DIST_FOLDER`. Everything needed, nothing stray, demo small."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

DEMO = "nmbench_plugins/demo/assets/"
NEEDED = [
    "nmbench/cli/__init__.py",
    "nmbench/plugins/templates/pyproject.toml.in",
    "nmbench/testing/laws/every.py",
    "nmbench/py.typed",
    "nmbench/runtime/packed/program.cu",
    "nmbench_plugins/maskpro/policy/__init__.py",
    "nmbench_plugins/publish/page/page.css",
    "nmbench_plugins/publish/page/page.js",
    f"{DEMO}model.safetensors",
]
DEMO_BYTES = 12 * 10**6


def main(folder: Path) -> None:
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    sizes = {info.filename: info.file_size for info in zipfile.ZipFile(wheel).infolist()}
    missing = [name for name in NEEDED if name not in sizes]
    stray = [name for name in sizes if not name.startswith(("nmbench/", "nmbench_plugins/", "nmbench-"))]
    held_out = [f"{DEMO}texts/{split}/" for split in ("calibration", "selection", "test")]
    splits = [folder for folder in held_out if not any(name.startswith(folder) for name in sizes)]
    demo_bytes = sum(size for name, size in sizes.items() if name.startswith(DEMO) and "/texts/" not in name)
    licences = [name for name in sizes if name.endswith(("licenses/LICENSE", "licenses/NOTICE"))]
    with tarfile.open(sdist) as archive:
        outside = [n for n in archive.getnames() if n.split("/")[1:2] in (["runs"], [".tox"], [".carry"])]
    problems = [f"missing: {missing}"] * bool(missing) + [f"stray: {stray}"] * bool(stray)
    problems += [f"no texts for {splits}"] * bool(splits) + [f"sdist holds {outside}"] * bool(outside)
    problems += [f"demo has {demo_bytes} bytes"] * (demo_bytes > DEMO_BYTES)
    problems += ["LICENSE and NOTICE are not both in the wheel"] * (len(licences) != 2)
    if problems:
        sys.exit("; ".join(problems))
    print(f"{wheel.name}: {len(sizes)} files, demo model and tokenizer {demo_bytes / 1e6:.1f} MB: as it should be")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
