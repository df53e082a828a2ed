"""Which head tells short events best: all heads on scenes made of ESC-10 and speech, with settings chosen by folds.

    python benchmarks/scenes.py --sounds ../shared/data/esc10 --speech ../shared/data/speech14 --folder scenes
    python benchmarks/scenes.py ... --head wa-pool --head tl-tr-128 --scenes 1000 --seeds 1

Makes the scenes (`scene_sounds.py`) and their cache, then trains each head: for every fold of ESC-10 its learning rate
is chosen on the other folds, and its test scenes take part in no choice. Values are mAP with 95 % intervals over
scenes; differences are paired by scene. Events are found in windows of 2 s, every 0.4 s, from a probability on that was
best on the other folds, and compared with the truth second by second. What a run has finished is kept in --folder, and
the same command goes on from there. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import Figure, Result, Row, arguments, at_least, at_most, describe, publish, rounded, settings
from scene_sounds import SECONDS, Event, f1, make_scenes, read_events

from whisper_at_cli.extract import FeatureCache, extract
from whisper_at_cli.extract.evaluation.compare import compare
from whisper_at_cli.extract.evaluation.predictions import load_predictions
from whisper_at_cli.heads import load_head, search_heads, train_head
from whisper_at_cli.heads.count import head_cost
from whisper_at_cli.heads.forms import FORMS, WAPool, head_form
from whisper_at_cli.heads.tagging.events import cells

WINDOW_FRAMES, HOP_FRAMES = 5, 1
THRESHOLDS = np.linspace(0.02, 0.9, 45)


class WithoutQueries(WAPool):
    queries = 0


class WithoutMaximum(WAPool):
    maximum = False


ABLATIONS = {"wa-pool-mean-max": WithoutQueries, "wa-pool-no-maximum": WithoutMaximum}


@dataclass(frozen=True)
class Contestant:
    """A head, and how it is trained; by the recipe `modern` unless it says otherwise."""

    head: str
    width: int | None = None
    block: bool = True
    recipe: str = "modern"
    changes: dict[str, Any] = field(default_factory=dict)


BEST, PEER, LINEAR = "wa-pool", "tl-tr-128", "concat-linear"
STANDARDISED = {"standardise": True}
CONTESTANTS = {
    BEST: Contestant("wa-pool"),
    "wa-pool without block": Contestant("wa-pool", block=False),
    "wa-pool, features as they are": Contestant("wa-pool", changes={"standardise": False}),
    "wa-pool without queries": Contestant("wa-pool-mean-max", changes=STANDARDISED),
    "wa-pool without maximum": Contestant("wa-pool-no-maximum", changes=STANDARDISED),
    PEER: Contestant("tl-tr", 128),
    "tl-tr-128, standardised": Contestant("tl-tr", 128, changes=STANDARDISED),
    "tl-tr-128 by the paper's recipe": Contestant("tl-tr", 128, recipe="as20k"),
    "tl-tr-512": Contestant("tl-tr", 512),
    "wa-tr-128": Contestant("wa-tr", 128),
    "wa-tr": Contestant("wa-tr"),
    "wa-mlp": Contestant("wa-mlp"),
    "last-mlp": Contestant("last-mlp"),
    LINEAR: Contestant("concat-linear"),
    "concat-linear-stats": Contestant("concat-linear-stats"),
}


def train(cache: FeatureCache, one: Contestant, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train a head on every fold; what is said of it is the JSON of `train-head`."""
    known = out / "found.json"
    if known.exists():
        return json.loads(known.read_text())
    kept = {"head": one.head, "out": out, "seeds": options.seeds, "device": options.device,
            "predictions": out.with_suffix(".npz")}  # fmt: skip
    if head_form(one.head).solved:
        found = train_head(cache, **kept)
    else:
        changes = {"validate_every": 0} | one.changes | ({"epochs": options.epochs} if options.epochs else {})
        found = search_heads(
            cache, widths=None if one.width is None else [one.width], block=one.block, recipe=one.recipe,
            changes=changes, rates=options.rates, **kept,
        )  # fmt: skip
    known.write_text(json.dumps(asdict(found)))
    return asdict(found)


@torch.no_grad()
def events_f1(cache: FeatureCache, truth: dict[str, list[Event]], out: Path, seeds: int) -> float:
    """F1 over seconds and classes of the events that the first seed's heads find in the scenes of their test folds, a
    label being there from a probability on that is best on the other folds."""
    names, folds = list(cache.spec.class_names), np.unique(cache.fold[cache.done]).tolist()
    there: dict[int, np.ndarray] = {}
    heard: dict[int, np.ndarray] = {}  # by fold: (scenes, seconds, classes) probabilities
    for fold in folds:
        module = load_head(out / (f"seed-0/fold-{fold}" if seeds > 1 else f"fold-{fold}"))
        rows = np.flatnonzero(cache.done & (cache.fold == fold))
        features = torch.from_numpy(cache.features(rows)).float()
        starts = range(0, features.shape[2] - WINDOW_FRAMES + 1, HOP_FRAMES)
        logits = torch.stack([module(features[:, :, at : at + WINDOW_FRAMES]) for at in starts], dim=1)
        values = (logits.softmax(dim=2) if module.description.loss == "ce" else logits.sigmoid()).numpy()
        frame = cache.spec.clip_seconds / features.shape[2]
        spans = np.array([(at * frame, (at + WINDOW_FRAMES) * frame) for at in starts])
        heard[fold] = np.stack([by_second(spans, of_windows) for of_windows in values])
        there[fold] = np.stack([active(truth.get(str(cache.paths[row]), []), names) for row in rows])
    said = {}
    for fold in folds:
        others = [other for other in folds if other != fold]
        true, values = (np.concatenate([side[other] for other in others]) for side in (there, heard))
        said[fold] = heard[fold] >= max(THRESHOLDS, key=partial(f1_from, true, values))
    return f1(np.concatenate(list(there.values())), np.concatenate(list(said.values())))


def f1_from(true: np.ndarray, values: np.ndarray, threshold: float) -> float:
    """F1 of what has this probability or more."""
    return f1(true, values >= threshold)


def by_second(spans: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """(seconds, classes): what the windows over the middle of each second say, as a mean."""
    edges, values = cells(spans, probabilities)
    middle = np.arange(SECONDS) + 0.5
    return values[np.clip(np.searchsorted(edges, middle, side="right") - 1, 0, len(values) - 1)]


def active(events: list[Event], names: list[str]) -> np.ndarray:
    """(seconds, classes) bool: whether a label sounds at any time of each second."""
    grid = np.zeros((SECONDS, len(names)), dtype=bool)
    for event in events:
        grid[int(event.start) : int(np.ceil(event.end)), names.index(event.label)] = True
    return grid


def multiply_adds(one: Contestant, cache: FeatureCache) -> int | None:
    """Of one clip, by formula; None of a form that is counted nowhere else."""
    if one.head in ABLATIONS:
        return None
    spec = cache.spec
    cost = head_cost(
        one.head, layers=spec.layers, dim=spec.dim, classes=len(spec.class_names), frames=spec.frames, width=one.width,
        block=one.block,
    )  # fmt: skip
    return cost.multiply_adds


def measure(options: argparse.Namespace, folder: Path) -> Result:
    FORMS.update(ABLATIONS)  # here, since importing this program must change no form
    manifest = make_scenes(options.sounds, options.speech, folder / f"scenes-{options.scenes}", options.scenes)
    cache_path = folder / f"scenes-{options.scenes}.zarr"
    report = extract(manifest, cache_path, model=options.model, device=options.device)
    assert report.failed == 0, "every scene was written here"
    cache, truth = FeatureCache.open(cache_path), read_events(manifest)
    heads: dict[str, Any] = {}
    scored = []
    for name in options.head or CONTESTANTS:
        one, out = CONTESTANTS[name], folder / f"{name.replace(',', '').replace(' ', '-')}-{options.scenes}"
        found = train(cache, one, out, options)
        scored.append((name, load_predictions(out.with_suffix(".npz"))))
        heads[name] = {
            "mAP": rounded(found["value"]), "seeds": [rounded(each["value"]) for each in found["seeds"]],
            "params": found["params"], "multiply_adds": multiply_adds(one, cache),
            "chosen": {str(fold["fold"]): rounded(fold.get("lr") or fold["strength"]) for fold in found["folds"]},
            "events_f1": rounded(events_f1(cache, truth, out, options.seeds)),
            "training_seconds": rounded(found["seconds"]),
        }  # fmt: skip
    pairs = []
    if len(scored) > 1:
        compared = compare(scored)
        names = {system["name"]: name for name, system in zip(heads, compared.systems, strict=True)}
        for system in compared.systems:
            heads[names[system["name"]]]["ci95"] = [rounded(end) for end in system["ci95"]]
        pairs = [
            {"a": names[pair["a"]], "b": names[pair["b"]], "difference": rounded(pair["difference"]),
             "ci95": [rounded(end) for end in pair["ci95"]], "p": pair["p"], "p_adjusted": pair["p_adjusted"]}
            for pair in compared.pairs if BEST in (names[pair["a"]], names[pair["b"]])
        ]  # fmt: skip
    return {
        "settings": settings(options, "head"), "scenes": len(cache), "backbone": cache.spec.backbone,
        "classes": len(cache.spec.class_names), "heads": heads, "pairs": pairs,
    }  # fmt: skip


def rows(result: Result) -> list[Row]:
    of = f"{result['scenes']} scenes, `{result['backbone']}`"
    heads, made = result["heads"], []
    peer = heads.get(PEER)
    for name, found in heads.items():
        low, high = found.get("ci95", (float("nan"),) * 2)
        seeds = len(found["seeds"])
        what = f"mAP of {name}, {of}, nested selection, {seeds} seed{'s' * (seeds > 1)}; 95 % interval {low:.3f} to "
        other = LINEAR if name == PEER else PEER
        beside = heads.get(other) if other != name else None
        made.append(
            Row(
                "scenes", f"{what}{high:.3f}", Figure(found["mAP"]),
                Figure(beside["mAP"], "", other) if beside else None,
                rounded(found["mAP"] / beside["mAP"]) if beside else None,
                asked=(at_least("ratio", 1),) if name == BEST and beside else (),
            )
        )  # fmt: skip
    if peer and BEST in heads:
        best = heads[BEST]
        made += [
            Row(
                "scenes", f"F1 of events at 1 s of {BEST}, {of}", Figure(best["events_f1"]),
                Figure(peer["events_f1"], "", PEER), rounded(best["events_f1"] / peer["events_f1"]),
                Figure(rounded(peer["events_f1"] + 0.05), "", f"0.05 more than {PEER}"),
                rounded(best["events_f1"] / (peer["events_f1"] + 0.05)), (at_least("share", 1),),
            ),
            Row(
                "scenes", f"multiply-adds of {BEST} for a clip, {of}", Figure(best["multiply_adds"] / 1e6, "M"),
                Figure(peer["multiply_adds"] / 1e6, "M", PEER),
                rounded(best["multiply_adds"] / peer["multiply_adds"]), asked=(at_most("ratio", 1 / 3),),
            ),
        ]  # fmt: skip
    return made


def main() -> None:
    parser = arguments(__doc__, scenes=2000, seeds=3)
    parser.add_argument("--sounds", type=Path, required=True, help="ESC-10, in ESC-50's layout")
    parser.add_argument(
        "--speech", type=Path, required=True, help="a folder with manifest.csv, which has a column audio"
    )
    parser.add_argument("--model", default="tiny.en")
    parser.add_argument("--head", action="append", choices=CONTESTANTS, help="repeatable; by default all")
    parser.add_argument("--rates", type=float, nargs="*", default=(5e-4, 1e-3, 3e-3), help="that are chosen from")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's 30")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, required=True, help="keep scenes, cache and heads here")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found = measure(options, options.folder)
    publish(describe("scenes", found, rows, packages=["torch", "numpy"]), options.out)


if __name__ == "__main__":
    main()
