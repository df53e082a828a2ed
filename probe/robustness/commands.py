"""The command of noise robustness. Heavy imports sit inside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.options import DEVICE, command
from whisper_at_cli.extract.output import print_json, print_notes, print_table, printable, score
from whisper_at_cli.extract.progress import progress_on_stderr

if TYPE_CHECKING:
    from whisper_at_cli.probe.robustness.measure import RobustnessReport, Skip

SKIPS_SHOWN = 20


@command("robustness")
@click.option(
    "--speech", type=click.Path(path_type=Path), required=True,
    help="Folder of speech: LibriSpeech's layout, or manifest.csv with the columns audio and text.",
)  # fmt: skip
@click.option(
    "--noise", type=click.Path(path_type=Path), required=True,
    help="Dataset of noise in classes: ESC-50's layout, a folder per class, or whatever `extract` reads with labels.",
)  # fmt: skip
@click.option("--noise-format", default="auto", show_default=True, help="Layout of the noise, as extract's --format.")
@click.option(
    "--model", required=True,
    help="Whisper, in every form that `extract` takes; or a CTC model of transformers, as a folder or a hub name.",
)  # fmt: skip
@click.option("--snr", "snrs", type=float, multiple=True, help="Decibels; repeatable.  [default: 20, 15, ... -20]")
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="Folder for transcripts and results.json; continued if it exists.  [default: robustness/MODEL]",
)  # fmt: skip
@click.option("--utterances", default=40, show_default=True, help="The first so many, sorted by path.")
@click.option(
    "--clips-per-class", type=int, help="Mixtures per class and SNR.  [default: as many as utterances, at most 40]"
)
@click.option(
    "--mixing", default="exact", show_default=True,
    help="exact: each mixture has its SNR, unclipped; paper: level of the whole clip, 16-bit clipping for Whisper.",
)  # fmt: skip
@click.option("--language", default="en", show_default=True, help="Of the speech; for multilingual models.")
@click.option(
    "--greedy", is_flag=True,
    help="Decode Whisper at temperature 0 only.  [default: with temperature fallback, as in the paper]",
)  # fmt: skip
@click.option("--batch-size", default="auto", show_default=True, help="Utterances decoded together.")
@DEVICE
@click.pass_context
def robustness_command(
    ctx: click.Context, /, as_json: bool, batch_size: str, noise_format: str, **options: Any
) -> None:
    """Mix speech with noise, transcribe it, and print the word error rate at each SNR and for each class of noise.

    Utterance i is mixed with clip i of every class. Transcripts are kept in --out: the same command continues a run
    that was stopped, and more SNRs or utterances add to what is there.

    \b
        whisper-at-cli robustness --speech LibriSpeech/test-clean --noise ESC-50 --model tiny.en
        whisper-at-cli robustness --speech speech --noise ESC-50 --model tiny.en --snr 20 --snr -10 --out noisy
    """
    from whisper_at_cli.probe.robustness.measure import PAPER_SNRS, measure_robustness

    options["snrs"] = options["snrs"] or PAPER_SNRS
    with progress_on_stderr("robustness", "utterances", quiet=ctx.obj["quiet"]) as progress:
        report = measure_robustness(
            **options, batch_size=_batch_size(batch_size), format=noise_format, progress=progress
        )
    print_notes(report.notes)
    _print_skips(report.skipped)
    if as_json:
        print_json(report)
    else:
        print_robustness(report)
    if report.failed:
        ctx.exit(1)


def _batch_size(value: str) -> int | None:
    if value == "auto":
        return None
    if not value.lstrip("-").isdecimal():
        raise UsageError(f"--batch-size {value} is neither a number nor 'auto'")
    return int(value)


def _print_skips(skips: Sequence[Skip]) -> None:
    for skip in skips[:SKIPS_SHOWN]:
        click.echo(f"{'failed' if skip.failed else 'skipped'}: {printable(skip.what)}: {skip.reason}", err=True)
    if len(skips) > SKIPS_SHOWN:
        click.echo(f"... and {len(skips) - SKIPS_SHOWN} more; all are in results.json", err=True)


def print_robustness(report: RobustnessReport) -> None:
    """WER at each SNR, then of each class, both after Whisper's normaliser; the paper's scoring beside the first."""
    header: tuple[str, ...] = ("SNR", "WER", "WER (paper)", "utterances", "mixtures", "skipped")
    rows: list[tuple[object, ...]] = [
        ("clean", score(report.clean.wer), score(report.clean.wer_paper), report.clean.utterances, "", "")
    ]
    rows += [
        (f"{level.snr:g} dB", score(level.wer), score(level.wer_paper), level.utterances, level.mixtures, level.skipped)
        for level in report.results
    ]
    print_table(rows, header)
    names = list(report.results[0].class_wer)
    header = ("noise", *(f"{level.snr:g} dB" for level in report.results))
    print_table([(name, *(score(level.class_wer[name]) for level in report.results)) for name in names], header)


COMMANDS = (robustness_command,)
