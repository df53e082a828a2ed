"""The command line: arguments in, calls out, tables and JSON back. Heavy imports sit inside the commands."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from whisper_at_cli import __version__
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.output import plain, print_json, print_notes, print_table, printable, score
from whisper_at_cli.extract.progress import progress_on_stderr


class _CacheAddress(click.Path):
    """A path, or the address of a cache in a bucket as it is: `s3://...`, which a Path would mangle."""

    def convert(self, value, param, ctx):
        return value if "://" in str(value) else super().convert(value, param, ctx)


CACHE = click.argument("cache", type=_CacheAddress(path_type=Path))
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="cuda, cuda:1, mps or cpu; auto takes the best."
)
DEVICES = click.option(
    "--device", default="auto", show_default=True, help="As cuda, mps, cpu; or several: cuda:0,cuda:1."
)
SEED = click.option("--seed", default=0, show_default=True, help="For whatever is drawn at random.")
FAILURES_SHOWN = 20


class _Commands(click.Group):
    """Lists commands in the order in which a user meets them."""

    def list_commands(self, ctx):
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="whisper-at-cli")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.pass_context
def cli(ctx, debug, quiet):
    """Every layer of Whisper's frozen encoder, extracted once; probes and taggers trained from them many times.

    \b
        whisper-at-cli extract ESC-50 esc50.zarr --model tiny.en
        whisper-at-cli probe esc50.zarr --layer all
        whisper-at-cli train-head esc50.zarr --head tl-tr --dim 128 --out tagger

    Results go to stdout, progress and messages to stderr. Exit status: 0 done, 1 the work failed or part of it
    did, 2 wrong usage.
    """
    ctx.obj = {"quiet": quiet}


def command(name: str):
    """A command of the group, with --json."""

    def register(function):
        function = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)
        return cli.command(name)(function)

    return register


@command("extract")
@click.argument("dataset", type=click.Path(path_type=Path))
@CACHE
@click.option(
    "--model", required=True, help="An OpenAI name (tiny.en ... large-v3), a .pt file, or a CTranslate2 folder."
)
@click.option(
    "--format", default="auto", show_default=True, help="Dataset layout: esc50 or folder; auto looks for itself."
)
@click.option("--clip-seconds", type=float, help="Cut or pad clips to this length.  [default: the dataset's; else 10]")
@click.option("--dtype", default="float16", show_default=True, help="Storage type: float16, float32 or int8.")
@click.option("--precision", default="float32", show_default=True, help="Arithmetic: float32, bfloat16 or float16.")
@click.option("--batch-size", default="auto", show_default=True, help="Clips encoded together; auto finds what fits.")
@click.option("--workers", type=int, help="Threads that decode audio.  [default: one per core]")
@click.option("--shard-mb", type=float, default=128, show_default=True, help="Size of a shard file of a new cache.")
@click.option(
    "--shard", default="1/1", show_default=True, metavar="I/N", help="Do every N-th shard, the I-th of each N."
)
@click.option("--compile", is_flag=True, help="Compile the encoder first; pays on a GPU when a run takes long.")
@click.option("--repair", is_flag=True, help="Also redo clips that failed or that `verify` finds damaged.")
@DEVICES
@click.pass_context
def extract_command(ctx, dataset, cache, as_json, shard, device, batch_size, **options):
    """Run frozen Whisper over DATASET once; store every layer, pooled to 25 frames, in CACHE.

    DATASET is an ESC-50 layout (meta/esc50.csv beside audio/) or a folder per class. If CACHE exists, the same command
    continues it. A clip that cannot be read is reported and marked failed.

    \b
        whisper-at-cli extract ESC-50 esc50.zarr --model tiny.en
        whisper-at-cli extract my-sounds sounds.zarr --model large-v1 --clip-seconds 5 --precision bfloat16
    """
    from whisper_at_cli.extract import extract, extract_on_devices

    options |= {"shard": _slot(shard), "batch_size": _batch_size(batch_size)}
    devices = device.split(",")
    with progress_on_stderr("extract", "clips", quiet=ctx.obj["quiet"]) as progress:
        if len(devices) > 1:
            report = extract_on_devices(dataset, cache, devices=devices, progress=progress, **options)
        else:
            report = extract(dataset, cache, device=device, progress=progress, **options)
    _print_failures([asdict(failure) for failure in report.failures], cache)
    if as_json:
        print_json(report)
    else:
        click.echo(
            f"{report.cache}: {report.written} clips written, {report.skipped} were there, {report.failed} failed; "
            f"{report.seconds:.1f} s, {report.clips_per_second:.1f} clips/s, "
            f"encoder busy {report.encoder_busy:.0%} of the time"
        )
    if report.failed:
        ctx.exit(1)


@command("info")
@CACHE
def info_command(cache, as_json):
    """What is in CACHE: how it was made, how much of it is done, which clips failed.

    \b
        whisper-at-cli info esc50.zarr
    """
    from whisper_at_cli.extract.cache.summary import summarise

    summary = summarise(cache)
    if as_json:
        print_json(summary)
        return
    failures, made = summary.pop("failures"), summary.pop("made")
    summary |= {f"made: {name}": value for name, value in made.items()}
    print_table([(name.replace("_", " "), plain(value)) for name, value in summary.items()], ("what", "value"))
    for failure in failures:
        click.echo(f"failed: {printable(failure['path'])}: {failure['error']}")


@command("verify")
@CACHE
@click.pass_context
def verify_command(ctx, cache, as_json):
    """Read all of CACHE back and name what is damaged. Exit status 1 if anything is.

    \b
        whisper-at-cli verify esc50.zarr
    """
    from whisper_at_cli.extract.cache.verify import verify

    with progress_on_stderr("verify", "clips", quiet=ctx.obj["quiet"]) as progress:
        report = verify(cache, progress=progress)
    if as_json:
        print_json(report)
    else:
        for damage in report.damaged:
            click.echo(
                f"damaged: {', '.join(damage.clips[:5])}{' ...' if len(damage.clips) > 5 else ''}: {damage.problem}"
            )
        click.echo(f"{cache}: {report.clips_read} clips read, {'all whole' if report.ok else 'damage found'}")
    if not report.ok:
        ctx.exit(1)


@command("export")
@CACHE
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", help="npz or hdf5.  [default: hdf5 where OUT ends in .h5 or .hdf5, else npz]")
@click.pass_context
def export_command(ctx, cache, out, format, as_json):
    """Write the finished clips of CACHE to OUT: a folder with one npz per clip, or one HDF5 file.

    Each npz holds arr_0, (layers, 25, channels), as in the original project; labels.csv and cache.json beside them say
    the rest, so that `import` gives the same cache back. Exit status 1 if clips were left out: those that failed or are
    pending.

    \b
        whisper-at-cli export esc50.zarr esc50-npz
        whisper-at-cli export esc50.zarr esc50.h5
    """
    from whisper_at_cli.extract.cache.exchange import export_hdf5, export_npz

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
def import_command(ctx, folder, cache, as_json, **options):
    """Read a FOLDER with one npz per clip (arr_0, layers x 25 x channels) into CACHE.

    A file that is damaged, of another shape or not finite makes its clip fail, with the reason; the others go on. The
    same command continues what was stopped and tries failed clips again.

    \b
        whisper-at-cli import features as.zarr --labels clips.csv --backbone large-v1 --clip-seconds 10
        whisper-at-cli import esc50-npz copy.zarr
    """
    from whisper_at_cli.extract.cache.exchange import import_npz

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


@command("probe")
@CACHE
@click.option(
    "--layer", "layers", multiple=True, default=("all",), show_default=True, help="1 = first; repeatable, or all."
)
@click.option("--strength", default=1.0, show_default=True, help="Inverse L2 penalty, scikit-learn's C.")
@click.option(
    "--figure", type=click.Path(path_type=Path), help="Draw accuracy against layer here (.png, .pdf or .svg)."
)
@SEED
@DEVICE
@click.pass_context
def probe_command(ctx, cache, layers, strength, figure, seed, device, as_json):
    """Fit a linear probe to each layer of CACHE and print how well it tells the classes apart.

    Uses the dataset's official folds, its split, or else random folds.

    \b
        whisper-at-cli probe esc50.zarr --layer all --figure layers.pdf
        whisper-at-cli probe esc50.zarr --layer 16 --layer 32 --json
    """
    from whisper_at_cli.extract import FeatureCache
    from whisper_at_cli.probe import probe_layers

    opened = FeatureCache.open(cache)
    with progress_on_stderr("probe", "layers", quiet=ctx.obj["quiet"]) as progress:
        result = probe_layers(
            opened, layers=_layer_numbers(layers), strength=strength, device=device, seed=seed, progress=progress
        )
    print_notes(result.warnings)
    if figure:
        from whisper_at_cli.probe.figures import draw_layer_accuracy

        draw_layer_accuracy([(opened.spec.backbone, result)], figure)
        click.echo(f"figure: {figure}", err=True)
    if as_json:
        print_json(result)
    else:
        _print_probe(result)


@command("train-head")
@CACHE
@click.option("--head", required=True, help="last-mlp, wa-mlp, wa-tr or tl-tr.")
@click.option("--dim", type=int, help="tl-tr only: project the layers to this many channels first.")
@click.option("--recipe", help="as20k, as2m or esc50.  [default: by the data]")
@click.option("--lr", type=float, help="Learning rate.  [default: the recipe's]")
@click.option("--epochs", type=int, help="[default: the recipe's]")
@click.option("--out", type=click.Path(path_type=Path), help="Save the head, trained on all clips, in this folder.")
@SEED
@DEVICE
@click.pass_context
def train_head_command(ctx, cache, head, dim, recipe, lr, epochs, out, seed, device, as_json):
    """Train a head on CACHE: validate it on the folds or the split, then save it.

    With folds, each is validated on a head trained on the others, and the head that is saved saw all clips.

    \b
        whisper-at-cli train-head esc50.zarr --head wa-mlp
        whisper-at-cli train-head esc50.zarr --head tl-tr --dim 128 --out tagger
    """
    from whisper_at_cli.extract import FeatureCache
    from whisper_at_cli.heads import train_head

    opened = FeatureCache.open(cache)
    changes = {name: value for name, value in (("lr", lr), ("epochs", epochs)) if value is not None}
    with progress_on_stderr(f"train {head}", "epochs", quiet=ctx.obj["quiet"]) as progress:
        result = train_head(
            opened, head=head, width=dim, recipe=recipe, changes=changes, out=out, device=device, seed=seed,
            progress=progress,
        )  # fmt: skip
    print_notes(result.warnings)
    if as_json:
        print_json(result)
    else:
        _print_training(result)


@command("heads")
@click.option("--model", default="large-v1", show_default=True, help="Whisper size by name.")
@click.option("--classes", default=527, show_default=True, help="Classes that the heads tell apart.")
@click.option("--clip-seconds", default=10.0, show_default=True, help="Length of the clip that is counted.")
def heads_command(model, classes, clip_seconds, as_json):
    """Parameters and FLOPs of every head for one clip, beside Whisper's encoder and AST (tables 1 and 2 of the paper).

    FLOPs count one multiply-add as one, as the paper does; "2x" counts it as two.

    \b
        whisper-at-cli heads --model large-v1
    """
    from whisper_at_cli.heads.count import head_table

    rows = head_table(model, classes=classes, clip_seconds=clip_seconds)
    if as_json:
        print_json({"model": model, "classes": classes, "clip_seconds": clip_seconds, "heads": rows})
        return
    print_table(
        [
            (
                row["head"], row["dim"], f"{row['params'] / 1e6:.2f}", f"{row['flops'] / 1e9:.4f}",
                f"{row['flops_two_per_multiply_add'] / 1e9:.4f}", f"{row['share_of_encoder']:.4%}",
                f"{row['speedup_vs_ast']:,.0f}",
            )
            for row in rows
        ],
        ("head", "dim", "params (M)", "GFLOPs", "GFLOPs 2x", "of encoder", "speed-up vs AST"),
    )  # fmt: skip


@command("demo")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Where all of it goes."
)
@click.pass_context
def demo_command(ctx, out, as_json):
    """The whole job on sounds that the project makes itself, with real tiny.en weights: two minutes on two cores.

    \b
        whisper-at-cli demo
    """
    from whisper_at_cli.extract import FeatureCache, extract
    from whisper_at_cli.extract.synthesis import synthesise
    from whisper_at_cli.extract.weights import demo_weights_folder
    from whisper_at_cli.heads import train_head
    from whisper_at_cli.probe import probe_layers
    from whisper_at_cli.probe.figures import draw_layer_accuracy

    quiet = ctx.obj["quiet"]
    sounds, cache, figure, head = out / "sounds", out / "sounds.zarr", out / "layers.png", out / "head"
    weights = demo_weights_folder()
    with progress_on_stderr("synthesise", "clips", quiet=quiet) as progress:
        synthesise(sounds, progress=progress)
    with progress_on_stderr("extract", "clips", quiet=quiet) as progress:
        extracted = extract(sounds, cache, model=weights, progress=progress)
    opened = FeatureCache.open(cache)
    with progress_on_stderr("probe", "layers", quiet=quiet) as progress:
        probed = probe_layers(opened, progress=progress)
    draw_layer_accuracy([(opened.spec.backbone, probed)], figure)
    with progress_on_stderr("train wa-tr", "epochs", quiet=quiet) as progress:
        trained = train_head(opened, head="wa-tr", out=head, progress=progress)
    places = {"sounds": str(sounds), "cache": str(cache), "figure": str(figure), "checkpoint": str(head)}
    if as_json:
        print_json({"extract": asdict(extracted), "probe": asdict(probed), "head": asdict(trained), **places})
        return
    click.echo(f"\n{extracted.written + extracted.skipped} clips of {len(opened.spec.class_names)} classes, 5 folds\n")
    _print_probe(probed)
    _print_training(trained)
    print_table(list(places.items()), ("what", "where"))
    click.echo(
        "The same on your own sounds (a folder per class, or ESC-50's layout):\n"
        "    whisper-at-cli extract SOUNDS sounds.zarr --model tiny.en\n"
        "    whisper-at-cli probe sounds.zarr --layer all --figure layers.png\n"
        "    whisper-at-cli train-head sounds.zarr --head wa-tr --out head"
    )


def _print_failures(failures: list[dict], cache) -> None:
    """The first clips that failed, on stderr, and where to find the others."""
    for failure in failures[:FAILURES_SHOWN]:
        click.echo(f"failed: {printable(failure['path'])}: {failure['error']}", err=True)
    if len(failures) > FAILURES_SHOWN:
        more = len(failures) - FAILURES_SHOWN
        click.echo(f"failed: {more} more; all of them: whisper-at-cli info {cache}", err=True)


def _slot(text: str) -> tuple[int, int]:
    """`--shard I/N`."""
    index, slash, of = text.partition("/")
    if not (slash and index.isdecimal() and of.isdecimal()):
        raise UsageError(f"--shard {text} is not of the form I/N, such as 2/8")
    return int(index), int(of)


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UsageError(f"--batch-size {text} is neither a number nor 'auto'")
    return int(text)


def _layer_numbers(layers: tuple[str, ...]):
    if "all" in layers:
        return "all"
    wrong = next((layer for layer in layers if not layer.lstrip("-").isdecimal()), None)
    if wrong is not None:
        raise UsageError(f"--layer {wrong} is neither a number nor 'all'")
    return [int(layer) for layer in layers]


def _print_probe(result) -> None:
    if result.metric == "accuracy":
        header = ("layer", "accuracy", "std over folds", "macro F1")
        rows = [(row.layer, row.accuracy, row.accuracy_std, row.macro_f1) for row in result.layers]
    else:
        header = ("layer", "mAP", "std over folds")
        rows = [(row.layer, row.mAP, row.mAP_std) for row in result.layers]
    print_table([(row[0], *map(score, row[1:])) for row in rows], header)


def _print_training(result) -> None:
    folds = "  ".join(f"{fold['fold']}: {score(fold['value'])}" for fold in result.folds)
    print_table(
        [
            ("head", f"{result.head}, {result.dim} channels, {result.params:,} parameters"),
            (result.metric, f"{score(result.value)} (std over folds {score(result.std)})"),
            ("folds", folds),
            ("time", f"{result.seconds:.1f} s, {result.samples_per_second:,.0f} samples/s"),
            ("checkpoint", result.checkpoint or "not saved (give --out FOLDER)"),
        ],
        ("training", ""),
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point. The whole error policy: one line on stderr, and the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = ["--debug"] * debug + [argument for argument in arguments if argument != "--debug"]
    try:
        sys.exit(cli.main(arguments, prog_name="whisper-at-cli", standalone_mode=False) or 0)
    except WhisperATError as error:
        _fail(str(error), error.exit_status, debug)
    except click.UsageError as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _fail(f"{error.format_message()}{where}", 2, debug)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; what was finished is kept, and the same command continues", 1, debug)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        _fail(
            f"{type(error).__name__}: {error}; this should not happen: run again with --debug for the traceback",
            1,
            debug,
        )


def _fail(message: str, status: int, debug: bool) -> None:
    if debug:
        raise  # noqa: PLE0704 - called from an except block only
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
