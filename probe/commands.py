"""The commands of stage 2b: probe, figure, cka. Heavy imports sit inside them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.options import ADDRESS, CACHE, DEVICE, PREDICTIONS, SEED, command, layer_numbers
from whisper_at_cli.extract.output import interval, print_json, print_notes, print_table, score
from whisper_at_cli.extract.progress import progress_on_stderr

if TYPE_CHECKING:
    from whisper_at_cli.probe.layers import ProbeResult

CLASSES_SHOWN = 60
LEVEL = "95 % interval"
CONFUSIONS_SHOWN = 5


@command("probe")
@CACHE
@click.option(
    "--layer",
    "layers",
    multiple=True,
    default=("all",),
    show_default=True,
    help="1 = first; several as 1,2 or 1-4, or all.",
)
@click.option(
    "--kind", default="linear", show_default=True,
    help="linear, knn (nearest neighbours) or attentive (a learned query attends over the frames, then linear).",
)  # fmt: skip
@click.option(
    "--strength", default="1.0", show_default=True,
    help="Inverse L2 penalty, scikit-learn's C; auto chooses it inside the training folds (linear only).",
)  # fmt: skip
@click.option("--neighbours", type=int, default=10, show_default=True, help="With --kind knn: how many vote.")
@click.option("--faithful", is_flag=True, help="The original project's classifier, for comparison; slow.")
@click.option("--unstandardised", is_flag=True, help="With --faithful: features as they are, not standardised.")
@click.option("--permute-labels", is_flag=True, help="Control: permute the labels between recordings at random.")
@click.option("--nested", is_flag=True, help="Also choose the best layer on inner folds; its value is then unbiased.")
@click.option("--shots", help="Also train with this many clips of each class: 8 or 1,2,4,8,16. Mean of 10 draws.")
@click.option(
    "--mdl",
    is_flag=True,
    help="Also compute the description length (MDL) of the labels for each layer, with an online code.",
)
@click.option("--test-cache", type=ADDRESS, help="Train on CACHE and test on this one; classes are matched by name.")
@PREDICTIONS
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write every number into this file too.")
@click.option(
    "--figure", type=click.Path(path_type=Path), help="Draw accuracy against layer here (.png, .pdf or .svg)."
)
@SEED
@DEVICE
@click.pass_context
def probe_command(
    ctx: click.Context, /, cache: Path | str, layers: tuple[str, ...], kind: str, strength: str, neighbours: int,
    faithful: bool, unstandardised: bool, shots: str | None, test_cache: Path | str | None, csv_path: Path | None,
    figure: Path | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Fit a probe to each layer of CACHE and print how well it tells the classes apart.

    Uses the dataset's official folds, its split, or else random folds, grouped by recording where names tell it.

    \b
        whisper-at-cli probe esc50.zarr --layer all --figure layers.pdf --csv layers.csv
        whisper-at-cli probe esc50.zarr --layer 16 --layer 32 --strength auto --json
        whisper-at-cli probe esc50.zarr --kind knn --neighbours 5
        whisper-at-cli probe esc50.zarr --nested --shots 1,2,4,8,16 --mdl --figure shots.pdf
    """
    from whisper_at_cli.extract import FeatureCache
    from whisper_at_cli.probe import probe_layers

    opened = FeatureCache.open(cache)
    kind = _kind(ctx, kind, faithful)
    with progress_on_stderr("probe", "layers", quiet=ctx.obj["quiet"]) as progress:
        result = probe_layers(
            opened, layers=layer_numbers(layers, "--layer") or "all", kind=kind, strength=_strength(strength),
            neighbours=neighbours, standardise=not unstandardised, shots=_shots(shots), progress=progress,
            test_cache=FeatureCache.open(test_cache) if test_cache else None, **options,
        )  # fmt: skip
    print_notes(result.warnings)
    if csv_path:
        from whisper_at_cli.probe.tidy import write_csv

        write_csv(result, csv_path)
    if figure:
        from whisper_at_cli.probe.figures import draw_layer_accuracy, draw_shots

        (draw_shots if result.shots else draw_layer_accuracy)([(opened.spec.backbone, result)], figure)
        click.echo(f"figure: {figure}", err=True)
    if as_json:
        print_json(result)
    else:
        print_probe(result)
        _print_classes(result)
        _print_shots(result)
        _print_mdl(result)


def _was_given(ctx: click.Context, option: str) -> bool:
    return ctx.get_parameter_source(option) != click.core.ParameterSource.DEFAULT


def _kind(ctx: click.Context, kind: str, faithful: bool) -> str:
    """The kind of probe. Raises UsageError for options that only another kind takes."""
    if faithful and _was_given(ctx, "kind"):
        raise UsageError(f"--faithful is a kind of its own; leave out --kind {kind}")
    kind = "faithful" if faithful else kind
    takers = {"strength": ("linear", "attentive"), "neighbours": ("knn",), "unstandardised": ("faithful",)}
    for option, kinds in takers.items():
        if kind not in kinds and _was_given(ctx, option):
            asked = " or ".join("--faithful" if name == "faithful" else f"--kind {name}" for name in kinds)
            raise UsageError(f"--{option} is for {asked}; leave it out")
    return kind


def _strength(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--strength {text} is neither a number nor 'auto'") from None


def _shots(text: str | None) -> list[int]:
    """Numbers of shots, ascending, each once."""
    if text is None:
        return []
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"--shots {text} is not a list of whole numbers, such as 1,2,4,8,16") from None


def _print_shots(result: ProbeResult) -> None:
    for found in result.shots:
        print_table(
            [(row["layer"], score(row["accuracy"]), interval(row["ci95"]), score(row["std_over_draws"]))
             for row in found.layers],
            (f"{found.shots}-shot layer", "accuracy", LEVEL, f"std over {len(found.layers[0]['draws'])} draws"),
        )  # fmt: skip
        if found.fewer:
            click.echo(f"fewer than {found.shots} clips to train on, all of them taken: {', '.join(found.fewer)}\n")


def _print_mdl(result: ProbeResult) -> None:
    if result.mdl:
        print_table(
            [(row["layer"], f"{row['codelength_bits']:.0f}", f"{row['compression']:.2f}") for row in result.mdl.layers],
            ("layer", f"codelength of {result.mdl.clips} labels (bits)", "compression"),
        )


def print_probe(result: ProbeResult) -> None:
    more = ("macro F1",) if result.metric == "accuracy" else ()
    header = ("layer", result.metric, LEVEL, "worse than best", "std over folds", *more)
    fields = (f"{result.metric}_std", *(name.replace(" ", "_").lower() for name in more))
    rows = [
        [
            f"{row.layer}", score(getattr(row, result.metric)), interval(row.ci95),
            "yes" if row.differs_from_best else "", *(score(getattr(row, field)) for field in fields),
        ]
        for row in result.layers
    ]  # fmt: skip
    if result.metric == "accuracy" and getattr(result.layers[0], "bits", None) is not None:
        header = (*header, "bits")
        for cells, layer in zip(rows, result.layers, strict=True):
            cells.append(f"{getattr(layer, 'bits', 0.0):.3f}")
    if result.strength == "auto":
        header = (*header, "strengths of the folds")
        for cells, layer in zip(rows, result.layers, strict=True):
            cells.append(" ".join(f"{fold['strength']:g}" for fold in layer.folds))
    print_table(rows, header)
    _print_certainty(result)


def _print_certainty(result: ProbeResult) -> None:
    """Which layers are as good as the best as far as these clips can tell, and how intervals were made."""
    said, known = result.intervals, result.not_distinguishable_from_best
    others = [f"{layer}" for layer in known if layer != result.best_layer]
    if len(result.layers) > 1 and result.best_layer is not None:
        found = f"not distinguishable from layer {result.best_layer}: layers {', '.join(others)}"
        click.echo(found if others else f"every other layer is worse than layer {result.best_layer}")
    _print_best(result)
    click.echo(f"chance: {score(result.chance)}")
    click.echo(
        f"intervals: bootstrap over {said['recordings']} recordings, {said['draws']:,} draws (BCa); "
        "worse than best: p < 0.05, adjusted for all pairs of layers\n"
    )


def _print_best(result: ProbeResult) -> None:
    if len(result.layers) < 2 or result.best_layer is None:
        return
    best = next(layer for layer in result.layers if layer.layer == result.best_layer)
    said = f"best layer: {result.best_layer}, {score(getattr(best, result.metric))}, chosen on the tested clips"
    if result.nested is None:
        click.echo(f"{said}, so this is too high on average; --nested chooses on other clips")
        return
    chosen = ", ".join(f"{row['layer']}" for row in result.nested["layers"])
    click.echo(f"{said} (too high on average)")
    click.echo(
        f"best layer by nested selection: {score(result.nested['value'])} ({interval(result.nested['ci95'])}); layers "
        f"of the folds: {chosen}; chosen on {result.nested['chosen_on']}"
    )


def _print_classes(result: ProbeResult) -> None:
    """Best layer of each class, and which classes the best layer takes for one another."""
    from whisper_at_cli.probe.scores import LayerPrecision

    if result.best_layer is None:
        return
    best = next(layer for layer in result.layers if layer.layer == result.best_layer)
    per_class = best.class_ap if isinstance(best, LayerPrecision) else best.class_f1
    rows = []
    for name, layer in list(result.best_layer_per_class.items())[:CLASSES_SHOWN]:
        tied = ", ".join(map(str, result.best_layer_per_class_ties.get(name, [])[1:]))
        kept = result.best_layer_per_class_kept.get(name)
        shown = (score(per_class[name]), interval((best.class_ci95 or {}).get(name)))
        rows.append((name, layer or "undefined", tied, "" if kept is None else f"{kept:.0%}", *shown))
    measure = "F1" if result.metric == "accuracy" else "AP"
    if len(result.layers) > 1:
        header = (
            "class",
            "best layer",
            "as good",
            "kept in draws",
            f"{measure} in layer {best.layer}",
            "95 % interval",
        )
        print_table(rows, header)
    else:
        print_table(
            [(row[0], *row[4:]) for row in rows], ("class", f"{measure} in layer {best.layer}", "95 % interval")
        )
    if len(result.best_layer_per_class) > len(rows):
        click.echo(f"{len(result.best_layer_per_class) - len(rows)} more classes: --json or --csv has them all\n")
    if not isinstance(best, LayerPrecision):
        _print_confusions(best.layer, best.confusion)


def _print_confusions(layer: int, confusion: dict[str, dict[str, int]]) -> None:
    pairs = [
        (clips, true, predicted)
        for true, predictions in confusion.items()
        for predicted, clips in predictions.items()
        if predicted != true
    ]
    pairs.sort(key=lambda pair: -pair[0])
    if pairs:
        shown = [(true, predicted, clips) for clips, true, predicted in pairs[:CONFUSIONS_SHOWN]]
        print_table(shown, (f"most confused in layer {layer}", "taken for", "clips"))


@command("figure")
@click.argument("number")
@click.argument("inputs", nargs=-1)
@click.option(
    "--robustness", multiple=True, metavar="JSON", help="What `robustness --json` printed, of one model; repeatable."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The figure: .pdf, .svg or .png.")
@click.option("--wer", default="whisper", show_default=True, help="Text normalised as whisper does, or as the paper.")
@click.option("--chance", is_flag=True, help="Figure 1: a line for a model that does not look at the clips.")
@click.option("--layer", type=int, help="Figure 2: the layer that is probed.  [default: the last]")
@click.option("--low-snr", type=float, default=-10.0, show_default=True, help="Figure 2: WER increases to this SNR,")
@click.option("--high-snr", type=float, default=20.0, show_default=True, help="from this one.")
@click.option("--snr", type=float, help="Figure 5: WER at this SNR.  [default: of clean speech]")
@click.option(
    "--parameters",
    multiple=True,
    metavar="NAME=N",
    help="Figure 5: parameters of a model that is no Whisper; repeatable.",
)
@click.option("--strength", default="1.0", show_default=True, help="Of the probes of caches: a number or auto.")
@SEED
@DEVICE
@click.pass_context
def figure_command(
    ctx: click.Context, /, number: str, inputs: tuple[str, ...], robustness: tuple[str, ...], out: Path, strength: str,
    seed: int, device: str, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Draw figure NUMBER of the paper (1, 2, 3 or 5) from INPUTS; the numbers drawn lie beside it as JSON.

    INPUTS are caches, which are probed, and files with what `probe`, `robustness` or `train-head` printed with --json.
    NAME=PATH calls one by another name than its backbone's.

    \b
        1  accuracy against layer; with --robustness also WER against SNR
        2  how well each class is recognised, against how much it disturbs transcription
        3  how many classes are best recognised in each layer
        5  tagging and WER against the size of the model

    \b
        whisper-at-cli figure 1 tiny.zarr base.zarr --robustness tiny.json --robustness base.json --out fig1.pdf
        whisper-at-cli figure 2 base.zarr --robustness base.json --out fig2.pdf
        whisper-at-cli figure 3 base.zarr --out fig3.svg
        whisper-at-cli figure 5 tiny-head.json base-head.json --robustness tiny.json --robustness base.json --out 5.png
    """
    from whisper_at_cli.probe.figures import canvas
    from whisper_at_cli.probe.figures.inputs import ROBUSTNESS, load_results, only

    draw = _drawing(ctx, number, options)
    canvas.checked_path(out)
    _spare_inputs(out, (*inputs, *robustness))
    probe = _prober(ctx, strength=strength, layer=options["layer"], device=device, seed=seed)
    results = load_results(inputs, probe)
    results += only(load_results(robustness, probe), ROBUSTNESS, "--robustness")
    numbers = draw(results, out)
    if as_json:
        print_json(numbers)
    else:
        click.echo(f"{out}; the numbers: {out.with_suffix('.json')}")


FIGURE_OPTIONS: dict[str, tuple[str, ...]] = {
    "1": ("wer", "chance"),
    "2": ("wer", "layer", "low_snr", "high_snr"),
    "3": (),
    "5": ("wer", "snr", "parameters"),
}


def _drawing(ctx: click.Context, number: str, options: dict) -> Callable[..., dict]:
    """The function that draws this figure, with its options. Raises UsageError for those of another figure."""
    from whisper_at_cli.probe import figures

    if number not in FIGURE_OPTIONS:
        raise UsageError(f"there is no figure {number} to draw; choose from {', '.join(FIGURE_OPTIONS)}")
    for option in options:
        if option not in FIGURE_OPTIONS[number] and _was_given(ctx, option):
            takers = [figure for figure, taken in FIGURE_OPTIONS.items() if option in taken]
            raise UsageError(f"--{option.replace('_', '-')} is for figure {' or '.join(takers)}; leave it out")
    if options["wer"] not in ("whisper", "paper"):
        raise UsageError(f"--wer {options['wer']} is not known; choose from whisper, paper")
    taken = {option: options[option] for option in FIGURE_OPTIONS[number]}
    if "parameters" in taken:
        taken["parameters"] = dict(map(_named_number, taken["parameters"]))
    return functools.partial(getattr(figures, f"draw_figure_{number}"), **taken)


def _spare_inputs(out: Path, inputs: tuple[str, ...]) -> None:
    """Raises UsageError where the numbers beside the figure would replace a result that it is drawn from."""
    numbers = out.with_suffix(".json")
    if any(numbers.exists() and Path(path).exists() and numbers.samefile(path) for path in _paths(inputs)):
        raise UsageError(f"the numbers of {out} go to {numbers}, which is one of the inputs; choose another --out")


def _paths(inputs: tuple[str, ...]) -> list[str]:
    """Of inputs that may be NAME=PATH, both readings."""
    return [path for text in inputs for path in (text, text.partition("=")[2]) if path]


def _named_number(text: str) -> tuple[str, int]:
    name, _, count = text.rpartition("=")
    try:
        value = float(count)
    except ValueError:
        value = 0
    if not name or not 1 <= value < 1e15:
        raise UsageError(f"--parameters {text} is not of the form NAME=N, such as hubert-xlarge=964e6")
    return name, round(value)


def _prober(
    ctx: click.Context, *, strength: str, layer: int | None, device: str, seed: int
) -> Callable[[Path | str], ProbeResult]:
    """A function from the path of a cache to the result of its probes."""

    def probe(path: Path | str) -> ProbeResult:
        from whisper_at_cli.extract import FeatureCache
        from whisper_at_cli.probe import probe_layers

        opened = FeatureCache.open(path)
        with progress_on_stderr(f"probe {path}", "layers", quiet=ctx.obj["quiet"]) as progress:
            result = probe_layers(
                opened, layers="all" if layer is None else [layer], strength=_strength(strength), device=device,
                seed=seed, progress=progress,
            )  # fmt: skip
        print_notes(result.warnings)
        return result

    return probe


@command("cka")
@CACHE
@click.argument("other", required=False, type=ADDRESS)
@click.option("--figure", type=click.Path(path_type=Path), help="Draw the similarities as a heat map here.")
def cka_command(cache: Path | str, other: Path | str | None, figure: Path | None, as_json: bool) -> None:
    """Measure how similar the layers of CACHE are to each other, or to the layers of OTHER, with linear CKA.

    Uses the debiased form, on the means over time: 1 is the same up to rotation and scale, 0 is unrelated. OTHER may
    come from another model; clips are matched by id.

    \b
        whisper-at-cli cka esc50.zarr --figure cka.pdf
        whisper-at-cli cka tiny.zarr base.zarr --json
    """
    from whisper_at_cli.extract import FeatureCache
    from whisper_at_cli.probe.similarity import layer_similarity

    found = layer_similarity(FeatureCache.open(cache), FeatureCache.open(other) if other else None)
    print_notes(found.warnings)
    if figure:
        from whisper_at_cli.probe.figures import draw_similarity

        draw_similarity(found, figure)
        click.echo(f"figure: {figure}", err=True)
    if as_json:
        print_json(found)
        return
    header = (f"{found.first} \\ {found.second}", *(f"{layer}" for layer in range(1, len(found.cka[0]) + 1)))
    print_table([(layer, *map(_short, row)) for layer, row in enumerate(found.cka, start=1)], header)
    click.echo(f"debiased linear CKA of {found.clips} clips' time means; rows and columns are layers")


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


COMMANDS = (probe_command, figure_command, cka_command)
