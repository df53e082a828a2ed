"""The commands of stage 1: extract, info, notes, verify, export, import. Heavy imports sit inside them."""

from __future__ import annotations

import math
import os
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from whisper_at_cli.extract.errors import MISSING, UsageError
from whisper_at_cli.extract.notes import AGAIN_IN_FLOAT32
from whisper_at_cli.extract.options import CACHE, DATASET, command
from whisper_at_cli.extract.output import plain, print_json, print_notes, print_table, printable
from whisper_at_cli.extract.progress import progress_on_stderr

if TYPE_CHECKING:
    from whisper_at_cli.extract.pipeline.local import ExtractReport
    from whisper_at_cli.extract.pipeline.options import ExtractOptions

DEVICES = click.option(
    "--device", default="auto", show_default=True, help="cuda, mps or cpu, or several: cuda:0,cuda:1."
)
FORMAT = click.option(
    "--format",
    default="auto",
    show_default=True,
    help="Dataset layout: audioset, esc50, fsd50k, urbansound8k, speech-commands, vggsound, hdf5, huggingface, json, "
    "lhotse, manifest, tar or folder; auto detects it.",
)
LABELS = click.option(
    "--labels",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File that lists the classes, such as class_labels_indices.csv.  [default: the one beside the dataset]",
)
FAILURES_SHOWN = 20


@command("extract")
@DATASET
@CACHE
@click.option(
    "--model",
    required=True,
    help="An OpenAI name (tiny.en ... large-v3, turbo); a .pt file; a CTranslate2 or Hugging Face folder of a Whisper; "
    "a Hugging Face folder of a wav2vec 2.0, HuBERT, WavLM or data2vec-audio; a name on the Hugging Face hub; a "
    "backbone of your own, as module:function or by its entry point; or a control: random:tiny.en (random weights) or "
    "log-mel.",
)
@click.option("--seed", type=click.IntRange(min=0), help="With --model random:SIZE only.  [default: 0]")
@FORMAT
@LABELS
@click.option("--window", type=float, help="Cut every file into clips of this many seconds.")
@click.option("--hop", type=float, help="Seconds from one window to the next.  [default: the window's length]")
@click.option("--limit", type=int, help="Extract only the first N clips of the dataset.", metavar="N")
@click.option(
    "--dry-run", is_flag=True,
    help="Make no cache: print how many clips and hours there are, the cache's size, and the time that encoding takes.",
)  # fmt: skip
@click.option("--clip-seconds", type=float, help="Cut or pad clips to this length.  [default: the dataset's; else 10]")
@click.option("--dtype", default="float16", show_default=True, help="Storage type: float16, float32 or int8.")
@click.option(
    "--precision", default="auto", show_default=True,
    help="Arithmetic: float32, bfloat16, float16 or auto, which is float16 on CUDA and float32 elsewhere.",
)  # fmt: skip
@click.option("--batch-size", default="auto", show_default=True, help="Clips encoded together; auto finds what fits.")
@click.option("--workers", type=int, help="Processes that decode audio.  [default: cores divided by devices]")
@click.option("--shard-mb", type=float, default=128, show_default=True, help="Size of each shard file in a new cache.")
@click.option(
    "--shard", default="1/1", show_default=True, metavar="I/N",
    help="Do every N-th shard, the I-th of each N; auto reads the task number of a SLURM array.",
)  # fmt: skip
@click.option("--engine", default="local", show_default=True, help="local: this machine; ray: a Ray cluster.")
@click.option("--address", help="Ray cluster: auto, HOST:PORT or ray://...  [default: RAY_ADDRESS, else this machine]")
@click.option(
    "--encoders", type=int, help="With ray: the largest number of encoders.  [default: one per GPU, else one per core]"
)
@click.option("--compile", is_flag=True, help="Run torch.compile first; GPUs only, for long runs in float32.")
@click.option("--repair", is_flag=True, help="Also redo clips that failed or that `verify` finds damaged.")
@click.option("--update", is_flag=True, help="Also redo clips whose audio file has changed.")
@click.option("--prune", is_flag=True, help="Drop clips from CACHE that DATASET no longer has.")
@DEVICES
@click.pass_context
def extract_command(
    ctx: click.Context, /, dataset: Path | str, cache: Path | str, as_json: bool, shard: str, batch_size: str,
    seed: int | None, dry_run: bool, engine: str, address: str | None, encoders: int | None, **given: Any,
) -> None:  # fmt: skip
    """Run a frozen encoder over DATASET once; store every layer, pooled to 25 frames, in CACHE.

    DATASET is a folder or file in one of the layouts that docs/datasets.md describes: AudioSet, ESC-50, FSD50K,
    UrbanSound8K, Speech Commands, a folder per class, a CSV or JSONL manifest, the JSON data files of AST, an HDF5 pack
    of waveforms, a Hugging Face dataset on disk, tar shards, lhotse cuts. If CACHE exists, the same command continues
    it. A clip that cannot be read is reported and marked failed.

    If DATASET has changed, CACHE is updated: new clips are added, and labels, folds and splits are replaced. Clips that
    were removed are an error without --prune, and clips whose audio has changed without --update.

    \b
        whisper-at-cli extract ESC-50 esc50.zarr --model tiny.en
        whisper-at-cli extract my-sounds sounds.zarr --model large-v1 --clip-seconds 5 --device cuda
        whisper-at-cli extract ESC-50 hubert.zarr --model facebook/hubert-xlarge-ll60k
        whisper-at-cli extract field-recordings.csv field.zarr --model tiny.en --window 10 --hop 5
        whisper-at-cli extract 'shards/train-{000..001}.tar' shards.zarr --model tiny.en
    """
    from whisper_at_cli.extract.pipeline.options import ExtractOptions

    given |= {"shard": _slot(shard), "batch_size": _batch_size(batch_size)}
    if seed is not None:
        from whisper_at_cli.extract.backbones.controls import with_seed

        given["model"] = with_seed(given["model"], seed)
    options = ExtractOptions(**given)
    if dry_run:
        if engine != "local" or "," in options.device:
            raise UsageError("--dry-run is for --engine local and one device")
        _print_plan(dataset, cache, options, as_json)
        return
    run = _engine(options, engine=engine, address=address, encoders=encoders)
    with progress_on_stderr("extract", "clips", quiet=ctx.obj["quiet"]) as progress:
        report = run(dataset, cache, options, progress=progress, notify=lambda note: print_notes([note]))
    if report.redone_in_float32:
        print_notes([AGAIN_IN_FLOAT32(clips=report.redone_in_float32)])
    _print_first([f"note: {printable(noted.path)}: {noted.note}" for noted in report.clip_notes], "note", cache)
    _print_failures(
        [asdict(failure) for failure in report.failures], cache, "" if report.missing_expected else report.root
    )
    if as_json:
        print_json(report)
    else:
        if report.missing:
            there, share = report.clips - report.missing, 100 * report.coverage
            click.echo(f"{there:,} of {report.clips:,} listed clips are there ({share:.1f} %)")
        click.echo(
            f"{report.cache}: {report.written} clips written, {report.skipped} were there, {report.failed} failed; "
            f"{report.seconds:.1f} s, {report.clips_per_second:.1f} clips/s, "
            f"encoder busy {report.encoder_busy:.0%} of the time"
        )
    if not report.ok:
        ctx.exit(1)


def _print_plan(dataset: Path | str, cache: Path | str, options: ExtractOptions, as_json: bool) -> None:
    """What `extract` would do with these options."""
    from whisper_at_cli.extract.pipeline.plan import plan_extraction

    plan = plan_extraction(dataset, cache, options)
    if as_json:
        print_json(plan)
        return
    print_notes(plan.notes)
    known = asdict(plan)
    del known["notes"]
    if not plan.exists:
        del known["done"], known["changed"]
    elif not plan.changed:
        known["changed"] = "nothing"
    print_table([(name.replace("_", " "), plain(value)) for name, value in known.items()], ("what", "value"))


@command("info")
@CACHE
def info_command(cache: Path | str, as_json: bool) -> None:
    """What is in CACHE: how it was made, how much of it is done, which clips failed.

    \b
        whisper-at-cli info esc50.zarr
    """
    from whisper_at_cli.extract.cache.summary import summarise

    summary = summarise(cache)
    if as_json:
        print_json(summary)
        return
    failures, notes, made, slots = (summary.pop(name) for name in ("failures", "notes", "made", "slots"))
    said = made.pop("notes", [])
    summary |= {f"made: {name}": value for name, value in made.items()}
    print_table([(name.replace("_", " "), plain(value)) for name, value in summary.items()], ("what", "value"))
    if len(slots) > 1:
        columns = ("shard", "clips", "done", "failed", "pending", "running")
        print_table([[plain(slot[name]) for name in columns] for slot in slots], columns)
    for note in said:
        click.echo(f"note: {note}")
    for failure in failures:
        click.echo(f"failed: {printable(failure['path'])}: {failure['error']}")
    for noted in notes:
        click.echo(f"note: {printable(noted['path'])}: {noted['note']}")


@command("notes")
def notes_command(as_json: bool) -> None:
    """List every note that `extract` can give, and what each means.

    \b
        whisper-at-cli notes
    """
    from whisper_at_cli.extract.notes import NOTES

    if as_json:
        print_json({"notes": [asdict(note) for note in NOTES.values()]})
        return
    for note in NOTES.values():
        click.echo(f"{note.id}\n    note: {note.template}\n    {note.meaning}")


@command("slurm")
@DATASET
@CACHE
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--tasks", type=int, required=True, help="Tasks of the job array; each fills shards of its own.")
@click.option("--gpus", default=1, show_default=True, help="GPUs of each task; 0 for none.")
@click.option("--cpus", default=8, show_default=True, help="Cores of each task, for decoding.")
@click.option("--memory-gb", default=32, show_default=True, help="Main memory of each task.")
@click.option("--time", default="24:00:00", show_default=True, help="Time limit of each task.")
@click.option(
    "--signal-seconds", default=120, show_default=True,
    help="How long before the time limit a task stops and requeues itself.",
)  # fmt: skip
@click.option("--max-requeues", default=100, show_default=True, help="How often a task may be restarted.")
@click.option("--partition", help="Partition to run in.  [default: the cluster's]")
@click.option("--account", help="Account to charge.  [default: the user's]")
@click.option("--name", default="whisper-at", show_default=True, help="Name of the job and of its log files.")
@click.option("--setup", metavar="LINE", help="Shell line to run first, such as 'source venv/bin/activate'.")
def slurm_command(
    dataset: Path | str, cache: Path | str, options: tuple[str, ...], as_json: bool, **asked: Any
) -> None:
    """Print a job script that fills CACHE from DATASET with an array of SLURM tasks; pipe it to sbatch.

    What follows -- goes to `extract` as it is. A task that reaches its time limit, is preempted or loses its node is
    requeued and continues. Submit the same script again to redo what failed; `info` shows what each task still lacks.

    \b
        whisper-at-cli slurm audioset as2m.zarr --tasks 16 -- --model large-v1 > job.sh
        sbatch job.sh
    """
    from whisper_at_cli.extract.pipeline.slurm import SlurmJob, job_script

    job = SlurmJob(**asked)
    script = job_script(job, [str(dataset), str(cache), *options])
    if as_json:
        print_json({"script": script, **asdict(job)})
    else:
        click.echo(script, nl=False)


@command("verify")
@CACHE
@click.option(
    "--sample", default="100%", show_default=True, metavar="SHARE",
    help="Read only this share of the clips, chosen at random.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), help="Threads that read.  [default: the number of cores]")
@click.pass_context
def verify_command(
    ctx: click.Context, cache: Path | str, as_json: bool, sample: str, workers: int | None
) -> None:  # fmt: skip
    """Read all of CACHE back and name what is damaged. Exit status 1 if anything is.

    \b
        whisper-at-cli verify esc50.zarr
        whisper-at-cli verify as2m.zarr --sample 1%
    """
    from whisper_at_cli.extract.cache.verify import verify

    with progress_on_stderr("verify", "clips", quiet=ctx.obj["quiet"]) as progress:
        report = verify(cache, sample=_share(sample), workers=workers, progress=progress)
    if as_json:
        print_json(report)
    else:
        for damage in report.damaged:
            click.echo(
                f"damaged: {', '.join(damage.clips[:5])}{' ...' if len(damage.clips) > 5 else ''}: {damage.problem}"
            )
        drawn = f" of {report.clips_done}" if report.clips_read < report.clips_done else ""
        click.echo(f"{cache}: {report.clips_read}{drawn} clips read, {'all whole' if report.ok else 'damage found'}")
    if not report.ok:
        ctx.exit(1)


def _share(text: str) -> float:
    """A share such as `1%` or `0.01`. Raises UsageError."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UsageError(f"--sample must be a share such as 1% or 0.01, above 0 and at most 100% (got {text})")
    return share


@command("export")
@CACHE
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", help="npz or hdf5.  [default: hdf5 where OUT ends in .h5 or .hdf5, else npz]")
@click.pass_context
def export_command(ctx: click.Context, cache: Path | str, out: Path, format: str | None, as_json: bool) -> None:
    """Write the finished clips of CACHE to OUT: a folder with one npz per clip, or one HDF5 file.

    Each npz holds arr_0, (layers, 25, channels), as in the original project; labels.csv and cache.json beside them say
    the rest, so that `import` gives the same cache back. Exit status 1 if clips were left out: those that failed or are
    pending.

    \b
        whisper-at-cli export esc50.zarr esc50-npz
        whisper-at-cli export esc50.zarr esc50.h5
    """
    from whisper_at_cli.extract.cache.export import export_hdf5, export_npz

    exporters = {"npz": export_npz, "hdf5": export_hdf5}
    format = format or ("hdf5" if out.suffix.lower() in (".h5", ".hdf5") else "npz")
    if format not in exporters:
        raise UsageError(f"--format {format} is not known; choose from {', '.join(exporters)}")
    with progress_on_stderr("export", "clips", quiet=ctx.obj["quiet"]) as progress:
        report = exporters[format](cache, out, progress=progress)
    if as_json:
        print_json(report)
    else:
        click.echo(f"{report.out}: {report.written} of {report.clips} clips written")
    if report.skipped:
        print_notes([f"{report.skipped} clips are not finished and were left out; see: whisper-at-cli info {cache}"])
        ctx.exit(1)


@command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@CACHE
@click.option(
    "--labels", "labels_csv", type=click.Path(path_type=Path), metavar="CSV",
    help="Columns id, optionally path, fold, split, labels (separated by ;).  [default: labels.csv in FOLDER]",
)  # fmt: skip
@click.option("--backbone", metavar="NAME", help="What made the features.  [default: as cache.json in FOLDER says]")
@click.option("--clip-seconds", type=float, help="Length of the clips.  [default: as cache.json in FOLDER says]")
@click.option("--dtype", help="Storage type: float16, float32 or int8.  [default: as cache.json says, else float16]")
@click.pass_context
def import_command(ctx: click.Context, /, folder: Path, cache: Path | str, as_json: bool, **options: Any) -> None:
    """Read a FOLDER with one npz per clip (arr_0, layers x 25 x channels) into CACHE.

    A file that is damaged, of another shape or not finite makes its clip fail, with the reason; the others go on. The
    same command continues what was stopped and tries failed clips again.

    \b
        whisper-at-cli import features as.zarr --labels clips.csv --backbone large-v1 --clip-seconds 10
        whisper-at-cli import esc50-npz copy.zarr
    """
    from whisper_at_cli.extract.cache.import_npz import import_npz

    with progress_on_stderr("import", "clips", quiet=ctx.obj["quiet"]) as progress:
        report = import_npz(folder, cache, progress=progress, **options)
    print_notes(report.warnings)
    _print_failures(report.failures, cache)
    if as_json:
        print_json(report)
    else:
        click.echo(
            f"{report.cache}: {report.written} clips written, {report.skipped} were there, {report.failed} failed"
        )
    if report.failed:
        ctx.exit(1)


def _print_failures(failures: Sequence[dict], cache: Path | str, root: str = "") -> None:
    """The first clips that failed, on stderr, and where to find the others; those that are missing by themselves.

    A missing clip is shown with the path below `root` that was tried; without one by its id.
    """
    missing = [failure for failure in failures if failure["error"].startswith(MISSING)]
    broken = [failure for failure in failures if not failure["error"].startswith(MISSING)]
    lines = [f"failed: {printable(failure['path'])}: {failure['error']}" for failure in broken]
    _print_first(lines, "failed", cache)
    tried = [posixpath.join(root, failure["path"]) if root else failure["id"] for failure in missing]
    _print_first([f"missing: {printable(path)}" for path in tried], "missing", cache)


def _print_first(lines: list[str], what: str, cache: Path | str) -> None:
    for line in lines[:FAILURES_SHOWN]:
        click.echo(line, err=True)
    if len(lines) > FAILURES_SHOWN:
        more = len(lines) - FAILURES_SHOWN
        click.echo(f"{what}: {more} more; all of them: whisper-at-cli info {cache}", err=True)


def _engine(
    options: ExtractOptions, *, engine: str, address: str | None, encoders: int | None
) -> Callable[..., ExtractReport]:
    """The function that does the work; it takes dataset, cache and options."""
    devices = options.device.split(",")
    if engine == "ray":
        from whisper_at_cli.extract.pipeline.ray_engine import extract_on_ray

        if options.workers is not None or len(devices) > 1:
            raise UsageError("--workers and several devices are for --engine local; Ray's nodes say what they have")
        return partial(extract_on_ray, address=address, encoders=encoders)
    if engine != "local":
        raise UsageError(f"--engine {engine} is not known; choose local or ray")
    if address is not None or encoders is not None:
        raise UsageError("--address and --encoders need --engine ray")
    from whisper_at_cli.extract import extract, extract_on_devices

    return partial(extract_on_devices, devices=devices) if len(devices) > 1 else extract


def _slot(text: str) -> tuple[int, int]:
    """`--shard I/N` or `--shard auto`."""
    if text == "auto":
        from whisper_at_cli.extract.pipeline.slurm import slot_from_environment

        return slot_from_environment(os.environ)
    index, slash, of = text.partition("/")
    if not (slash and index.isdecimal() and of.isdecimal()):
        raise UsageError(f"--shard {text} is neither of the form I/N, such as 2/8, nor auto")
    return int(index), int(of)


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UsageError(f"--batch-size {text} is neither a number nor 'auto'")
    return int(text)


COMMANDS = (
    extract_command, slurm_command, info_command, notes_command, verify_command, export_command, import_command,
)  # fmt: skip
