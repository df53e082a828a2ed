"""Extraction on a Ray cluster, seen from its driver: whole shards are the units, encoders are actors, tasks decode.

The driver holds the cache's lock, hands each shard to one encoder, and keeps no more shards in flight than encoders can
take (`SHARDS_EACH`), so that decoded audio never piles up. Ray repeats decoding that was lost. The shard of an encoder
that was lost goes to another one. New nodes get encoders as they come. A driver that is started again continues with
what the cache says is pending. Every node needs this package, the dataset and the cache under the same paths, or the
cache in a bucket.

An encoder on a core decodes its own shards. Tasks would take the same core, and since Ray ends idle workers beyond one
a core, each task would begin with importing torch: that halved the speed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_at_cli.extract.cache.schema import Status
from whisper_at_cli.extract.cache.writer import CacheWriter
from whisper_at_cli.extract.datasets import Dataset
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.machine import cores
from whisper_at_cli.extract.pipeline import prepare
from whisper_at_cli.extract.pipeline.decode_pool import DecodePool
from whisper_at_cli.extract.pipeline.options import ExtractOptions, check_numbers
from whisper_at_cli.extract.pipeline.ray_worker import Encoder, EncoderInfo, PartOfDataset, Shard, decode_clips
from whisper_at_cli.extract.pipeline.report import ExtractReport, report_of
from whisper_at_cli.extract.pipeline.shard_run import batch_slots
from whisper_at_cli.extract.progress import Progress

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

SHARDS_EACH = 2  # one that is encoded, one that is decoded meanwhile
DECODE_CLIPS = 16  # clips that one task decodes, about
ENCODER_CPUS, DECODER_CPUS = 0.7, 0.3  # of a core, without a GPU: leaves room for a decoding task on every core
LOSSES_OF_A_SHARD = 5  # encoders that may be lost with one shard before the shard is blamed
BUCKET_SETTINGS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")  # no keys
POLL_SECONDS = 1.0
KNOCK_SECONDS = 10.0
QUIET_SECONDS = 30.0  # without any worker, before the user is told


@dataclass(frozen=True)
class RayReport(ExtractReport):
    """An ExtractReport, and what each node did. `lost` encoders went away with their node or process."""

    nodes: tuple[dict, ...] = ()  # node, clips, clips_per_second
    lost: int = 0


def extract_on_ray(
    dataset: str | Path | Dataset, cache: str | Path, options: ExtractOptions | None = None, *,
    address: str | None = None, encoders: int | None = None, decode_in_tasks: bool | None = None,
    progress: Progress | None = None, notify: Callable[[str], None] | None = None, **given: Any,
) -> RayReport:  # fmt: skip
    """`extract` on the Ray cluster at `address`; by default the one that Ray knows of, else one on this machine.

    There is an encoder per GPU, or per core where the cluster has no GPU, up to `encoders`. By default encoders on GPUs
    leave decoding to tasks on the CPUs, and others do it themselves. The cache has the same bytes as from `extract`.
    Raises UsageError without the extra `ray`, and what an encoder raised.
    """
    options = ExtractOptions.of(options, given)
    if not isinstance(options.model, str | Path):
        raise UsageError("--engine ray needs the model by name or path, so that each worker can load it")
    check_numbers(encoders=encoders)
    started = time.perf_counter()
    command = options.command(dataset, cache, "--engine", "ray")
    with DecodePool(cores()) as pool:
        dataset = prepare.open_clips(dataset, pool, options)
    dataset = dataset.absolute()
    seconds = prepare.seconds_of(dataset, options)
    cache = cache if "://" in str(cache) else Path(cache).resolve()
    model = Path(options.model).resolve() if Path(options.model).exists() else options.model
    with _connected(address):
        restored = prepare.restored(cache) if options.repair else None
        precision = prepare.precision_of(cache, options.precision)
        loading = dict(model=model, precision=precision, compile=options.compile, dtype=options.dtype)
        fleet = _Fleet(loading, seconds, options.device, encoders)
        info = fleet.wait_for_one(progress)
        size = options.batch_size or info.batch_size
        notes = [*dataset.notes, info.note]
        writer, dataset, changed = prepare.open_cache(cache, dataset, info, size, options, command)
        with writer:
            notes += [restored, changed]
            if not options.batch_size:
                size, note = prepare.batch_size_of(writer.cache.attributes["made"], info.device, size)
                notes.append(note)
            todo = prepare.clips_to_do(writer, dataset, options.repair)
            said = prepare.say_notes(notes, notify)
            in_tasks = fleet.on_gpu if decode_in_tasks is None else decode_in_tasks
            drive = _Drive(dataset, writer, fleet, info.samples, size, todo, in_tasks, progress)
            drive.all_shards()
            elapsed = time.perf_counter() - started
            writer.cache.clip_status.reload()
            report = report_of(writer, dataset, drive.written, elapsed, drive.encoder_busy, drive.disk_wait_seconds)
    said += prepare.say_notes(drive.notes, notify)
    report = replace(report, notes=said, redone_in_float32=drive.redone)
    return RayReport(**vars(report), nodes=drive.nodes(), lost=fleet.lost)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """A connection to Ray for as long as the work takes; one that was there before is left as it is.

    What Ray has to say meanwhile (it writes to stdout, from a thread) goes to stderr.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray needs Ray: pip install 'whisper-at-cli[ray]'") from error
    mine = not ray.is_initialized()
    with contextlib.redirect_stdout(sys.stderr):
        if mine:
            _knock(address)
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise UsageError(f"no Ray cluster answers at {address or 'the known address'}: {reason}") from error
        try:
            yield
        finally:
            if mine:
                ray.shutdown()


def _knock(address: str | None) -> None:
    """Raises UsageError where nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no Ray cluster answers at {address} ({error}); give --address HOST:PORT of its head"
        ) from error


class _Fleet:
    """The encoders of a cluster, as many as it has GPUs or cores, while nodes come and go."""

    def __init__(self, options: dict, clip_seconds: float, device: str, most: int | None):
        import ray

        self.options, self.clip_seconds, self.device, self.most = options, clip_seconds, device, most
        self.starting: dict = {}  # the call that asks an encoder what it is -> the encoder
        self.ready: dict = {}  # encoder -> EncoderInfo
        self.lost = 0
        self.on_gpu = device.startswith("cuda") or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
        wants: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if self.on_gpu else {"num_cpus": ENCODER_CPUS}
        # where a bucket is, every worker learns from here; its keys are the nodes' own
        settings = {name: os.environ[name] for name in BUCKET_SETTINGS if name in os.environ}
        wants |= {"runtime_env": {"env_vars": settings}} if settings else {}
        self.actor: Any = ray.remote(Encoder).options(
            max_concurrency=SHARDS_EACH if self.on_gpu else 1, max_restarts=0, **wants
        )
        self.decode = ray.remote(decode_clips).options(
            num_cpus=1 if self.on_gpu else DECODER_CPUS,
            max_retries=-1,
            **{name: value for name, value in wants.items() if name == "runtime_env"},
        )

    def grow(self) -> None:
        """Start encoders for what the cluster has and does not use yet."""
        import ray

        room = int(ray.cluster_resources().get("GPU" if self.on_gpu else "CPU", 0))
        room = min(room, self.most or room)
        for _ in range(room - len(self.starting) - len(self.ready)):
            device = "cuda" if self.on_gpu else "cpu" if self.device == "auto" else self.device
            actor = self.actor.remote(device=device, **self.options)
            self.starting[actor.describe.remote(self.clip_seconds)] = actor

    def admit(self) -> None:
        """Take in encoders that have loaded their model. Raises what loading it raised."""
        import ray

        if not self.starting:
            return
        for call in ray.wait(list(self.starting), num_returns=len(self.starting), timeout=0)[0]:
            actor = self.starting.pop(call)
            try:
                info = _result(call)
            except ray.exceptions.RayError:
                self.lost += 1
                continue
            known = next(iter(self.ready.values()), info)
            if (known.weights_sha256, known.precision) != (info.weights_sha256, info.precision):
                raise WhisperATError(
                    f"node {info.node} loaded other weights ({info.weights_sha256[:12]}...) than node {known.node} "
                    f"({known.weights_sha256[:12]}...); give every node the same model files"
                )
            self.ready[actor] = info

    def wait_for_one(self, progress: Progress | None) -> EncoderInfo:
        import ray

        started = time.monotonic()
        while not self.ready:
            self.grow()
            ray.wait(list(self.starting), timeout=POLL_SECONDS) if self.starting else time.sleep(POLL_SECONDS)
            self.admit()
            if self.lost > LOSSES_OF_A_SHARD:
                raise WhisperATError(
                    "encoders end before they have loaded the model; see Ray's logs (ray logs), often memory is short"
                )
            if progress and time.monotonic() - started > QUIET_SECONDS:
                progress(0, 1, "waiting for a worker with room for an encoder")
        return next(iter(self.ready.values()))

    def drop(self, actor: ActorHandle) -> None:
        import ray

        if self.ready.pop(actor, None):
            self.lost += 1
            ray.kill(actor)


class _Drive:
    """One extraction: hands shards to the fleet and counts what comes back."""

    def __init__(
        self, dataset: Dataset, writer: CacheWriter, fleet: _Fleet, samples: int, batch_size: int, redo: np.ndarray,
        in_tasks: bool, progress: Progress | None,
    ):  # fmt: skip
        self.dataset, self.writer, self.fleet, self.progress = dataset, writer, fleet, progress
        self.samples, self.batch_size, self.redo, self.in_tasks = samples, batch_size, redo, in_tasks
        self.waiting = deque(writer.shards_of(redo))
        self.in_flight: dict = {}  # call -> (encoder, shard)
        self.losses: Counter[int] = Counter()
        self.clips_of: Counter[str] = Counter()  # by node
        self.total, self.skipped = int(writer.mine().sum()), int((writer.mine() & ~redo).sum())
        self.written = self.failed = self.redone = 0
        self.notes: list[str | None] = []
        self.encode_seconds = self.disk_wait_seconds = self.encoder_seconds = 0.0
        self.started = time.perf_counter()

    @property
    def encoder_busy(self) -> float:
        """Share of the time in which the encoders that were there had work."""
        return min(1.0, self.encode_seconds / self.encoder_seconds) if self.encoder_seconds else 0.0

    def all_shards(self) -> None:
        import ray

        self._report()
        before = time.perf_counter()
        while self.waiting or self.in_flight:
            self.fleet.grow()
            self.fleet.admit()
            self._hand_out()
            calls = [*self.in_flight, *self.fleet.starting]
            finished = ray.wait(calls, timeout=POLL_SECONDS)[0] if calls else []
            if not calls:
                time.sleep(POLL_SECONDS)
            now = time.perf_counter()
            self.encoder_seconds += (now - before) * len(self.fleet.ready)
            before = now
            for call in finished:
                if call in self.in_flight:
                    self._take(call)

    def _hand_out(self) -> None:
        load = Counter(actor for actor, _ in self.in_flight.values())
        for turn in range(SHARDS_EACH):
            for actor in self.fleet.ready:
                if self.waiting and load[actor] == turn:
                    number = self.waiting.popleft()
                    self.in_flight[self._submit(actor, number)] = (actor, number)
                    load[actor] += 1

    def _submit(self, actor: ActorHandle, number: int) -> ObjectRef:
        rows = self.writer.rows(number)
        needed = [rows[slot] for slots in batch_slots(rows, self.redo, self.batch_size) for slot in slots]
        todo = tuple(row for row in rows if self.redo[row])
        shard = Shard(str(self.writer.path), self.writer.slot, number, todo, self.samples, self.batch_size)
        if not self.in_tasks:
            return actor.extract_shard.remote(shard, PartOfDataset(self.dataset, needed))
        parts = [tuple(needed[at : at + DECODE_CLIPS]) for at in range(0, len(needed), DECODE_CLIPS)]
        decoded = [self.fleet.decode.remote(self.dataset.part(part), part, self.samples) for part in parts]
        return actor.extract_shard.remote(shard, None, *decoded)

    def _take(self, call: ObjectRef) -> None:
        """Count a finished shard, or give it to another encoder where its own was lost."""
        import ray

        actor, number = self.in_flight.pop(call)
        try:
            outcome = _result(call)
        except ray.exceptions.RayError as error:
            self.fleet.drop(actor)
            self.waiting.appendleft(number)
            self.losses[number] += 1
            if self.losses[number] > LOSSES_OF_A_SHARD:
                clips = self.writer.rows(number)
                raise WhisperATError(
                    f"shard {number} (clips {clips.start} to {clips.stop - 1}) was lost {self.losses[number]} times "
                    f"with its encoder, at last by {type(error).__name__}; what was finished is kept. Often memory is "
                    "short"
                ) from error
            return
        rows = self.writer.rows(number)
        self.writer.cache.status[rows.start : rows.stop] = outcome.status
        todo = self.redo[rows.start : rows.stop]
        self.written += outcome.written
        self.failed += int((todo & (outcome.status == Status.FAILED)).sum())
        self.redone += outcome.redone
        self.notes.append(outcome.note)
        self.encode_seconds += outcome.encode_seconds
        self.disk_wait_seconds += outcome.disk_wait_seconds
        self.clips_of[self.fleet.ready[actor].node if actor in self.fleet.ready else "lost"] += outcome.written
        self._report()

    def nodes(self) -> tuple[dict, ...]:
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return tuple(
            {"node": node, "clips": clips, "clips_per_second": round(clips / seconds, 2)}
            for node, clips in sorted(self.clips_of.items())
        )

    def _report(self) -> None:
        if not self.progress:
            return
        notes = [f"{self.failed} failed"] if self.failed else []
        notes += [f"{node['node']} {node['clips_per_second']:.0f}/s" for node in self.nodes()[:8]]
        self.progress(self.skipped + self.written + self.failed, self.total, ", ".join(notes))


def _result(call: ObjectRef) -> Any:
    """What a call returned. Raises what it raised if that is for users, as it was; Ray's own error if it was lost."""
    import ray

    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, WhisperATError):
            raise cause from None
        raise WhisperATError(f"a worker failed: {type(cause).__name__}: {cause}") from error
