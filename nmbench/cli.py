"""The command line: parse, call, print. No logic lives here, and `nmbench --help` imports no torch."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmbench import commands
from nmbench.errors import NMBenchError
from nmbench.scaffold import KINDS, new_plugin

if TYPE_CHECKING:
    from nmbench.plugins import PluginInfo, Plugins
    from nmbench.spec import RunSpec

INTERRUPTED = 130


class Commands(click.Group):
    """Turns errors the user can fix into one line and exit status 1, and Ctrl-C into 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NMBenchError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("\nInterrupted; nothing finished is lost. The same command goes on from here.", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="nmbench")
def main() -> None:
    """Compare strict N:M pruning methods (keep N of every M consecutive weights) on language models."""


plugin_option = click.option(
    "--plugin", "plugin_files", multiple=True, metavar="FILE", help="Load a plugin from FILE.py."
)


@main.command()
@click.option("--method", "methods", multiple=True, metavar="NAME|LABEL=NAME", help="A method; repeat to compare.")
@click.option("--set", "settings", multiple=True, metavar="LABEL.OPTION=VALUE", help="An option of a method.")
@click.option("--model", metavar="REF", help="demo, hf:ORG/NAME[@REVISION], a folder, gguf:FILE, tiny:FAMILY.  [demo]")
@click.option(
    "--pattern", "patterns", multiple=True, metavar="N:M", help="Keep N of every M weights; repeatable.  [2:4]"
)
@click.option("--pattern-for", multiple=True, metavar="LAYERS=N:M", help="Another pattern for layers, as 'mlp.*=4:8'.")
@click.option("--skip", multiple=True, metavar="LAYERS", help="Leave layers dense, as 'q_proj' or 'layers.0.*'.")
@click.option("--seed", "seeds", multiple=True, type=click.IntRange(min=0), help="Repeatable.  [0]")
@click.option("--calibration", metavar="DATA", help="demo, c4, wikitext2, text:FILE or jsonl:FILE.")
@click.option("--windows", type=click.IntRange(min=1), help="Calibration windows for statistics.")
@click.option("--window-tokens", type=click.IntRange(min=2), help="Tokens in a calibration window.")
@click.option("--pool-tokens", type=click.IntRange(min=1), help="Tokens that mask learners may learn from.")
@click.option("--selection-tokens", type=click.IntRange(min=1), help="Tokens that mask learners may choose by.")
@click.option("--metric", "metrics", multiple=True, metavar="METRIC", help="As ppl:wikitext2@2048; repeatable.")
@click.option("--device", metavar="auto|cpu|cuda", help="auto takes a CUDA GPU where there is one.  [auto]")
@click.option("--stream/--no-stream", default=None, help="Bring decoder blocks to the device one by one.  [if needed]")
@click.option("--dtype", metavar="DTYPE", help="Load and prune in this dtype (float32, bfloat16, float16).")
@click.option("--eval-dtype", metavar="DTYPE", help="Evaluate in this dtype.  [the pruning dtype]")
@click.option("--trust-remote-code", is_flag=True, default=None, help="Let the model run its own code from the hub.")
@click.option("--allow-sparse", is_flag=True, default=None, help="Prune a checkpoint that is sparse already.")
@click.option("--dequantise", is_flag=True, default=None, help="Make the weights of a quantised checkpoint numbers.")
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="A TOML file, as DIR/spec.toml.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Run directory.  [runs/PROTOCOL]")
@click.option("--quiet", is_flag=True, help="No progress, only the table.")
@plugin_option
def run(config: Path | None, out: Path | None, quiet: bool, **flags: Any) -> None:
    """Prune, prove strict, evaluate, compare. The same command resumes; more methods, patterns or seeds extend it."""
    from nmbench.plugins import load_plugins
    from nmbench.progress import ProgressPrinter

    spec = spec_from(config, flags)
    plugins = load_plugins(spec.plugins)
    tell_broken_files(plugins)
    if not quiet:
        plugins.add_observer(ProgressPrinter(), "progress")
    from nmbench.run import run as run_spec
    from nmbench.table import render

    results = run_spec(spec, out, plugins)
    write_reports(plugins, results, results.directories[0], ("csv", "markdown"))
    names = ("records.jsonl", "report.csv", "report.md", "masks", "losses", "errors")
    there = [name for name in names if (results.directories[0] / name).exists()]
    click.echo(f"\n{render(results, terminal_width())}\n\n{results.directories[0]}: {', '.join(there)}")
    if any(record["status"] != "ok" for record in results.asked):
        sys.exit(1)


def spec_from(config: Path | None, flags: dict[str, Any]) -> RunSpec:
    """The specification that a TOML file and the flags make together; flags win."""
    from nmbench.spec import MethodSpec, RunSpec, read_toml, refuse_duplicates, with_settings

    content = read_toml(config) if config else {}
    methods = [MethodSpec.parse(text) for text in flags.pop("methods")]
    settings, special = flags.pop("settings"), flags.pop("pattern_for")
    if not methods and not content.get("methods"):
        raise click.UsageError("give at least one --method NAME; `nmbench methods` lists them.")
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    given = {{"plugin_files": "plugins"}.get(name, name): value for name, value in given.items()}
    if special:
        pairs = [(layers, pattern) for layers, _, pattern in (text.rpartition("=") for text in special)]
        refuse_duplicates("--pattern-for", [layers for layers, _ in pairs])
        given["pattern_for"] = dict(pairs)
    if methods:
        given["methods"] = {m.label: {"method": m.name} for m in methods}
        if len(given["methods"]) < len(methods):
            raise NMBenchError("two methods have one label; name them apart with --method LABEL=NAME.")
    spec = RunSpec.from_dict({**content, **given}, str(config) if config else "the flags")
    return dataclasses.replace(spec, methods=with_settings(spec.methods, settings))


@main.command("methods")
@click.argument("name", required=False)
@plugin_option
def methods_command(name: str | None, plugin_files: Sequence[str]) -> None:
    """List the methods, or show the options of one."""
    from nmbench.plugins import load_plugins

    plugins = load_plugins(plugin_files)
    tell_broken_files(plugins)
    if name is None:
        for entry in plugins.registries.methods:
            click.echo(f"{entry.name:<12} {kind_of(entry.obj):<13} {summary(entry.obj)}  ({entry.origin})")
        return
    cls = plugins.lookup(plugins.registries.methods, name)
    click.echo(f"{name}: {kind_of(cls)} of {plugins.registries.methods.entries[name].origin}\n{summary(cls)}\n")
    click.echo(options_text(name, cls))


def options_text(name: str, cls: Any) -> str:
    """The options of a method, one a line, as `--set` takes them."""
    from nmbench.options import describe
    from nmbench.pattern import Pattern

    lines = []
    for info in describe(cls):
        choices = f"; one of {', '.join(map(str, info.choices))}" if info.choices else ""
        unit = f" [{info.unit}]" if info.unit else ""
        default = "none" if info.default is None else info.default
        lines.append(f"  --set {name}.{info.name}={default}  ({info.type}){unit} {info.help}{choices}")
    for preset, values in cls.presets.items():
        listed = ", ".join(f"{key}={value}" for key, value in values.items())
        lines.append(f"  --set {name}.preset={preset}  sets {listed}")
    usual = [Pattern(1, 2), Pattern(1, 4), Pattern(2, 4), Pattern(4, 8), Pattern(8, 16), Pattern(16, 32)]
    supported = [str(pattern) for pattern in usual if cls().supports(pattern) is None]
    return "\n".join([*(lines or ["  no options"]), f"  patterns: {', '.join(supported)} and others alike"])


def kind_of(cls: Any) -> str:
    """The kind of a method, as the documentation names it."""
    from nmbench.methods import MaskLearner, MaskSource, Refiner, Scorer, Solver

    kinds = {Scorer: "scorer", Solver: "solver", Refiner: "refiner", MaskLearner: "mask learner"}
    kinds[MaskSource] = "mask source"
    return next((word for base, word in kinds.items() if issubclass(cls, base)), "baseline")


def summary(cls: Any) -> str:
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


@main.command("plugins")
@plugin_option
def plugins_command(plugin_files: Sequence[str]) -> None:
    """List every plugin: where it comes from, its hooks and what it registers, or why it failed."""
    from nmbench.hookspecs import HOOKS_VERSION
    from nmbench.plugins import load_plugins
    from nmbench.testing import KIT_VERSION

    plugins = load_plugins(plugin_files)
    for info in plugins.infos:
        click.echo(f"{info.name}: {state_of(info)}")
        for text in info.deprecations:
            click.echo(f"  deprecated: {text}")
    click.echo(f"hooks {HOOKS_VERSION}, test kit {KIT_VERSION}")
    if plugins.failures:
        sys.exit(1)


def state_of(info: PluginInfo) -> str:
    """What has become of a plugin."""
    if info.failure:
        return f"FAILED at {info.failure}"
    brings = f"; brings {', '.join(info.registered)}" if info.registered else ""
    return "disabled" if info.disabled else f"{', '.join(info.hooks)}{brings}"


@main.command()
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--format", "formats", multiple=True, metavar="NAME", help="Also write report files, as csv or json.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where to write them.  [the directory]")
@plugin_option
def report(directories: Sequence[Path], formats: Sequence[str], out: Path | None, plugin_files: Sequence[str]) -> None:
    """Print the table of one or more run directories again, and write it in other formats."""
    from nmbench.plugins import load_plugins
    from nmbench.results import load_results
    from nmbench.table import render

    results, plugins = load_results(*directories), load_plugins(plugin_files)
    tell_broken_files(plugins)
    click.echo(render(results, terminal_width()))
    for path in write_reports(plugins, results, out or directories[0], formats):
        click.echo(f"wrote {path}")


@main.command()
@click.option("--model", metavar="REF", default="demo", show_default=True, help="As for `nmbench run`.")
@click.option("--pattern", default="2:4", metavar="N:M", show_default=True, help="Prune to N:M, by magnitude.")
@click.option("--tokens", multiple=True, type=click.IntRange(min=1), help="Tokens in a product.  [1, 16, 2048]")
@click.option("--dtype", metavar="DTYPE", help="float16 or bfloat16.  [bfloat16]")
@click.option("--trust-remote-code", is_flag=True, help="Let the model run its own code from the hub.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@plugin_option
def speed(as_json: bool, tokens: Sequence[int], **flags: Any) -> None:
    """Time 2:4 sparse against dense: the products of the model's layers, and the whole model. Needs an NVIDIA GPU."""
    import json

    from nmbench.speed.command import speed_of
    from nmbench.speed.report import render

    counts = tuple(dict.fromkeys(tokens)) or (1, 16, 2048)
    found = speed_of(tokens=counts, report=lambda line: click.echo(f"timing {line}", err=True), **flags)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else render(found))


@main.command("new-plugin")
@click.argument("name")
@click.option("--kind", type=click.Choice(list(KINDS)), default="scorer", show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=".", help="Where.  [this folder]")
def new_plugin_command(name: str, kind: str, out: Path) -> None:
    """Write a package with a method or metric NAME that builds, installs and passes its own tests."""
    from nmbench.plugins import load_plugins

    registries = load_plugins().registries
    taken = (registries.metrics if KINDS[kind].registers == "metric" else registries.methods).entries.get(name)
    files = new_plugin(name, kind, out, taken.origin if taken else None)
    folder = out / f"nmbench-{name}"
    click.echo("\n".join(f"wrote {path}" for path in files))
    click.echo(f"\nNext: cd {folder} && pip install -e '.[test]' && pytest && {KINDS[kind].show.replace('NAME', name)}")


def terminal_width() -> int | None:
    """How many columns the terminal has; None where the output goes elsewhere, and nothing may be left out of it."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def tell_broken_files(plugins: Plugins) -> None:
    """A plugin that fails stops nobody; but whoever named its file should know at once."""
    for line in plugins.broken_files:
        click.echo(f"WARNING {line}", err=True)


def write_reports(plugins: Plugins, results: Any, directory: Path, formats: Sequence[str]) -> list[Path]:
    """Write the reports named."""
    reporters = [
        plugins.lookup(plugins.registries.reporters, name) for name in formats
    ]  # all are there, or none writes
    directory.mkdir(parents=True, exist_ok=True)
    return [reporter().write(results, directory) for reporter in reporters]


for command in (commands.validate, commands.diff, commands.export):
    main.add_command(command)


if __name__ == "__main__":
    main()
