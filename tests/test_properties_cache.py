"""The cache, whatever is written, in any order, wherever the writer is stopped: what is read is what was written."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import zarr
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from properties import examples

from conftest import array_bytes
from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable, FeatureCache, ShardBlock, Status
from whisper_at_cli.extract.cache import store as store_module
from whisper_at_cli.extract.cache import writer as writer_module
from whisper_at_cli.extract.cache.storage import to_storage
from whisper_at_cli.extract.cache.verify import verify
from whisper_at_cli.extract.errors import CacheError, UsageError

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
CHUNKS = (
    "features", "mean", "scale", "status", "valid_frames", "fold", "labels", "id", "path", "split", "error", "digest",
    "layer", "class",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is to be written: a cache's settings, its clips, and the features of each."""

    spec: CacheSpec
    clips: ClipTable
    per_shard: int
    failed: tuple[int, ...]
    seed: int

    @property
    def shard_mb(self) -> float:
        return self.per_shard * self.spec.clip_bytes / 1e6 + 1e-9

    @property
    def done(self) -> np.ndarray:
        return np.array([row not in self.failed for row in range(len(self.clips))], dtype=bool)

    @property
    def values(self) -> ShardBlock:
        """All clips as one block: any finite bits, the largest and the smallest numbers among them."""
        rng, N = np.random.default_rng(self.seed), len(self.clips)
        block = ShardBlock.empty(N, self.spec)
        for array in (block.features, block.mean) + ((block.scale,) if block.scale is not None else ()):
            bits = np.frombuffer(rng.bytes(array.nbytes), dtype=array.dtype).reshape(array.shape)
            array[:] = np.where(np.isfinite(bits), bits, 0) if array.dtype.kind == "f" else bits
        block.valid_frames[:] = rng.integers(0, self.spec.frames + 1, N)
        block.valid_frames[list(self.failed)] = 0
        block.status[self.done] = Status.DONE
        block.errors = {row: f"error {row}" for row in self.failed}
        return block

    def block(self, rows: range) -> ShardBlock:
        """What one shard is given."""
        whole = self.values
        parts = (
            part[rows.start : rows.stop] for part in (whole.features, whole.mean, whole.valid_frames, whole.status)
        )
        errors = {row - rows.start: text for row, text in whole.errors.items() if row in rows}
        scale = None if whole.scale is None else whole.scale[rows.start : rows.stop]
        return ShardBlock(*parts, errors=errors, scale=scale)

    def create(self, path: Path) -> CacheWriter:
        return CacheWriter.create(path, self.spec, self.clips, shard_mb=self.shard_mb)

    def write(self, path: Path, order=None, most: int | None = None) -> None:
        """Write all pending shards, or the first so many of them, in an order that a seed says."""
        with self.create(path) as writer:
            shards = writer.pending_shards()
            if order is not None:
                np.random.default_rng(order).shuffle(shards)
            for shard in shards[:most]:
                writer.write(shard, self.block(writer.rows(shard)))


@st.composite
def plans(draw, most_clips: int = 7, dtypes=("float16", "float32", "int8")) -> Plan:
    N = draw(st.integers(0, most_clips))
    names = draw(st.lists(TEXT.filter(bool), max_size=3, unique=True))
    small = st.integers(1, 3)
    spec = CacheSpec(
        draw(TEXT), draw(TEXT), draw(small), draw(st.integers(1, 5)), draw(st.sampled_from((0.5, 5.0, 10.0))),
        draw(st.sampled_from(dtypes)), class_names=tuple(names), frames=draw(small),
    )  # fmt: skip
    ids = draw(st.lists(TEXT.filter(bool), min_size=N, max_size=N, unique=True))
    column = st.lists(TEXT, min_size=N, max_size=N)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    clips = ClipTable(
        np.array(ids, dtype=object), np.array(draw(column), dtype=object),
        rng.integers(0, 32768, N).astype(np.int16), np.array(draw(column), dtype=object),
        rng.integers(0, 2, (N, len(names))).astype(np.uint8),
    )  # fmt: skip
    failed = draw(st.sets(st.integers(0, N - 1), max_size=N)) if N else ()
    return Plan(spec, clips, draw(st.integers(1, 4)), tuple(sorted(failed)), draw(st.integers(0, 2**32)))


class Stopped(BaseException):
    """The process is killed here."""


@contextlib.contextmanager
def stopped_at(step: int):
    """Stop before the step-th operation on files, 0 the first. Yields how many there were, as its `count`."""
    passed = SimpleNamespace(count=0)

    def counted(function):
        def call(*args, **options):
            if passed.count == step:
                raise Stopped
            passed.count += 1
            return function(*args, **options)

        return call

    with contextlib.ExitStack() as patches:
        proxy = SimpleNamespace(
            **vars(os) | {name: counted(getattr(os, name)) for name in ("replace", "fsync", "open")}
        )
        patches.enter_context(mock.patch.object(store_module, "os", proxy))
        for owner, name in (
            (store_module, "_writev"), (store_module.LocalStore, "append"), (store_module.LocalStore, "remove"),
            (writer_module.schema, "create_arrays"), (Path, "rename"),
        ):  # fmt: skip
            patches.enter_context(mock.patch.object(owner, name, counted(getattr(owner, name))))
        yield passed


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory(prefix="properties-") as name:
        yield Path(name)


def expect_equal(cache: FeatureCache, plan: Plan, written: np.ndarray) -> None:
    """Everything that can be read of the rows that were written is what was to be written; the others are pending."""
    values, done = plan.values, plan.done & written
    assert cache.spec == plan.spec and len(cache) == len(plan.clips)
    expected = np.where(written, np.where(plan.done, Status.DONE, Status.FAILED), Status.PENDING)
    np.testing.assert_array_equal(cache.status, expected)
    assert cache.complete == bool(written.all())
    rows = np.flatnonzero(done)
    assert cache.stored_features(rows).tobytes() == values.features[rows].tobytes()
    np.testing.assert_array_equal(cache.mean(rows=rows), values.mean[rows].astype(np.float32))
    if values.scale is not None:
        np.testing.assert_array_equal(cache.scale(rows), values.scale[rows].astype(np.float32))
    np.testing.assert_array_equal(cache.valid_frames[written], values.valid_frames[written])
    for row in np.flatnonzero(written):
        assert cache.errors[row] == ("" if plan.done[row] else f"error {row}")
    for ours, given_ in zip((cache.ids, cache.paths, cache.fold, cache.split, cache.labels),
                            (plan.clips.ids, plan.clips.paths, plan.clips.fold, plan.clips.split, plan.clips.labels),
                            strict=True):  # fmt: skip
        assert ours.tolist() == given_.tolist()


@examples(25)
@given(plans(), st.integers(0, 9))
def test_what_is_read_is_what_was_written_in_any_order(plan, order):
    with folder() as tmp:
        plan.write(tmp / "a", order=order)
        cache = FeatureCache.open(tmp / "a")
        expect_equal(cache, plan, np.ones(len(plan.clips), dtype=bool))
        assert verify(tmp / "a").ok and verify(tmp / "a").clips_read == plan.done.sum()
        plan.write(tmp / "b")
        assert array_bytes(tmp / "a") == array_bytes(tmp / "b"), "the order of shards shows in the bytes"


@examples(12)
@given(plans())
def test_zarr_reads_the_same_values_and_nothing_where_there_is_none(plan):
    with folder() as tmp:
        plan.write(tmp / "a", most=2)
        cache, group = FeatureCache.open(tmp / "a"), zarr.open_group(tmp / "a", mode="r")
        features, mean = group["features"][:], group["mean"][:]
        np.testing.assert_array_equal(features[cache.done], plan.values.features[cache.done])
        np.testing.assert_array_equal(mean[cache.done], plan.values.mean[cache.done])
        assert np.isnan(mean[~cache.done]).all()
        assert (
            (features[~cache.done] == 0).all() if plan.spec.dtype == "int8" else np.isnan(features[~cache.done]).all()
        )
        assert (
            group["id"][:].tolist() == plan.clips.ids.tolist() and group["status"][:].tolist() == cache.status.tolist()
        )


@examples(25)
@given(plans(), st.integers(0, 3), st.integers(0, 60), st.booleans())
def test_stopped_anywhere_and_continued_ends_in_the_same_bytes(plan, shards_first, step, twice):
    with folder() as tmp:
        plan.write(tmp / "whole")
        plan.write(tmp / "a", most=shards_first) if shards_first else None
        for at in (step, step // 2) if twice else (step,):
            with contextlib.suppress(Stopped), stopped_at(at):
                plan.write(tmp / "a")
            if (tmp / "a").exists():
                cache = FeatureCache.open(tmp / "a")
                expect_equal(cache, plan, cache.status != Status.PENDING)
                assert verify(tmp / "a").ok
        plan.write(tmp / "a")
        assert array_bytes(tmp / "a") == array_bytes(tmp / "whole")


def test_a_stop_is_met_at_every_step(tmp_path):
    """What the test above relies on: every write, rename and status is a step, and a run has many."""
    names = np.array(["a", "b", "c"], dtype=object)
    table = ClipTable(names, names, np.zeros(3, np.int16), names, np.zeros((3, 0), np.uint8))
    plan = Plan(CacheSpec("b", "0", 1, 2, 5.0, "int8", frames=2), table, 2, (1,), 0)
    with stopped_at(-1) as passed:
        plan.write(tmp_path / "a")
    assert passed.count >= 2 * 5 * 4
    for step in range(passed.count):
        with pytest.raises(Stopped), stopped_at(step):
            plan.write(tmp_path / f"{step}")


@examples(25)
@given(plans(), st.data())
def test_any_selection_of_rows_and_layers_is_that_of_the_array(plan, data):
    with folder() as tmp:
        plan.write(tmp / "a")
        cache, values, N = FeatureCache.open(tmp / "a"), plan.values, len(plan.clips)
        rows = data.draw(st.lists(st.integers(-2, N + 1), max_size=6))
        layer = data.draw(st.integers(-1, plan.spec.layers + 1))
        if rows and not all(0 <= row < N for row in rows):
            refused = UsageError
        elif not all(plan.done[row] for row in rows):
            refused = CacheError
        else:
            refused = None
        reads = [lambda: cache.features(rows), lambda: cache.mean(rows=rows)]
        if refused:
            for read in reads:
                with pytest.raises(refused):
                    read()
            return
        exact = values.features.astype(np.float32)
        if values.scale is not None:
            exact = exact * values.scale.astype(np.float32)[:, :, None]
        np.testing.assert_array_equal(cache.features(rows), exact[rows].astype(cache.features(rows).dtype))
        if not 1 <= layer <= plan.spec.layers:
            with pytest.raises(UsageError, match="layers 1 to"):
                cache.layer(layer, rows)
            return
        np.testing.assert_array_equal(cache.layer(layer, rows), exact[rows, layer - 1])
        np.testing.assert_array_equal(cache.mean(layer, rows), values.mean[rows, layer - 1].astype(np.float32))


def one_clip() -> Plan:
    names = np.array(["a"], dtype=object)
    table = ClipTable(names, names, np.ones(1, np.int16), names, np.ones((1, 1), np.uint8))
    return Plan(CacheSpec("b", "0", 1, 1, 5.0, "int8", class_names=("x",), frames=1), table, 1, (), 0)


def chunk_files(path: Path) -> list[Path]:
    return sorted(file for name in CHUNKS for file in (path / name).rglob("c.*"))


@examples(60)
@given(plans(), st.data())
@example(one_clip(), None)
def test_any_single_changed_byte_of_a_chunk_is_found(plan, data):
    with folder() as tmp:
        plan.write(tmp / "a")
        files = chunk_files(tmp / "a")
        if not files:
            return
        picks = []
        if data is None:
            sizes = {file: file.stat().st_size for file in files}
            picks = [(file, at, 0x20) for file, size in sizes.items() for at in (0, size // 2, size - 1)]
        else:
            file = data.draw(st.sampled_from(files))
            picks.append((file, data.draw(st.integers(0, file.stat().st_size - 1)), data.draw(st.integers(1, 255))))
        for file, at, change in picks:
            whole = file.read_bytes()
            file.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
            report = verify(tmp / "a")
            assert not report.ok, f"byte {at} of {file.relative_to(tmp)} xor {change}"
            assert any(file.relative_to(tmp / "a").parts[0] in damage.problem for damage in report.damaged)
            file.write_bytes(whole)


@examples(40)
@given(
    st.lists(st.floats(-6e4, 6e4, width=32), min_size=2, max_size=40), st.integers(1, 4),
    st.floats(2**-30, 1, width=32),
)  # fmt: skip
def test_int8_is_off_by_little_more_than_half_a_step(values, frames, factor):
    x = torch.tensor(values, dtype=torch.float32).mul(factor)[: len(values) // frames * frames]
    if not len(x):
        return
    x_BLTD = x.reshape(1, 1, frames, -1)
    stored = to_storage(x_BLTD, "int8")
    assert stored.finite.all() and stored.features.dtype == torch.int8
    scale = stored.scale.float().unsqueeze(2)
    decoded = stored.features.float() * scale
    step = (x_BLTD.abs().amax(dim=2, keepdim=True) / 127).double()
    # half a step; a scale in float16 is off by 2**-11 of itself or, below 6e-5, by 3e-8: 127 times in the largest
    bound = step * (0.5 + 127 * 2**-11) * 1.001 + 127 * 2**-25 * 1.01
    assert ((decoded.double() - x_BLTD.double()).abs() <= bound).all()


class CacheLife(RuleBasedStateMachine):
    """A cache that is written, stopped, damaged, read and mended in any order, beside a model of what it must hold."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="properties-"))
        self.path, self.damaged = self.folder / "a", set()
        names = np.array([f"clip{row}" for row in range(7)], dtype=object)
        labels = np.eye(7, 2, dtype=np.uint8)
        table = ClipTable(names, names, np.arange(7, dtype=np.int16), names, labels)
        spec = CacheSpec("b", "0", 2, 3, 5.0, "int8", class_names=("x", "y"), frames=2)
        self.plan = Plan(spec, table, 2, (3,), 0)
        self.plan.create(self.path).close()
        self.written = np.zeros(7, dtype=bool)

    @rule(step=st.integers(0, 40), order=st.integers(0, 5), most=st.integers(0, 3))
    def write_until_stopped(self, step, order, most):
        with contextlib.suppress(Stopped), stopped_at(step):
            self.plan.write(self.path, order=order, most=most)
        self.see()

    @rule(order=st.integers(0, 5), most=st.integers(1, 2))
    def write(self, order, most):
        self.plan.write(self.path, order=order, most=most)
        self.see()

    def see(self) -> None:
        """Shards change from pending to written, and never back."""
        found = FeatureCache.open(self.path).status != Status.PENDING
        assert not (self.written & ~found).any()
        self.written = found

    @precondition(lambda self: self.written.any() and not self.damaged)
    @rule(data=st.data())
    def damage_features(self, data):
        done = np.flatnonzero(self.written & self.plan.done)
        if len(done):
            row = int(data.draw(st.sampled_from(done.tolist())))
            file = self.path / f"features/c.{row // 2}.0.0.0"
            whole, slot = bytearray(file.read_bytes()), int((self.plan.done[row // 2 * 2 : row]).sum())
            at = slot * 2 * (2 * 3 + 4) + data.draw(st.integers(0, 2 * (2 * 3 + 4) - 1))
            whole[at] ^= data.draw(st.integers(1, 255))
            file.write_bytes(whole)
            self.damaged.add(row)

    @precondition(lambda self: self.damaged)
    @rule()
    def mend(self):
        redo = np.zeros(7, dtype=bool)
        redo[[int(name[4:]) for damage in verify(self.path).damaged for name in damage.clips]] = True
        with self.plan.create(self.path) as writer:
            for shard in writer.shards_of(redo):
                block, rows = writer.block(shard, redo), writer.rows(shard)
                whole = self.plan.block(rows)
                for slot in np.flatnonzero(redo[rows.start : rows.stop]).tolist():
                    for ours, theirs in ((block.features, whole.features), (block.mean, whole.mean),
                                         (block.scale, whole.scale), (block.valid_frames, whole.valid_frames),
                                         (block.status, whole.status)):  # fmt: skip
                        ours[slot] = theirs[slot]
                writer.write(shard, block)
        self.damaged.clear()

    @invariant()
    def verify_names_just_the_damaged_clips(self):
        found = {name for damage in verify(self.path).damaged for name in damage.clips}
        assert found == {f"clip{row}" for row in self.damaged}

    @invariant()
    def what_is_read_is_what_was_written(self):
        cache = FeatureCache.open(self.path)
        for row in self.damaged:
            with pytest.raises(CacheError, match="CRC-32C"):
                cache.features([row])
        if not self.damaged:
            expect_equal(cache, self.plan, self.written)

    def teardown(self):
        if not self.damaged:
            self.plan.write(self.path)
            self.plan.write(self.folder / "whole")
            assert array_bytes(self.path) == array_bytes(self.folder / "whole")
        shutil.rmtree(self.folder)


CacheLife.TestCase.settings = examples(8, stateful_step_count=15)
TestACacheLivesThroughAnything = CacheLife.TestCase
