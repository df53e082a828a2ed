"""The command `compare`. Heavy imports sit inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.options import SEED, command
from whisper_at_cli.extract.output import interval, print_json, print_notes, print_table, score

if TYPE_CHECKING:
    from whisper_at_cli.extract.evaluation.compare import Comparison

PAIRS_SHOWN = 15  # beyond, only those with the best


@command("compare")
@click.argument("inputs", nargs=-1, required=True, metavar="F.npz...")
@click.option("--metric", help="accuracy, mAP or bits.  [default: accuracy where every clip has one label, else mAP]")
@click.option("--draws", type=click.IntRange(min=100), help="Bootstrap draws.  [default: 10,000]")
@click.option("--chance", is_flag=True, help="Add a row for chance: a model that ignores the clips.")
@click.option(
    "--table", "form", help="Print all models in one table for a paper, without pairwise comparisons: text or markdown."
)
@SEED
def compare_command(
    inputs: tuple[str, ...], metric: str | None, draws: int | None, chance: bool, form: str | None, seed: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Compare layers, heads, caches and models by held-out predictions: differences with intervals, exact tests.

    Files are those of --predictions of `probe`, `train-head` and `evaluate`. F.npz:NAME takes one layer or head of a
    file, F.npz all. Clips are matched by id; those that not all files have are left out.

    \b
        whisper-at-cli probe esc10.zarr --predictions probe.npz
        whisper-at-cli train-head esc10.zarr --head wa-mlp --predictions wa-mlp.npz
        whisper-at-cli compare probe.npz:layer-4 wa-mlp.npz
        whisper-at-cli compare probe.npz --json
        whisper-at-cli compare probe.npz wa-mlp.npz --chance --table markdown
    """
    from whisper_at_cli.extract.evaluation.compare import compare, read_inputs

    if form not in (None, "text", "markdown"):
        raise UsageError(f"--table {form} is not known; choose text or markdown")
    found = compare(read_inputs(inputs), metric=metric, draws=draws, seed=seed, chance=chance)
    print_notes(found.warnings)
    if as_json:
        print_json(found)
    elif form == "markdown":
        click.echo(markdown(found))
    elif form:
        print_table(paper_rows(found), paper_header(found))
    else:
        print_comparison(found)


def paper_header(found: Comparison) -> tuple[str, ...]:
    return "model", f"{found.metric} (%)", "95 % interval", "p against the best"


def paper_rows(found: Comparison) -> list[tuple[str, str, str, str]]:
    """A row for each system, in percent; p is adjusted for all pairs."""
    return [
        (each["name"], percent(each["value"]), interval(each["ci95"], percent),
         p_best(found, each))
        for each in found.systems
    ]  # fmt: skip


def p_best(found: Comparison, system: dict) -> str:
    return "best" if system is _best(found) else p_value(system["p_best"])


def _best(found: Comparison) -> dict:
    return max(found.systems, key=lambda each: -1.0 if each["value"] is None else each["value"])


def markdown(found: Comparison) -> str:
    rows = [paper_header(found), ("---",) * 4, *paper_rows(found)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.1f}"


def print_comparison(found: Comparison) -> None:
    print_table(
        [
            (each["name"], score(each["value"]), interval(each["ci95"]), interval(each["band95"]), each["seeds"])
            for each in found.systems
        ],
        ("what", found.metric, "95 % interval", "95 % band of all", "seeds"),
    )
    pairs = found.pairs
    if len(pairs) > PAIRS_SHOWN:
        best = _best(found)["name"]
        pairs = [pair for pair in pairs if best in (pair["a"], pair["b"])]
    tests = dict.fromkeys(pair["test"] for pair in pairs)
    print_table(
        [
            (
                f"{pair['a']} - {pair['b']}", signed(pair["difference"]), interval(pair["ci95"], signed),
                p_value(pair["p"]), p_value(pair["p_adjusted"]),
            )
            for pair in pairs
        ],
        ("difference", found.metric, "95 % interval", f"p ({', '.join(tests)})", "p for all pairs"),
    )  # fmt: skip
    if len(pairs) < len(found.pairs):
        click.echo(f"{len(found.pairs) - len(pairs)} more pairs: --json has them all\n")
    click.echo(
        f"{found.clips} clips of {found.recordings} recordings, {found.draws:,} draws; p for all pairs is "
        "adjusted by max-t"
    )


def signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.4f}"


def p_value(p: float | None) -> str:
    return "undefined" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


COMMANDS = (compare_command,)
