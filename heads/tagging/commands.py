"""The commands of tagging: transcribe, tag. Heavy imports sit inside them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from textwrap import indent
from typing import Any

import click

from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.options import DEVICE, SEED, command
from whisper_at_cli.extract.output import print_notes, printable
from whisper_at_cli.extract.progress import progress_on_stderr
from whisper_at_cli.heads.options import Decorator, Function

FORMATS = ("json", "txt", "srt", "vtt", "rttm", "tsv", "html")
AUDIO = click.argument("audio", nargs=-1, required=True, type=click.Path(path_type=Path))
HEAD = click.option(
    "--head", required=True, type=click.Path(path_type=Path), help="The folder that `train-head --out` wrote."
)
MODEL = click.option("--model", help="The model that the head was trained on.  [default: the one that the head names]")


def _together(*options: Decorator) -> Decorator:
    """One decorator of several options, in this order."""

    def register(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return register


TAG_OPTIONS = _together(
    click.option(
        "--resolution", type=float, help="Seconds of a tag window.  [default: the length of the head's clips]"
    ),
    click.option("--hop", type=float, help="Seconds from one tag window to the next.  [default: the resolution]"),
    click.option("--threshold", default=0.25, show_default=True, help="Leave out labels of a lower probability."),
    click.option("--top", default=5, show_default=True, help="At most so many labels a window."),
    click.option("--all-labels", is_flag=True, help="Every label of every window, whatever --threshold and --top say."),
    click.option("--events", is_flag=True, help="Also find events: where a label begins and ends."),
    click.option("--on", default=0.5, show_default=True, help="An event begins at this probability."),
    click.option("--off", default=0.3, show_default=True, help="It ends below this one."),
    click.option("--min-duration", default=0.0, show_default=True, help="Seconds; drop shorter events."),
    click.option("--merge-gap", default=0.0, show_default=True, help="Seconds; events no further apart become one."),
)
WHISPER_OPTIONS = _together(
    click.option("--language", help="As en or English.  [default: detected]"),
    click.option("--task", type=click.Choice(["transcribe", "translate"]), default="transcribe", show_default=True,
                 help="Translate is into English."),
    click.option("--temperature", default="0,0.2,0.4,0.6,0.8,1", show_default=True,
                 help="Tried in turn until one is good enough; a single one means no fallback."),
    click.option("--beam-size", type=int, help="Beams at temperature 0.  [default: greedy]"),
    click.option("--best-of", type=int, help="Candidates at other temperatures.  [default: 1]"),
    click.option("--patience", type=float, help="Of beam search; needs --beam-size.  [default: 1]"),
    click.option("--length-penalty", type=float, help="0 to 1.  [default: by length]"),
    click.option("--suppress-tokens", default="-1", show_default=True, help="Token numbers that are never written."),
    click.option("--initial-prompt", help="Text before the first window, such as names to spell."),
    click.option("--carry-initial-prompt", is_flag=True, help="Before every window."),
    click.option("--condition-on-previous-text/--no-condition-on-previous-text", default=True, show_default=True,
                 help="Whether each window sees the text before it."),
    click.option("--compression-ratio-threshold", type=float, default=2.4, show_default=True,
                 help="More repetitive text than this is tried again at the next temperature."),
    click.option("--logprob-threshold", type=float, default=-1.0, show_default=True,
                 help="Less likely text than this is tried again."),
    click.option("--no-speech-threshold", type=float, default=0.6, show_default=True,
                 help="Above it, unlikely text is taken for silence."),
    click.option("--word-timestamps", is_flag=True, help="Times of each word."),
    click.option("--clip-timestamps", default="0", show_default=True, help="start,end,start,end,... in seconds."),
    click.option("--hallucination-silence-threshold", type=float,
                 help="Seconds; skip longer silence around what may be made up. Needs --word-timestamps."),
    click.option("--fp16/--no-fp16", default=True, show_default=True, help="Half precision, on a GPU."),
)  # fmt: skip


@command("transcribe")
@AUDIO
@HEAD
@MODEL
@TAG_OPTIONS
@click.option(
    "--tag-window",
    default="shared",
    show_default=True,
    help="shared: frames of the encoder pass that the text comes from; exact: encode each window again, un-padded.",
)
@WHISPER_OPTIONS
@click.option("--format", "form", type=click.Choice(FORMATS), default="txt", show_default=True, help="Of the output.")
@click.option("--out", type=click.Path(path_type=Path), help="A folder for one file per AUDIO.  [default: stdout]")
@SEED
@DEVICE
@click.pass_context
def transcribe_command(
    ctx: click.Context, /, audio: tuple[Path, ...], head: Path, model: str | None, form: str, out: Path | None,
    seed: int, device: str, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """What was said and what was heard in each AUDIO, with the encoder run once.

    The text is that of openai-whisper with the same options, character for character; a folder stands for the audio
    files in it. Each result appears as soon as it is there. With --out, the same command continues after an
    interruption.

    \b
        whisper-at-cli transcribe meeting.m4a --model tiny.en --head tagger
        whisper-at-cli transcribe meeting.m4a --head tagger --resolution 4.4 --events --json
    """
    from whisper_at_cli.extract.cache.store import LocalStore
    from whisper_at_cli.heads import Tagger
    from whisper_at_cli.heads.tagging.finished import Finished
    from whisper_at_cli.heads.tagging.tagger import audio_files

    form = "json" if as_json else form
    paths = audio_files(audio)
    places = _places(paths, out, form)
    options = _tag_options(options, events=form != "json")  # the other formats are made of events
    options["temperature"] = _temperatures(options["temperature"])
    tagger = Tagger.from_checkpoint(head, model=model, device=device)
    kept = Finished(out, head, options | {"model": model, "seed": seed, "form": form}) if out else None
    printer = _Printer(form, several=len(paths) > 1)
    failed = again = 0
    for path, place in zip(paths, places, strict=True):
        if kept and place and kept.has(path, place):
            again += 1
            click.echo(str(place))
            continue
        try:
            with progress_on_stderr(f"transcribe {printable(path.name)}", "s", quiet=ctx.obj["quiet"]) as progress:
                result = tagger.transcribe(path, seed=seed, progress=progress, **options)
        except UsageError:
            raise
        except WhisperATError as error:
            if len(paths) == 1:
                raise
            failed += 1
            click.echo(f"failed: {' '.join(str(error).split())}", err=True)
            continue
        if kept and out and place:
            LocalStore(out).write_whole(place.name, [_as_text(result, form, out).encode()])
            kept.add(path, place)
            click.echo(str(place))
        else:
            printer.add(result)
    if out is None:
        printer.end()
    if again:
        print_notes(
            [f"{again} of {len(paths)} files were there from an earlier run of this command; delete them to redo"]
        )
    if failed:
        ctx.exit(1)


@command("tag")
@AUDIO
@HEAD
@MODEL
@TAG_OPTIONS
@click.option(
    "--precision", default="auto", show_default=True,
    help="Arithmetic: float32, bfloat16, float16 or auto, which is float16 on CUDA and float32 elsewhere.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="A file for the lines.  [default: stdout]")
@DEVICE
@click.pass_context
def tag_command(
    ctx: click.Context, /, audio: tuple[Path, ...], head: Path, model: str | None, precision: str, out: Path | None,
    device: str, as_json: bool, **options: Any,  # noqa: ARG001 - its lines are JSON in any case
) -> None:  # fmt: skip
    """What was heard in each AUDIO, without text: one line of JSON a file (path, tags, events), with --json or without.

    A folder stands for the audio files in it. A file that cannot be read has its error on its line, and exit status
    is 1.

    \b
        whisper-at-cli tag recordings --head tagger > tags.jsonl
        whisper-at-cli tag rain.wav --model tiny.en --head tagger --resolution 2 --hop 1 --events
    """
    from whisper_at_cli.heads import Tagger
    from whisper_at_cli.heads.tagging.tagger import audio_files

    paths = audio_files(audio)
    options = _tag_options(options)
    tagger = Tagger.from_checkpoint(head, model=model, device=device, precision=precision)
    failed = 0
    with ExitStack() as stack:
        stream = stack.enter_context(open(out, "w")) if out else None
        progress = stack.enter_context(progress_on_stderr("tag", "files", quiet=ctx.obj["quiet"]))
        for result in tagger.tag(paths, progress=progress, **options):
            if "error" in result:
                failed += 1
                click.echo(f"failed: {printable(result['path'])}: {result['error']}", err=True)
            click.echo(json.dumps(result), file=stream)
    if failed:
        ctx.exit(1)


def _tag_options(options: dict, *, events: bool = False) -> dict:
    """Options as the library takes them: those of events in one, or none unless they are asked for."""
    from whisper_at_cli.heads.tagging.events import EventSettings

    names = ("on", "off", "min_duration", "merge_gap")
    settings = EventSettings(**{name: options.pop(name) for name in names})
    return options | {"events": settings if options.pop("events") or events else None}


def _temperatures(text: str) -> float | tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"temperature {text!r} is not numbers with commas between them, such as 0,0.2,0.4") from error
    return found[0] if len(found) == 1 else found


def _as_text(result: dict, form: str, folder: Path) -> str:
    """A result in one of FORMATS, for a file in `folder` or for stdout."""
    if form == "html":
        from whisper_at_cli.heads.tagging.page import render_page

        return render_page(result, result["audio"], folder=folder)
    from whisper_at_cli.heads.tagging.captions import write_captions

    return write_captions(result, form)


def _places(paths: list[Path], out: Path | None, form: str) -> list[Path | None]:
    """Where each result goes; None is stdout. Raises UsageError where two would go to one file."""
    from whisper_at_cli.extract.folders import writable_folder

    if out is None:
        if form == "html" and len(paths) > 1:
            raise UsageError(f"{len(paths)} pages cannot go to one place: give --out FOLDER")
        return [None] * len(paths)
    places: list[Path | None] = [out / f"{path.stem}.{form}" for path in paths]
    double = sorted({str(place) for place in places if places.count(place) > 1})
    if double:
        raise UsageError(f"several files would become {double[0]}: transcribe them into folders of their own")
    writable_folder(out)
    return places


class _Printer:
    """Prints each result as soon as it is there; of several as JSON, one array."""

    def __init__(self, form: str, *, several: bool):
        self.form, self.several, self.count = form, several, 0

    def add(self, result: dict) -> None:
        self.count += 1
        if self.form == "json":
            text = json.dumps(result, indent=1)
            start = "[\n" if self.count == 1 else ",\n"
            click.echo(start + indent(text, " ") if self.several else text, nl=not self.several)
            return
        title = f"{printable(result['audio'])}\n" if self.several else ""
        click.echo(title + _as_text(result, self.form, Path()).rstrip("\n") + "\n" * self.several)

    def end(self) -> None:
        if self.form == "json" and self.several:
            click.echo("\n]" if self.count else "[]")


COMMANDS = (transcribe_command, tag_command)
