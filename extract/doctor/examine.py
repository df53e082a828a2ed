"""Whether this installation works here, and how fast: everything is tried for itself, so that one fault hides no other.

Heavy modules are imported inside the functions that need them: a missing or broken one costs its own section alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from whisper_at_cli.extract.doctor.disk import DiskSpeed, Folder, examine_folder, measure_disk
from whisper_at_cli.extract.doctor.installed import PACKAGE, Dependency, Installation, examine_installation, one_line
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.machine import cores, free_memory_bytes, load, processor
from whisper_at_cli.extract.progress import Progress

if TYPE_CHECKING:
    from whisper_at_cli.extract.doctor.decoding import Decoding
    from whisper_at_cli.extract.doctor.device import TorchDevices

Arguments = ParamSpec("Arguments")
Found = TypeVar("Found")

CLIP_SECONDS = 10.0
MEASURED_MODEL = "tiny.en"
MEASURE_SECONDS = 1.0  # of each measurement
DECODE_SECONDS = 0.2  # of each container
DATASETS = {"1,000 clips": 1_000, "AudioSet-20K": 20_550, "AudioSet-2M": 2_000_000}
LITTLE_SPACE_BYTES = 2 << 30
STEPS = ("installation", "devices", "weights", "decoding", "folder", "disk", "matrix products", "encoder")
GUIDE = "see docs/troubleshooting.md"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Problem:
    """What is wrong and what to do. `serious` is what the core of this tool cannot do without."""

    what: str
    do: str
    serious: bool = True


@dataclass(frozen=True)
class Weights:
    """Whisper weights that need no download: of openai-whisper, with their size, and of the demo extra."""

    downloads_folder: str
    downloaded_mb: dict[str, float]
    demo: bool


@dataclass(frozen=True)
class EncoderSpeed:
    """The encoder alone, on clips in memory, by precision."""

    model: str
    clip_seconds: float
    clips_per_second: dict[str, float]
    stored_bytes_per_clip: int  # in a float16 cache


@dataclass(frozen=True)
class Speed:
    """What was measured on one device."""

    device: str
    matrix_gflops: dict[str, float]
    encoder: EncoderSpeed | None


@dataclass(frozen=True)
class Estimate:
    """How long `extract` would take in float32, and what would hold it back. Computed from rates, not measured."""

    model: str
    clip_seconds: float
    clips_per_second: float
    limits_clips_per_second: dict[str, float]  # encoder, decoding, disk: each by itself
    held_back_by: str
    hours: dict[str, float]  # of the datasets


@dataclass(frozen=True)
class Report:
    """All that was found. A part that could not be looked at is None, and `problems` says why."""

    ok: bool
    quick: bool
    installation: Installation | None
    processor: str
    cores: int
    load: float | None
    free_memory_bytes: int | None
    devices: TorchDevices | None
    weights: Weights | None
    decoding: Decoding | None
    folder: Folder
    disk: DiskSpeed | None
    speed: Speed | None
    estimate: Estimate | None
    problems: tuple[Problem, ...]


@dataclass
class _Examination:
    """Problems as they are found, and how far the work is."""

    progress: Progress | None
    problems: list[Problem] = field(default_factory=list)
    step: int = -1

    def say(self, message: str = "") -> None:
        if self.progress:
            self.progress(self.step, len(STEPS), message or STEPS[self.step])

    def begin(self) -> None:
        """The next step."""
        self.step += 1
        self.say()

    def attempt(
        self, function: Callable[Arguments, Found], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Found | None:
        """The function's result, or None where it fails; then there is a problem more."""
        self.begin()
        what = STEPS[self.step]
        try:
            return function(*arguments, **options)
        except ModuleNotFoundError as error:
            self.add_unless_known(f"{what}: {one_line(error)}", f"pip install {error.name}")
        except ImportError as error:
            self.add_unless_known(f"{what}: {one_line(error)}", f"pip install --force-reinstall {PACKAGE}")
        except WhisperATError as error:
            found, _, do = str(error).partition("; ")
            self.add(f"{what}: {found}", do or GUIDE)
        except Exception as error:  # noqa: BLE001 - whatever a broken library brings a check to
            self.add_unless_known(f"{what}: {one_line(error)}", GUIDE)
        return None

    def add_unless_known(self, what: str, do: str) -> None:
        """A problem that follows from a dependency's, where there is one, is not told as another."""
        if not any(problem.serious for problem in self.problems):
            self.add(what, do)

    def add(self, what: str, do: str, *, serious: bool = True) -> None:
        self.problems.append(Problem(what, do, serious))


def examine(
    folder: str | Path = ".", *, device: str = "auto", quick: bool = False, progress: Progress | None = None
) -> Report:
    """Look at installation, devices, weights, decoding and a folder; measure disk and device unless `quick`.

    Raises UsageError for a folder that does not exist.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give one that exists, such as where caches shall go")
    seen, busy = _Examination(progress), load()
    installation = seen.attempt(examine_installation, seen.say)
    _judge_installation(seen, installation)
    devices = seen.attempt(_devices)
    _judge_devices(seen, devices)
    weights = seen.attempt(_weights, seen)
    decoding = seen.attempt(_decoding, 0.0 if quick else DECODE_SECONDS, seen)
    _judge_decoding(seen, decoding)
    seen.begin()
    found = examine_folder(folder)  # which raises nothing
    _judge_folder(seen, found)
    disk = speed = estimate = None
    if not quick:
        _judge_load(seen, busy)
        disk = seen.attempt(measure_disk, folder) if found.writable else None
        seen.step = STEPS.index("disk")
        rates = seen.attempt(_matrix_rates, device)
        if rates:
            name, gflops = rates
            speed = Speed(name, gflops, seen.attempt(_encoder_speed, device, weights))
        estimate = _estimate(speed, decoding, disk, cores()) if speed and decoding and disk else None
    if progress:
        progress(len(STEPS), len(STEPS), "")
    return Report(
        ok=not any(problem.serious for problem in seen.problems), quick=quick, installation=installation,
        processor=processor(), cores=cores(), load=busy, free_memory_bytes=free_memory_bytes(), devices=devices,
        weights=weights, decoding=decoding, folder=found, disk=disk, speed=speed, estimate=estimate,
        problems=tuple(seen.problems),
    )  # fmt: skip


def _judge_installation(seen: _Examination, installation: Installation | None) -> None:
    if installation is None:
        return
    if not installation.python_ok:
        seen.add(
            f"Python {installation.python} is out of bounds ({installation.python_needs})",
            "make a new environment with a Python that is not",
        )
    if installation.version != installation.installed_version:
        seen.add(
            f"the code in {installation.place} is {installation.version}, and pip knows of "
            f"{installation.installed_version}",
            "install again, so that dependencies are those of the code",
            serious=False,
        )
    for one in installation.dependencies:
        if not one.ok:
            seen.add(_fault(one), one.remedy)
    for extra in installation.extras:
        for one in extra.dependencies:
            if one.state in ("broken", "out of bounds"):
                seen.add(f"extra {extra.name}: {_fault(one)}", one.remedy, serious=False)


def _fault(one: Dependency) -> str:
    if one.state == "missing":
        return f"{one.name} is missing"
    if one.state == "out of bounds":
        return f"{one.name} {one.version} is out of bounds ({one.needs})"
    return f"{one.name} {one.version} cannot be imported: {one.error}"


def _judge_load(seen: _Examination, busy: float | None) -> None:
    if busy is not None and busy > cores():
        seen.add(
            f"this machine is busy with other work (load {busy:.1f} on {cores()} cores), so every rate is too low",
            "run doctor again when it is idle",
            serious=False,
        )


def _devices() -> TorchDevices:
    from whisper_at_cli.extract.doctor.device import torch_devices

    return torch_devices()


def _judge_devices(seen: _Examination, devices: TorchDevices | None) -> None:
    """An NVIDIA GPU that torch does not use is worth a word; without one, there is nothing to say."""
    if devices is None or devices.accelerators or not (NVIDIA_DRIVER.exists() or shutil.which("nvidia-smi")):
        return
    if devices.cuda_build is None:
        seen.add(
            f"there is an NVIDIA driver, but torch {devices.torch} is built without CUDA",
            "install a build of torch with CUDA (docs/install.md)",
            serious=False,
        )
    else:
        seen.add(
            f"there is an NVIDIA driver, but torch (for CUDA {devices.cuda_build}) finds no GPU",
            "look at nvidia-smi: the driver may be too old for this build, or no GPU given to this job",
            serious=False,
        )


def _weights(seen: _Examination) -> Weights:
    import importlib.util

    from whisper_at_cli.extract.backbones.weights import DEMO_PACKAGE, demo_weights_folder, downloads, downloads_folder
    from whisper_at_cli.extract.errors import WeightsError

    demo = importlib.util.find_spec(DEMO_PACKAGE) is not None
    try:
        if demo:
            demo_weights_folder()
    except (UsageError, WeightsError, OSError) as error:
        demo = False
        seen.add(f"weights of the demo extra: {error}", "install the extra again", serious=False)
    sizes = {name: path.stat().st_size / 1e6 for name, path in downloads().items()}
    return Weights(str(downloads_folder()), sizes, demo)


def _decoding(seconds: float, seen: _Examination) -> Decoding:
    from whisper_at_cli.extract.doctor.decoding import check_decoding

    return check_decoding(seconds=seconds, progress=seen.say)


def _judge_decoding(seen: _Examination, decoding: Decoding | None) -> None:
    for one in decoding.containers if decoding else ():
        if one.state == "failed":
            seen.add(
                f"a {one.container} file of one's own is not decoded: {one.error}", "pip install --force-reinstall av"
            )


def _judge_folder(seen: _Examination, folder: Folder) -> None:
    if not folder.writable:
        seen.add(
            f"nothing can be written in {folder.folder}: {folder.error}",
            "choose another --folder, or change its permissions",
        )
    if folder.locks is False:
        seen.add(
            f"file locks do not work in {folder.folder} ({folder.file_system or 'this file system'})",
            "give each process its own --shard I/N: nothing else keeps two from writing the same shards",
            serious=False,
        )
    if folder.writable and folder.free_bytes is not None and folder.free_bytes < LITTLE_SPACE_BYTES:
        seen.add(
            f"only {folder.free_bytes / 1e9:.1f} GB are free in {folder.folder}",
            "free some, or put caches elsewhere",
            serious=False,
        )


def _matrix_rates(device: str) -> tuple[str, dict[str, float]]:
    """The device's name, and GFLOP/s by precision."""
    from whisper_at_cli.extract.backbones.encoder import PRECISIONS
    from whisper_at_cli.extract.devices import choose_device
    from whisper_at_cli.extract.doctor.device import fastest_matrix_rate

    chosen = choose_device(device)
    names = ("float32", "bfloat16")
    rates = {name: fastest_matrix_rate(chosen, PRECISIONS[name], seconds=MEASURE_SECONDS / 2) for name in names}
    return str(chosen), {name: rate / 1e9 for name, rate in rates.items()}


def _encoder_speed(device: str, weights: Weights | None) -> EncoderSpeed | None:
    """None where no weights are at hand: none are downloaded for this."""
    if weights is None or not (weights.demo or MEASURED_MODEL in weights.downloaded_mb):
        return None
    from whisper_at_cli.extract.backbones.load import WhisperBackbone
    from whisper_at_cli.extract.backbones.weights import read_weights
    from whisper_at_cli.extract.cache.schema import FRAMES
    from whisper_at_cli.extract.devices import choose_device, fitting_batch_size
    from whisper_at_cli.extract.doctor.device import encoder_rate

    chosen, read = choose_device(device), read_weights(MEASURED_MODEL)
    rates: dict[str, float] = {}
    stored_bytes = 0
    for precision in ("float32", "bfloat16"):
        backbone = WhisperBackbone.from_weights(read, device=chosen, precision=precision)
        samples = backbone.clip_samples(CLIP_SECONDS)
        size = fitting_batch_size(backbone, samples)
        rates[precision] = encoder_rate(backbone, samples, size, seconds=MEASURE_SECONDS)
        stored_bytes = 2 * backbone.layers * FRAMES * backbone.dim  # the same for each
    return EncoderSpeed(MEASURED_MODEL, CLIP_SECONDS, rates, stored_bytes)


def _estimate(speed: Speed, decoding: Decoding, disk: DiskSpeed, cores: int) -> Estimate | None:
    """From the rates of each part by itself. On a CPU encoder and decoding share the cores; the disk works beside."""
    decoded = [one.clips_per_second_per_core for one in decoding.containers if one.clips_per_second_per_core]
    if speed.encoder is None or not decoded:
        return None
    encoder = speed.encoder.clips_per_second["float32"]
    limits = {
        "encoder": encoder,
        "decoding": cores * len(decoded) / sum(1 / rate for rate in decoded),  # as many clips of each container
        "disk": disk.write_mb_per_second * 1e6 / speed.encoder.stored_bytes_per_clip,
    }
    if speed.device == "cpu":
        computing = 1 / (1 / limits["encoder"] + 1 / limits["decoding"])
    else:
        computing = min(limits["encoder"], limits["decoding"])
    rate = min(computing, limits["disk"])
    hours = {name: clips / rate / 3600 for name, clips in DATASETS.items()}
    return Estimate(speed.encoder.model, CLIP_SECONDS, rate, limits, min(limits, key=limits.__getitem__), hours)
