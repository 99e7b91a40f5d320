"""`nmbench run`: prune, prove strict, evaluate, compare."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmbench.cli.grid import Run, cells, check_protocols, each
from nmbench.cli.ranks import check_flags, joining, launched
from nmbench.cli.shared import done, loaded, plugin_option, print_table
from nmbench.errors import NMBenchError

if TYPE_CHECKING:
    from nmbench.spec import RunSpec


@click.command()
@click.option("--method", "methods", multiple=True, metavar="NAME|LABEL=NAME", help="A method; repeat to compare.")
@click.option("--set", "settings", multiple=True, metavar="LABEL.OPTION=VALUE", help="An option of a method.")
@click.option("--model", metavar="REF", help="demo, hf:ORG/NAME[@REVISION], a folder, gguf:FILE, tiny:FAMILY.  [demo]")
@click.option(
    "--pattern",
    "patterns",
    multiple=True,
    metavar="N:M",
    help="Keep N of every M weights, or N:MxU: units of U; repeatable.  [2:4]",
)
@click.option("--pattern-for", multiple=True, metavar="LAYERS=N:M", help="Another pattern for layers, as 'mlp.*=4:8'.")
@click.option("--skip", multiple=True, metavar="LAYERS", help="Leave layers dense, as 'q_proj' or 'layers.0.*'.")
@click.option("--seed", "seeds", multiple=True, type=click.IntRange(min=0), help="Repeatable.  [0]")
@click.option("--calibration", metavar="DATA", help="demo, c4, wikitext2, text:FILE, jsonl:FILE; self:DATA.")
@click.option("--windows", type=click.IntRange(min=1), help="Calibration windows for statistics.")
@click.option("--window-tokens", type=click.IntRange(min=2), help="Tokens in a calibration window.")
@click.option("--pool-tokens", type=click.IntRange(min=1), help="Tokens that learners may learn from.")
@click.option("--selection-tokens", type=click.IntRange(min=1), help="Tokens that learners may choose by.")
@click.option("--bos", metavar="auto|always|never", help="BOS begins calibration windows.  [auto: as the first metric]")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="METRIC",
    help="As ppl:wikitext2@2048, ppl:wikitext2@2048+bos; repeatable.",
)
@click.option("--device", metavar="auto|cpu|cuda", help="auto takes a CUDA GPU if torch finds one.  [auto]")
@click.option("--stream/--no-stream", default=None, help="Bring decoder blocks to the device one by one.  [if needed]")
@click.option("--stream-from", metavar="host|disk", help="Where blocks wait: memory, or files.  [host]")
@click.option("--dtype", metavar="DTYPE", help="Load and prune in this dtype (float32, bfloat16, float16).")
@click.option("--eval-dtype", metavar="DTYPE", help="Evaluate in this dtype.  [the pruning dtype]")
@click.option("--weights", metavar="int8", help="Store prunable weights in 8 bits.  [in the pruning dtype]")
@click.option("--trust-remote-code", is_flag=True, default=None, help="Let the model run its own code from the hub.")
@click.option("--allow-sparse", is_flag=True, default=None, help="Prune a checkpoint that is sparse already.")
@click.option("--dequantise", is_flag=True, default=None, help="Make the weights of a quantised checkpoint numbers.")
@click.option(
    "--merge-adapter",
    is_flag=False,
    flag_value="beside",
    metavar="[FOLDER]",
    help="Merge an adapter into the weights first: that of FOLDER, or that beside the model.",
)
@click.option("--keep-weights/--no-keep-weights", default=None, help="Keep repaired weights.  [keep]")
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="A TOML file, as DIR/spec.toml.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Run directory.  [runs/PROTOCOL]")
@click.option("--jobs", metavar="local:K|slurm|script", help="Other processes do the rows.  [this one, in turn]")
@click.option("--dry-run", is_flag=True, help="Print the rows, what is done, and seconds and memory; load no weights.")
@click.option("--fail-fast", is_flag=True, help="End at the first row that fails; the jobs after it are not done.")
@click.option("--quiet", is_flag=True, help="No progress, only doubts and the table.")
@click.option("--track", "trackers", multiple=True, metavar="NAME", help="Follow the run, as with tensorboard.")
@plugin_option
def run(
    config: Path | None,
    out: Path | None,
    jobs: str | None,
    dry_run: bool,
    fail_fast: bool,
    quiet: bool,
    trackers: Sequence[str],
    **flags: Any,
) -> None:
    """Prune, prove strict, evaluate, compare. The same command resumes; more methods, patterns or seeds extend it."""
    content, cluster = content_of(config)
    runs = runs_from(content, flags, str(config) if config else "the flags")
    if out is not None:
        check_protocols(runs)
    if jobs is not None and fail_fast:
        raise NMBenchError("--fail-fast ends a run whose rows are done in turn; leave it out with --jobs.")

    if (launch := launched()) is not None:
        check_flags(len(runs), jobs, dry_run)

    def do(run: Run) -> bool:
        if len(runs) > 1:
            click.echo(f"\n{'# ' * (jobs == 'script')}{run.spec.model}")
        if dry_run:
            from nmbench.cli.dry_run import dry_run as show

            show(run.spec, run.out(out))
            return True
        with joining(launch, run.spec) as leads:
            return not leads or compared(run.spec, run.out(out), quiet, fail_fast, jobs, cluster, trackers)

    if not each(runs, do, fail_fast, lambda line: click.echo(line, err=True)):
        if fail_fast:
            click.echo("Ended at the first failure (--fail-fast); the same command without it does the rest.", err=True)
        sys.exit(1)


def compared(
    spec: RunSpec,
    out: Path | None,
    quiet: bool,
    fail_fast: bool,
    jobs: str | None,
    cluster: dict[str, Any],
    trackers: Sequence[str],
) -> bool:
    """Do one run, print its table and its files; return True if every row of the command is there."""
    workers = None
    if jobs is not None:
        from nmbench.workers.asked import workers_of

        workers = workers_of(jobs, cluster, quiet)
    if workers and workers.kind == "script":
        if trackers:
            raise NMBenchError("--track follows a run of this command; leave it out with --jobs script.")
        click.echo("\n".join(commands(spec, out)))
        return True
    results = done(spec, out, quiet, workers, fail_fast, trackers)
    names = ("records.jsonl", "run.log", "report.csv", "report.md", "masks", "weights", "losses", "errors")
    written = [name for name in names if (results.directories[0] / name).exists()]
    click.echo()
    print_table(results)
    click.echo(f"\n{results.directories[0]}: {', '.join(written)}")
    return all(record["status"] == "ok" for record in results.asked)


def content_of(config: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of a TOML file, and its table `[slurm]`, which decides no number."""
    from nmbench.plain_data import read_toml

    content = read_toml(config) if config else {}
    cluster = content.pop("slurm", {})
    if not isinstance(cluster, dict):
        raise NMBenchError(f"slurm in {config} must be a table; begin it with [slurm].")
    return content, cluster


def commands(spec: RunSpec, out: Path | None) -> list[str]:
    """The commands that do the jobs of a run one by one, for any scheduler."""
    from nmbench.workers.script import commands_of

    if out is None:
        raise NMBenchError("--jobs script: give --out DIR; the commands name it.")
    return commands_of(spec, out, loaded(spec.plugins))


def runs_from(content: Mapping[str, Any], flags: Mapping[str, Any], where: str) -> list[Run]:
    """Return the runs of a TOML file and the flags; a flag overrides the file, in every run of a grid."""
    from nmbench.plain_data import refuse_duplicates
    from nmbench.spec import MethodSpec, RunSpec, with_settings

    methods = [MethodSpec.parse(text) for text in flags["methods"]]
    others = {name: value for name, value in flags.items() if name not in ("methods", "settings", "pattern_for")}
    given = {name: value for name, value in others.items() if value not in (None, ())}
    given = {{"plugin_files": "plugins"}.get(name, name): value for name, value in given.items()}
    if flags["pattern_for"]:
        pairs = [(layers, pattern) for layers, _, pattern in (text.rpartition("=") for text in flags["pattern_for"])]
        refuse_duplicates("--pattern-for", [layers for layers, _ in pairs])
        given["pattern_for"] = dict(pairs)
    if methods:
        given["methods"] = {m.label: {"method": m.name} for m in methods}
        if len(given["methods"]) < len(methods):
            raise NMBenchError("two methods have one label; name them apart with --method LABEL=NAME.")
    runs = []
    for cell, folder in cells(content, given, where):
        if not cell.get("methods"):
            raise click.UsageError("give at least one --method NAME; `nmbench methods` lists them.")
        spec = RunSpec.from_dict(cell, where)
        spec = dataclasses.replace(spec, methods=with_settings(spec.methods, flags["settings"]))
        runs.append(Run(spec, folder))
    return runs
