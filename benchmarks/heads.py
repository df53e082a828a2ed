"""How fast heads train from a cache, beside a tensor already on the device and beside one npz a clip, in one run.

    python benchmarks/heads.py
    python benchmarks/heads.py --clips 4096 --batch 48 --folder /data/scratch     # a GPU
    python benchmarks/heads.py --as20k                                            # a GPU with 64 GB of disk
    python benchmarks/heads.py --as20k --scale 0.002 --epochs 2                   # the same, small, on a CPU

Random features of (clips, layers, 25, channels) float16 and random labels. Each thing is measured in turn, several
rounds, and each one's best round counts: other work on a shared machine only ever slows a round down.

one tensor       steps of TL-Tr on one batch that lies on the device already: no loading, mixing or masking
memory, stream   steps of TL-Tr from the cache in that tier; on a GPU also `device`. Waiting: share of the time in which
                 the clips of the next step have not come yet
mlp              an epoch of WA-MLP from the cache's means
npz              WA-MLP as the original project trains: compressed npz files, mixup in the dataset, two loader workers

--as20k trains TL-Tr for the recipe's 30 epochs on as many clips as AudioSet-20K has, with the tier it chooses.

Prints JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from record import (
    Figure,
    Result,
    Row,
    arguments,
    at_least,
    at_most,
    describe,
    gpu_name,
    in_folder,
    publish,
    rounded,
    settings,
)  # fmt: skip

from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable, FeatureCache, ShardBlock, Status
from whisper_at_cli.extract.devices import choose_device
from whisper_at_cli.heads import build_head, train_head
from whisper_at_cli.heads.training.batches import draw_epoch
from whisper_at_cli.heads.training.data import Clips, load_clips
from whisper_at_cli.heads.training.fleet import Fleet
from whisper_at_cli.heads.training.loader import Batch, Epochs
from whisper_at_cli.heads.training.plan import fastest_precision
from whisper_at_cli.heads.training.ranks import Ranks
from whisper_at_cli.heads.training.recipe import Recipe, named_recipe

FRAMES = 25
AS20K_CLIPS, VALIDATION_CLIPS = 20_550, 512
EPOCHS = 4  # of one measurement; a recipe has thirty
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TIERS = {"device": "from the device's memory", "memory": "from main memory", "stream": "streaming"}


def write_cache(path: Path, options: argparse.Namespace, clips: int, validation: int = 0) -> FeatureCache:
    """A cache of random features; every shard holds the same ones, in another order."""
    names = tuple(f"c{c}" for c in range(options.classes))
    spec = CacheSpec(
        "benchmark",
        "0",
        options.layers,
        options.channels,
        10.0,
        class_names=names,
    )
    rng, total = np.random.default_rng(0), clips + validation
    ids = np.array([f"clip{i}" for i in range(total)])
    split = np.array(["train"] * clips + ["valid"] * validation) if validation else np.full(total, "")
    labels = (rng.random((total, options.classes)) < 2 / options.classes).astype(np.uint8)
    table = ClipTable(ids, ids, np.zeros(total, np.int16), split, labels)
    block = None
    with CacheWriter.create(path, spec, table) as writer:
        for shard in writer.pending_shards():
            rows = writer.rows(shard)
            if block is None or len(block.status) != len(rows):
                block = ShardBlock.empty(len(rows), spec)
                block.features[:] = rng.standard_normal(block.features.shape, dtype=np.float32)
                block.mean[:] = block.features.mean(axis=2, dtype=np.float32)
                block.status[:], block.valid_frames[:] = Status.DONE, FRAMES
            writer.write(shard, block)
    return FeatureCache.open(path)


def synchronised(device: torch.device, clock: str = "wall") -> float:
    """The time, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return CLOCKS[clock]()


def train_epochs(clips: Clips, fleet: Fleet, recipe: Recipe, number: int, clock: str) -> tuple[float, float]:
    """Clips per second of EPOCHS epochs, the first from a standing start, and the share of their time that steps waited
    for clips."""
    epochs, waited = Epochs(clips, recipe, Ranks(), CLOCKS[clock]), 0.0
    positions = np.arange(len(clips.rows))
    draws = [
        draw_epoch(positions, recipe, np.random.default_rng([number, n]), frames=clips.frames, layers=clips.layers)
        for n in range(EPOCHS)
    ]
    started = synchronised(clips.device, clock)
    for epoch, draw in enumerate(draws):
        for step, batch in enumerate(epochs.batches([draw], (number, epoch))):
            waited += batch.waited
            if step == len(draw) // recipe.batch_size // 2 and epoch + 1 < EPOCHS:
                epochs.read_ahead([draws[epoch + 1]], (number, epoch + 1))
            fleet.step(batch, np.array([recipe.lr]), Ranks())
    seconds = synchronised(clips.device, clock) - started
    return EPOCHS * len(positions) / seconds, waited / seconds


def train_on_one_tensor(fleet: Fleet, options: argparse.Namespace, steps: int) -> float:
    """Clips per second of as many steps on one batch that lies on the device."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, options.batch, options.layers, FRAMES, options.channels, generator=generator)
    targets = torch.rand(1, options.batch, options.classes, generator=generator)
    weight = torch.full((1, options.batch), 1 / options.batch)
    inputs, targets, weight = (tensor.to(fleet.device) for tensor in (inputs, targets, weight))
    batch = Batch(inputs, targets, weight, np.ones(1, dtype=bool))
    started = synchronised(fleet.device, options.clock)
    for _ in range(steps):
        fleet.step(batch, np.array([1e-4]), Ranks())
    return steps * options.batch / (synchronised(fleet.device, options.clock) - started)


class NpzClips(torch.utils.data.Dataset):
    """One compressed npz a clip, half of them mixed with another that is loaded for it."""

    def __init__(self, folder: Path, cache: FeatureCache, count: int):
        self.folder, self.labels = folder, cache.labels[:count].astype(np.float32)
        self.rng = np.random.default_rng()
        for row in range(count):
            np.savez_compressed(folder / f"{row}.npz", cache.features([row])[0])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        features, labels = self._load(index)
        if self.rng.random() < 0.5:
            share, other = self.rng.beta(10, 10), self._load(int(self.rng.integers(len(self))))
            features, labels = (share * a + (1 - share) * b for a, b in zip((features, labels), other, strict=True))
        return features.astype(np.float32), labels.astype(np.float32)

    def _load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.load(self.folder / f"{index}.npz")["arr_0"].astype(np.float32), self.labels[index]


def train_from_npz(dataset: NpzClips, fleet: Fleet, batch_size: int) -> tuple[float, float]:
    """Clips per second of an epoch from npz files, and the share of its time spent waiting for them."""
    loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, num_workers=2)
    waited, done, started = 0.0, 0, time.perf_counter()
    batches = iter(loader)
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        inputs, targets = (part.to(fleet.device)[None] for part in batch)
        weight = torch.full(targets.shape[:2], 1 / targets.shape[1], device=fleet.device)
        fleet.step(Batch(inputs, targets, weight, np.ones(1, dtype=bool)), np.array([1e-3]), Ranks())
        done += targets.shape[1]
    seconds = synchronised(fleet.device) - started
    return done / seconds, waited / seconds


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """One cache in each tier, and the two heads that train from it."""

    device: torch.device
    clips: dict[str, Clips]  # by tier
    means: Clips
    npz: NpzClips
    recipe: Recipe
    fleet: Fleet
    mlp_recipe: Recipe
    mlp: Fleet

    @classmethod
    def of(cls, options: argparse.Namespace, folder: Path) -> Setup:
        device = choose_device(options.device)
        cache, rows = write_cache(folder / "a.zarr", options, options.clips), np.arange(options.clips)
        shape = {"layers": options.layers, "dim": options.channels, "classes": options.classes}
        recipe = dataclasses.replace(
            named_recipe("as20k", "tl-tr", dim=options.channels, width=options.dim), batch_size=options.batch,
            precision=fastest_precision("tl-tr", device),
        )  # fmt: skip
        of_mlp = named_recipe("as20k", "wa-mlp", dim=options.channels).with_changes(precision="float32")
        of_mlp = dataclasses.replace(of_mlp, batch_size=options.batch)
        tiers = ["device"] * (device.type != "cpu") + ["memory", "stream"]
        return cls(
            device, {tier: load_clips(cache, rows, "features", device, tier) for tier in tiers},
            load_clips(cache, rows, "mean", device), NpzClips(folder, cache, min(options.clips, options.npz_clips)),
            recipe, Fleet([build_head("tl-tr", width=options.dim, **shape)], recipe, device),
            of_mlp, Fleet([build_head("wa-mlp", **shape)], of_mlp, device),
        )  # fmt: skip


def measure(options: argparse.Namespace, folder: Path) -> Result:
    setup = Setup.of(options, folder)
    rates: dict[str, float] = {}
    waits: dict[str, float] = {}

    def keep(name: str, rate: float, waited: float = 0.0) -> None:
        if rate > rates.get(name, 0):
            rates[name], waits[name] = rate, waited

    train_on_one_tensor(setup.fleet, options, 1)  # what is set up once is not measured
    for number in range(options.rounds):
        keep("one tensor", train_on_one_tensor(setup.fleet, options, max(1, options.clips // options.batch)))
        for tier, clips in setup.clips.items():
            keep(tier, *train_epochs(clips, setup.fleet, setup.recipe, number, options.clock))
        for _ in range(5):
            keep("mlp", *train_epochs(setup.means, setup.mlp, setup.mlp_recipe, number, "wall"))
        keep("npz", *train_from_npz(setup.npz, setup.mlp, options.batch))
    ratios = {f"{tier} / one tensor": rounded(rates[tier] / rates["one tensor"]) for tier in setup.clips}
    return {
        "precision": setup.recipe.precision,
        "rates": {name: {"clips/s": rounded(rates[name]), "waiting": rounded(waits[name])} for name in rates},
        "epochs": EPOCHS,
        "ratios": ratios | {
            "mlp / npz": rounded(rates["mlp"] / rates["npz"]), "waiting, stream": rounded(waits["stream"])
        },
    }  # fmt: skip


def measure_as20k(options: argparse.Namespace, folder: Path) -> Result:
    clips, validation = (max(8, round(options.scale * count)) for count in (AS20K_CLIPS, VALIDATION_CLIPS))
    started = time.perf_counter()
    cache = write_cache(folder / "a.zarr", options, clips, validation)
    written = time.perf_counter() - started
    changes = {"validate_every": 0} | ({"epochs": options.epochs} if options.epochs else {})
    result = train_head(
        cache, head="tl-tr", width=options.dim, recipe="as20k", changes=changes, device=options.device,
        tier=options.tier,
    )  # fmt: skip
    kept = {name: getattr(result, name) for name in ("tier", "device", "params")}
    measured = {name: rounded(getattr(result, name)) for name in ("seconds", "samples_per_second", "waiting_share")}
    return {
        "clips": clips, "validation_clips": validation, "epochs": result.recipe["epochs"],
        "precision": result.recipe["precision"], "batch": result.recipe["batch_size"],
        "seconds_to_write_the_cache": rounded(written), **kept, **measured, "minutes": rounded(result.seconds / 60),
    }  # fmt: skip


def rows(result: Result) -> list[Row]:
    rates, ratios, used = result["rates"], result["ratios"], result["settings"]
    of = f"TL-Tr-{used['dim']} on {used['layers']} layers of {used['channels']} channels, {used['classes']} classes"
    tensor = Figure(rates["one tensor"]["clips/s"], "clips/s", "one tensor that lies on the device")
    found = []
    for tier, name in TIERS.items():
        if tier in rates:
            asked = (at_least("share", 0.9),) if tier == "memory" else ()
            measured, share = Figure(rates[tier]["clips/s"], "clips/s"), ratios[f"{tier} / one tensor"]
            found.append(Row("heads", f"training {of}, {name}", measured, limit=tensor, share=share, asked=asked))
    found.append(
        Row(
            "heads", f"waiting for clips, share of the time; {of}, streaming", Figure(ratios["waiting, stream"]),
            limit=Figure(0, "", "no waiting"), asked=(at_most("measured", 0.05),),
        )
    )  # fmt: skip
    mlp, waiting = rates["mlp"]["clips/s"], rates["mlp"]["waiting"]
    found.append(
        Row(
            "heads", "training WA-MLP from the cache's means", Figure(mlp, "clips/s"),
            Figure(rates["npz"]["clips/s"], "clips/s", "one npz a clip, mixup, two loader workers"),
            ratios["mlp / npz"], Figure(rounded(mlp / (1 - waiting)), "clips/s", "its own steps without waiting"),
            rounded(1 - waiting, 3), (at_least("ratio", 10),),
        )
    )  # fmt: skip
    return found


def as20k_rows(result: Result) -> list[Row]:
    waiting, scale = result["waiting_share"], result["settings"]["scale"]
    part = "" if scale == 1 else f" ({scale:g} of AudioSet-20K)"
    return [
        Row(
            "heads", f"TL-Tr, {result['epochs']} epochs of {result['clips']} clips{part}, {result['tier']} tier",
            Figure(result["minutes"], "minutes"),
            limit=Figure(rounded(result["minutes"] * (1 - waiting)), "minutes", "its own steps without waiting"),
            share=rounded(1 / (1 - waiting), 3),
        )
    ]  # fmt: skip


def main() -> None:
    parser = arguments(
        __doc__, clips=64, layers=32, channels=1280, classes=527, dim=512, batch=16, rounds=2, npz_clips=48
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="of TL-Tr; cpu: processor time, for a CPU that others use too"
    )
    parser.add_argument("--as20k", action="store_true", help="train on as many clips as AudioSet-20K has instead")
    parser.add_argument("--scale", type=float, default=1.0, help="of --as20k: this share of the clips")
    parser.add_argument("--epochs", type=int, help="of --as20k, instead of the recipe's 30")
    parser.add_argument("--tier", default="auto", help="of --as20k, instead of the one that training chooses")
    parser.add_argument("--folder", help="where to write; a temporary folder without it")
    options = parser.parse_args()
    found = in_folder(measure_as20k if options.as20k else measure, options)
    name, its_rows = ("heads as20k", as20k_rows) if options.as20k else ("heads", rows)
    gpu = gpu_name(choose_device(options.device))
    found = {"settings": settings(options), **found}
    publish(describe(name, found, its_rows, packages=["torch", "numpy"], gpu=gpu), options.out)


if __name__ == "__main__":
    main()
