"""The command `report`. Heavy imports sit inside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.options import DEVICE, SEED, command
from whisper_at_cli.extract.output import print_json, print_notes, print_table, score
from whisper_at_cli.extract.progress import progress_on_stderr

if TYPE_CHECKING:
    from whisper_at_cli.probe.report.page import Source

JSON_FILE = click.Path(path_type=Path, dir_okay=False)


@command("report")
@click.argument("sources", nargs=-1, metavar="CACHE...")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The page to write (.html)."
)
@click.option(
    "--robustness", "robustness", multiple=True, type=JSON_FILE, help="A result of `robustness --json`; repeatable."
)
@click.option(
    "--head", "heads", multiple=True, type=JSON_FILE,
    help="A result of `train-head --json` or `evaluate --json`; repeatable.",
)  # fmt: skip
@click.option(
    "--predictions",
    multiple=True,
    metavar="F.npz",
    help="Held-out predictions (of probe, train-head or evaluate) for one table of all, with chance; repeatable.",
)
@click.option("--title", help="The page's heading.  [default: Probe report]")
@SEED
@DEVICE
@click.pass_context
def report_command(
    ctx: click.Context, sources: tuple[str, ...], out: Path, robustness: tuple[Path, ...], heads: tuple[Path, ...],
    predictions: tuple[str, ...], title: str | None, seed: int, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Write one self-contained HTML page about the layers of each CACHE: charts, classes, confusion, provenance.

    A CACHE is probed, layer by layer, as by `probe CACHE --layer all`; a file that ends in .json is taken as the
    result of `probe --json`. With --robustness and --head the page also shows WER against SNR, its increase against
    the class-wise F1 of the same model, and heads.

    \b
        whisper-at-cli report esc50.zarr --out report.html
        whisper-at-cli report tiny.zarr base.json --robustness tiny.en.json --head tagger.json --out report.html
    """
    from whisper_at_cli.extract.cache.store import LocalStore
    from whisper_at_cli.extract.evaluation.compare import compare, read_inputs
    from whisper_at_cli.probe.report.page import render_report, report_numbers

    if not (sources or robustness or heads or predictions):
        raise UsageError(
            "nothing to report on; give a CACHE, a result of `probe --json`, --robustness, --head or --predictions"
        )
    noisy = [_read(path, "robustness --json", _is_robustness) for path in robustness]
    trained = [_read(path, "train-head --json` or `evaluate --json", _is_head) for path in heads]
    probes = [_probe(source, seed=seed, device=device, quiet=ctx.obj["quiet"]) for source in sources]
    compared = compare(read_inputs(predictions), seed=seed, chance=True) if predictions else None
    page = render_report(probes, noisy, trained, compared=compared, title=title or "").encode()
    LocalStore(out.parent).write_whole(out.name, [page])
    print_notes(compared.warnings if compared else [])
    for probe in probes:
        print_notes(probe.result.get("warnings") or [])
    numbers = {"report": str(out), "bytes": len(page)} | report_numbers(probes, noisy, trained)
    numbers["compared"] = compared.systems if compared else []
    if as_json:
        print_json(numbers)
        return
    rows = [(p["name"], p["best_layer"] or "undefined", p["metric"], score(p["value"])) for p in numbers["probes"]]
    if rows:
        print_table(rows, ("probe", "best layer", "metric", "value"))
    click.echo(f"report: {out} ({len(page) / 1e6:.2f} MB)")


def _probe(source: str, *, seed: int, device: str, quiet: bool) -> Source:
    """The probe of a cache, made now or read."""
    from whisper_at_cli.probe.report.page import Source

    if source.endswith(".json"):
        return _read(Path(source), "probe --json", _is_probe)
    from whisper_at_cli.extract import FeatureCache
    from whisper_at_cli.extract.cache.summary import summarise
    from whisper_at_cli.probe import probe_layers

    opened = FeatureCache.open(source if "://" in source else Path(source))
    with progress_on_stderr(f"probe {Path(source).name}", "layers", quiet=quiet) as progress:
        result = probe_layers(opened, seed=seed, device=device, progress=progress)
    return Source(source, asdict(result), summarise(source))


def _read(path: Path, command: str, fits: Callable[[dict], bool]) -> Source:
    """A result from a file. Raises UsageError for a file that is not there, not JSON, or something else's JSON."""
    from whisper_at_cli.probe.report.page import Source

    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; make it with: whisper-at-cli {command} > {path.name}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}); give the output of `{command}`") from None
    try:
        fitting = fits(result)
    except (KeyError, TypeError, AttributeError, IndexError):
        fitting = False
    if not fitting:
        raise UsageError(f"{path} is JSON, but not that of `{command}`; give the output of that command")
    return Source(str(path), result)


def _is_probe(result: dict) -> bool:
    metric = result.get("metric", "accuracy")
    return (
        metric in ("accuracy", "mAP")
        and all({"layer", metric} <= set(row) for row in result["layers"])
        and bool(result["layers"])
    )


def _is_robustness(result: dict) -> bool:
    return all({"snr", "wer"} <= set(level) for level in result["results"]) and bool(result["results"])


def _is_head(result: dict) -> bool:
    return "value" in result or "mAP" in result or "accuracy" in result


COMMANDS = (report_command,)
