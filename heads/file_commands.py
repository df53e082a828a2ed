"""Commands on what stage 2a leaves on disk: evaluate, import-head, export-head, table. Heavy imports sit inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from whisper_at_cli.extract.options import DEVICE, PREDICTIONS, command
from whisper_at_cli.extract.output import by_layer, interval, print_json, print_notes, print_table, score
from whisper_at_cli.extract.progress import progress_on_stderr

if TYPE_CHECKING:
    from whisper_at_cli.heads.evaluate import Evaluation

CLASSES_SHOWN = 60  # all of them up to here, else those with the lowest and the highest precision
CONFUSIONS_SHOWN = 5
LAYERS_SHOWN = 4
FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


@command("evaluate")
@click.argument("checkpoint", type=FOLDER)
@click.argument("data")
@click.option("--fold", type=int, help="Only the clips of this fold.")
@click.option("--split", help="Only the clips of this split.")
@PREDICTIONS
@DEVICE
@click.pass_context
def evaluate_command(
    ctx: click.Context, checkpoint: Path, data: str, fold: int | None, split: str | None, predictions: Path | None,
    device: str, as_json: bool,
) -> None:  # fmt: skip
    """Metrics of the head in the folder CHECKPOINT on DATA: mAP, mAUC, d-prime, accuracy, each class, confusions.

    DATA is a cache made like the one that the head was trained on. Without --fold and --split, the clips that the head
    was not trained on are taken, where it was trained on a part of DATA: for the folder fold-N, those of fold N.
    For a head whose encoder was trained with it, DATA is the dataset itself.

    \b
        whisper-at-cli evaluate tagger/fold-1 esc50.zarr
        whisper-at-cli evaluate tagger audioset.zarr --split eval --json
    """
    from whisper_at_cli.extract import FeatureCache
    from whisper_at_cli.heads import evaluate_head
    from whisper_at_cli.heads.checkpoint import read_record
    from whisper_at_cli.heads.endtoend import evaluate_end_to_end

    options: dict[str, Any] = {"fold": fold, "split": split, "device": device, "predictions": predictions}
    with progress_on_stderr("evaluate", "clips", quiet=ctx.obj["quiet"]) as progress:
        if read_record(checkpoint).get("encoder"):
            found = evaluate_end_to_end(checkpoint, data, progress=progress, **options)
        else:
            opened = FeatureCache.open(data if "://" in data else Path(data))
            found = evaluate_head(checkpoint, opened, progress=progress, **options)
    print_notes(found.notes)
    if as_json:
        print_json(found)
    else:
        print_evaluation(found)


@command("import-head")
@click.argument("file", type=FILE)
@click.argument("folder", type=FOLDER)
@click.option("--backbone", help="The encoder that it was trained on, by name: tiny.en, large-v1, ...")
@click.option("--class-names", type=FILE, help="Names of its classes: one a line, JSON list, or AudioSet's CSV.")
@click.option("--clip-seconds", type=float, help="Length of the clips that it was trained on.")
@click.option("--layers", type=int, help="Layers of the encoder, where its name is no Whisper size.")
@click.option("--loss", default="bce", show_default=True, help="bce for several labels a clip, ce for one.")
@click.option("--cache", help="Take all of these from this cache, where they are not given.")
def import_head_command(
    file: Path, folder: Path, backbone: str | None, class_names: Path | None, clip_seconds: float | None,
    layers: int | None, loss: str, cache: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Bring a head that the original project trained (FILE.pth) into FOLDER, as `train-head --out` would have left it.

    Its form and sizes come from its tensors. Nothing in the file is run.

    \b
        whisper-at-cli import-head large-v1_ori.pth tagger --backbone large-v1 --class-names class_labels_indices.csv
    """
    from whisper_at_cli.extract import FeatureCache
    from whisper_at_cli.heads.original import import_head, read_class_names

    like = FeatureCache.open(cache if "://" in cache else Path(cache)).spec if cache else None
    names = read_class_names(class_names) if class_names else None
    found = import_head(
        file, folder, backbone=backbone, class_names=names, clip_seconds=clip_seconds, layers=layers, loss=loss,
        like=like,
    )  # fmt: skip
    print_notes(found.notes)
    if as_json:
        print_json(found)
        return
    print_table(
        [
            ("head", f"{found.head}, {found.dim} channels, {found.params:,} parameters"),
            ("for", f"{found.backbone}, {found.layers} layers, clips of {found.clip_seconds:g} s"),
            ("classes", found.classes),
            ("tensors that are not the head's", found.left_out),
            ("checkpoint", found.checkpoint),
        ],
        ("import-head", found.source),
    )


@command("export-head")
@click.argument("folder", type=FOLDER)
@click.argument("file", type=FILE)
@click.option(
    "--prefix", default="module.", show_default=True,
    help="module. as the original's training names tensors, or at_model. as its package does.",
)  # fmt: skip
def export_head_command(folder: Path, file: Path, prefix: str, as_json: bool) -> None:
    """Write the head in FOLDER as a state dict of the original project, FILE.pth.

    Tensors are the same bit for bit; class names, backbone and recipe have no place in that form.

    \b
        whisper-at-cli export-head tagger tagger.pth --prefix at_model.
    """
    from whisper_at_cli.heads.original import export_head

    names = export_head(folder, file, prefix=prefix)
    if as_json:
        print_json({"file": str(file), "prefix": prefix, "tensors": names})
    else:
        click.echo(f"{len(names)} tensors in {file}, named {prefix}...")


@command("table")
@click.argument("number", type=int)
@click.argument("results", nargs=-1, type=click.Path(path_type=Path))
@click.option("--format", "form", default="text", show_default=True, help="text, markdown, latex or csv.")
def table_command(number: int, results: tuple[Path, ...], form: str, as_json: bool) -> None:
    """Table NUMBER (1 or 2) of the paper: its rows as printed and as counted here, and your own RESULTS below them.

    A result is a folder that train-head --out wrote, or a file of what train-head --json or evaluate --json printed.

    \b
        whisper-at-cli table 1 tagger --format markdown
        whisper-at-cli table 2 tagger/fold-1 tagger/fold-2
    """
    from whisper_at_cli.heads.tables import cells, paper_table, render

    table = paper_table(number, results)
    if as_json:
        print_json(table)
        return
    print_notes(table["notes"])
    if form == "text":
        header, rows = cells(table)
        print_table(rows, header)
    else:
        click.echo(render(table, form))
    click.echo(f"printed values: {table['source']}; the others are counted or measured here", err=True)


def print_evaluation(found: Evaluation) -> None:
    layers = [("layer weights", by_layer(found.layer_weights))] if found.layer_weights else []
    trained_on = "not recorded" if found.clips_trained_on is None else f"{found.clips_trained_on}"
    print_table(
        [
            ("mAP", f"{score(found.mAP)} (95 % interval {interval(found.mAP_ci95)})"),
            ("mAUC", score(found.mAUC)),
            ("d-prime", score(found.d_prime)),
            ("accuracy", f"{score(found.accuracy)} (95 % interval {interval(found.accuracy_ci95)})"),
            ("clips", f"{found.clips} ({found.chosen})"),
            ("of these trained on", trained_on),
            *layers,
            ("time", f"{found.seconds:.1f} s, {found.clips_per_second:,.0f} clips/s"),
        ],
        ("evaluation", f"{found.head}, {found.dim} channels"),
    )
    in_order = sorted((value, at, name) for at, (name, value) in enumerate(found.class_ap.items()) if value == value)
    defined = [name for _, _, name in in_order]
    if len(defined) > CLASSES_SHOWN:
        defined = defined[: CLASSES_SHOWN // 2] + defined[-CLASSES_SHOWN // 2 :]
    print_table(
        [
            (
                name, found.class_clips[name], score(found.class_ap[name]), score(found.class_auc[name]),
                *([_most_attended(found.class_attention[name])] if found.class_attention else []),
            )
            for name in defined
        ],
        ("class, lowest first", "clips", "AP", "AUC", *["attention to layers"] * bool(found.class_attention)),
    )  # fmt: skip
    print_confusions(found.confusion)


def _most_attended(attention: list[float]) -> str:
    """The layers that get most of a class's attention, the most first."""
    order = sorted(range(len(attention)), key=lambda layer: -attention[layer])[:LAYERS_SHOWN]
    return "  ".join(f"{layer + 1}: {attention[layer]:.3f}" for layer in order)


def print_confusions(confusion: dict | None) -> None:
    """The pairs of classes that are taken for each other most often."""
    if confusion is None:
        return
    names, matrix = confusion["classes"], confusion["matrix"]
    pairs = [
        (count, names[label], names[taken])
        for label, row in enumerate(matrix)
        for taken, count in enumerate(row)
        if count and label != taken
    ]
    pairs.sort(key=lambda pair: -pair[0])
    if pairs:
        print_table(
            [(name, taken, count) for count, name, taken in pairs[:CONFUSIONS_SHOWN]], ("class", "taken for", "clips")
        )


COMMANDS = (evaluate_command, import_head_command, export_head_command, table_command)
