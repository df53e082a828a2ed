"""Text and tags in one encoder pass against `whisper.transcribe` alone, and how good the tags are, in one run.

    python benchmarks/transcribe.py --speech SPEECH --sounds ESC-10 --cache esc10.zarr
    python benchmarks/transcribe.py ... --parts events windows --head tl-tr --dim 128

SPEECH holds a manifest.csv with a column `audio`, ESC-10 has ESC-50's layout, the cache is what `extract` made of it.
Clips of a fold are joined with the speech into a file whose times are known; the head that tags it has not seen them.
Prints JSON. `time`: interleaved repeats, median; `events`: segment-level F1 at 1 s; `windows`: accuracy of the head on
each fold's clips, un-padded, joined in 30 s windows, and alone in a zero-padded 30 s window.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import whisper
from record import Figure, Result, Row, arguments, at_least, at_most, describe, publish, settings
from scene_sounds import esc_rows, f1, read_utterances
from torch import Tensor
from whisper.decoding import DecodingOptions, DecodingResult
from whisper.model import Whisper

from whisper_at_cli.extract import FeatureCache
from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.audio.decode import decode
from whisper_at_cli.heads import Tagger, train_head
from whisper_at_cli.heads.tagging.events import EventSettings

CASES: dict[str, dict[str, Any]] = {  # options of whisper.transcribe
    "greedy": {"temperature": 0.0},
    "default": {},
    "fallback": {"temperature": (0.0, 0.2, 0.4), "logprob_threshold": -0.2},
}
CASE_NAMES = {"greedy": "greedy", "default": "Whisper's own temperatures", "fallback": "every window falls back"}
BOUNDS = {"greedy": 1.03, "fallback": 1.0}  # of whisper.transcribe's time
EVENTS = EventSettings(on=0.5, off=0.4, min_duration=2.0, merge_gap=1.0)
FOLDS = 5
PADDED_CLIPS = 20  # of each fold: each takes an encoder pass of its own


class EncodesOnly(Whisper):
    """A Whisper that hears no speech: transcribing runs the encoder from window to window and nothing else."""

    def decode(self, mel: Tensor, options: DecodingOptions | None = None, **_settings: Any) -> DecodingResult:
        heard = self.encoder(mel[None])[0]
        return DecodingResult(heard, "en", no_speech_prob=1.0, avg_logprob=-9.0, temperature=0.0, compression_ratio=1.0)


def sound(sounds: Path, row: dict[str, Any]) -> np.ndarray:
    samples = decode(sounds / "audio" / row["filename"])[: 5 * SAMPLE_RATE]
    return np.pad(samples, (0, 5 * SAMPLE_RATE - len(samples)))


def joined(speech: Path, sounds: Path, fold: int, seconds: float, seed: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Utterances with sounds between them, of about `seconds`, and what sounds when."""
    rng = np.random.default_rng(seed)
    utterances = read_utterances(speech)
    rows = [row for row in esc_rows(sounds) if int(row["fold"]) == fold]
    by_class = {name: rng.permutation(np.asarray([row for row in rows if row["category"] == name])) for name in
                sorted({row["category"] for row in rows})}  # fmt: skip
    count = round((seconds - sum(map(len, utterances)) / SAMPLE_RATE) / 5)
    names = list(by_class)
    chosen = [by_class[names[n % len(names)]][n // len(names)] for n in range(count)]
    pieces = [(sound(sounds, row), row["category"]) for row in chosen] + [(piece, None) for piece in utterances]
    samples, truth, at = [], [], 0
    for index in rng.permutation(len(pieces)):
        piece, label = pieces[index]
        if label:
            truth.append({"start": at / SAMPLE_RATE, "end": (at + len(piece)) / SAMPLE_RATE, "label": label})
        samples.append(piece)
        at += len(piece)
    return np.concatenate(samples), truth


def active(events: list[dict[str, Any]], names: list[str], seconds: float) -> np.ndarray:
    """(seconds, classes) bool: whether a label is there at the middle of each second."""
    grid = np.zeros((int(np.ceil(seconds)), len(names)), bool)
    middle = np.arange(len(grid)) + 0.5
    for event in events:
        grid[(middle >= event["start"]) & (middle < event["end"]), names.index(event["label"])] = True
    return grid


def share(part: np.ndarray, whole: np.ndarray) -> float | None:
    """How much of the whole the part is; None where there is nothing."""
    return round(float(part.sum() / whole.sum()), 4) if whole.any() else None


def events_of_joined_files(head: Path, options: argparse.Namespace) -> dict[str, Any]:
    """F1 over seconds and labels for a joined file of each fold's clips, for both tag windows."""
    ways: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"shared": [], "exact": []}
    grid = {"resolution": options.resolution, "hop": options.hop, "events": EVENTS, "temperature": 0.0}
    model = None
    names: list[str] = []
    for fold in range(1, FOLDS + 1):
        tagger = Tagger.from_checkpoint(head / f"fold-{fold}", model=model)
        model = tagger.whisper
        samples, truth = joined(options.speech, options.sounds, fold, options.seconds, seed=fold)
        names, seconds = list(tagger.description.class_names), len(samples) / SAMPLE_RATE
        for way, found in ways.items():
            events = tagger.transcribe(samples, tag_window=way, **grid)["events"]
            found.append((active(truth, names, seconds), active(events, names, seconds)))
    result = {}
    for way, found in ways.items():
        t, f = (np.concatenate(parts) for parts in zip(*found, strict=True))
        result[way] = {
            "f1": round(f1(t, f), 4), "fold_f1": [round(f1(*pair), 4) for pair in found],
            "precision": share(t & f, f), "recall": share(t & f, t),
            "class_f1": {name: round(f1(t[:, i], f[:, i]), 4) for i, name in enumerate(names)},
        }  # fmt: skip
    return result


def timed(
    tagger: Tagger, samples: np.ndarray, options: dict[str, Any], repeats: int, ways: list[str]
) -> dict[str, Any]:
    """Seconds of whisper.transcribe and of text with tags, one after the other, and whether the texts are the same."""
    seconds: dict[str, list[float]] = {name: [] for name in ("whisper", *ways)}
    model = tagger.whisper  # loaded now: making it draws random numbers too
    reference: dict[str, Any] = {}
    passes = 0
    for _ in range(repeats):
        for name in seconds:
            torch.manual_seed(0)
            started = time.perf_counter()
            if name == "whisper":
                reference = whisper.transcribe(model, samples, fp16=False, **options)
            else:
                result = tagger.transcribe(samples, seed=0, tag_window=name, **options)
                same = result["text"] == reference["text"] and len(result["segments"]) == len(reference["segments"])
                assert same, (result["text"], reference["text"])
                times = [[s[k] for k in ("start", "end", "tokens", "seek")] for s in result["segments"]]
                assert times == [[s[k] for k in ("start", "end", "tokens", "seek")] for s in reference["segments"]]
                passes = result["settings"]["encoder_passes"]
            seconds[name].append(time.perf_counter() - started)
    medians = {name: round(statistics.median(all_of), 3) for name, all_of in seconds.items()}
    ratios = {name: round(statistics.median(np.divide(seconds[name], seconds["whisper"])), 3)
              for name in ways}  # fmt: skip
    fallbacks = sum(segment["temperature"] > 0 for segment in reference["segments"])
    return {"seconds": medians, "ratio_to_whisper": ratios, "encoder_passes": passes, "text_is_the_same": True,
            "segments": len(reference["segments"]), "of_them_after_fallback": fallbacks}  # fmt: skip


def accuracy_of_windows(head: Path, sounds: Path) -> dict[str, Any]:
    """Accuracy on each fold's clips of the head that has not seen them, for three ways to come by the frames."""
    right, count = ({"exact": 0, "joined": 0, "padded": 0} for _ in range(2))
    for fold in range(1, FOLDS + 1):
        tagger = Tagger.from_checkpoint(head / f"fold-{fold}")
        silent = copy.copy(tagger.whisper)
        silent.__class__ = EncodesOnly
        tagger._whisper = silent
        rows = [row for row in esc_rows(sounds) if int(row["fold"]) == fold]
        rows = list(np.random.default_rng(fold).permutation(np.asarray(rows)))
        clips = [sound(sounds, row) for row in rows]
        together = tagger.transcribe(np.concatenate(clips), all_labels=True)["tags"]
        exact = tagger.transcribe(np.concatenate(clips), all_labels=True, tag_window="exact")["tags"]
        alone = [tagger.transcribe(clip, all_labels=True)["tags"][0] for clip in clips[:PADDED_CLIPS]]
        for name, tags in (("exact", exact), ("joined", together), ("padded", alone)):
            found = [tag["labels"][0]["name"] for tag in tags]
            right[name] += sum(a == row["category"] for a, row in zip(found, rows, strict=False))
            count[name] += len(found)
    return {"accuracy": {name: round(right[name] / count[name], 4) for name in right}, "clips": count}


def measure(options: argparse.Namespace, head: Path) -> Result:
    tagger = Tagger.from_checkpoint(head / "fold-1")
    samples, _ = joined(options.speech, options.sounds, 1, options.seconds, options.seed)
    about = tagger.description
    found: Result = {
        "settings": settings(options, "head", "dim"),
        "head": {"head": about.head, "width": about.width, "backbone": about.backbone, "value": about.value},
        "seconds_of_audio": round(len(samples) / SAMPLE_RATE, 2),
    }
    if "time" in options.parts:
        found["time"] = {
            case: timed(tagger, samples, CASES[case], options.repeats, options.ways) for case in options.cases
        }
    if "events" in options.parts:
        found["events"] = events_of_joined_files(head, options)
    if "windows" in options.parts:
        found["windows"] = accuracy_of_windows(head, options.sounds)
    return found


def rows(result: Result) -> list[Row]:
    of = f"`{result['head']['backbone']}`, {result['head']['head']}"
    of += f"-{result['head']['width']}" if result["head"]["width"] else ""
    found = []
    for case, timing in result.get("time", {}).items():
        for way, ratio in timing["ratio_to_whisper"].items():
            alone = Figure(timing["seconds"]["whisper"], "s", "`whisper.transcribe` alone")
            what = f"text and tags of {result['seconds_of_audio']:.0f} s, {CASE_NAMES[case]}, {way} windows; {of}"
            asked = (at_most("ratio", BOUNDS[case]),) if case in BOUNDS else ()
            found.append(Row("text and tags", what, Figure(timing["seconds"][way], "s"), alone, ratio, asked=asked))
    events = result.get("events", {})
    for way, measured in events.items():
        best = events["exact"]["f1"]
        exact = Figure(best, "F1", "exact windows") if way == "shared" else None
        of_exact = round(measured["f1"] / best, 3) if way == "shared" and best else None
        what = f"F1 of events at 1 s, five files, {way} windows; {of}, {result['head']['value']:g} on its folds"
        asked = (at_least("measured", 0.6),)
        found.append(Row("text and tags", what, Figure(measured["f1"], "F1"), limit=exact, share=of_exact, asked=asked))
    if "windows" in result:
        accuracy = result["windows"]["accuracy"]
        for way, name in (("joined", "six clips to a 30 s window"), ("padded", "one clip to a padded 30 s window")):
            found.append(
                Row(
                    "text and tags", f"accuracy on ESC-10, {name}; {of}", Figure(accuracy[way]),
                    limit=Figure(accuracy["exact"], "", "exact windows"),
                    share=round(accuracy[way] / accuracy["exact"], 3),
                )
            )  # fmt: skip
    return found


def main() -> None:
    parser = arguments(__doc__, repeats=3, seed=0)
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--sounds", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="of --sounds; not needed with --checkpoint")
    parser.add_argument("--checkpoint", type=Path, help="a folder with fold-1 to fold-5, in place of training")
    parser.add_argument("--head", default="wa-mlp")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--train-seed", type=int, help="of the head's training, in place of the recipe's")
    parser.add_argument("--parts", nargs="+", default=["time", "events", "windows"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ways", nargs="+", default=["shared"], choices=["shared", "exact"], help="that are timed")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--resolution", type=float, default=1.6, help="for events")
    parser.add_argument("--hop", type=float, default=0.4, help="for events")
    options = parser.parse_args()
    if not (options.cache or options.checkpoint):
        parser.error("give --cache or --checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        head = options.checkpoint or Path(folder)
        if not options.checkpoint:
            cache = FeatureCache.open(options.cache)
            train_head(cache, head=options.head, width=options.dim, out=head, seed=options.train_seed)
        found = measure(options, head)
    publish(describe("transcribe", found, rows, packages=["torch", "openai-whisper"]), options.out)


if __name__ == "__main__":
    main()
