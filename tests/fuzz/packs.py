"""HDF5 packs of waveforms, changed as bytes and made anew with datasets of every shape and type."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
from pathlib import Path

import h5py
import mutate
import numpy as np
from engine import Files, Reader

from whisper_at_cli.extract.datasets import apart, waveforms

NAME = "pack.h5"
HUGE = (2**31, 2**40, 2**62)
TYPES = ("i2", "i2", ">i2", "f4", "f8", "f2", "u1", "i4", "i8", "S8", "?", "c8", "V4", [("a", "i2"), ("b", "f4")])
RATES = (
    16000, 32000, 0, -1, 2**40, 1.5, np.nan, np.inf, "16000", [16000, 1], [16000], b"x", h5py.Empty("f4"), [], True,
    np.void(b"ab"), "16000 Hz", 2.5e4,
)  # fmt: skip


def seeds(folder: Path) -> list[Files]:
    packs = [_pack(), _pack(strings=True, labels=2), _pack(libver="latest", labels=1), _pack(chunks=(1, 50), labels=3)]
    return [{NAME: pack} for pack in packs]


def _pack(*, strings=False, labels=0, chunks=None, libver="earliest") -> bytes:
    """A pack as it should be: three clips of 100 samples."""
    rng, held = np.random.default_rng(0), io.BytesIO()
    with h5py.File(held, "w", libver=libver) as pack:
        names = ["a.wav", "b.wav", "ä.wav"]
        if strings:
            pack.create_dataset("audio_name", data=names, dtype=h5py.string_dtype())
        else:
            pack["audio_name"] = np.array([name.encode() for name in names])
        samples = rng.integers(-999, 999, (3, 100)).astype("i2")
        compression = "gzip" if chunks else None
        pack.create_dataset("waveform", data=samples, chunks=chunks, compression=compression, shuffle=bool(chunks))
        if labels:
            pack["target"] = rng.integers(0, 2, (3, labels)).astype("f4")
            pack["fold"] = np.array([1, 2, 3])
            pack.attrs["sample_rate"] = 16000
    return held.getvalue()


def _strange(rng: random.Random) -> bytes:
    """A pack whose parts have any shape, type, layout and number of clips."""
    held, clips = io.BytesIO(), rng.choice((0, 1, 2, 3, 3, 3))
    with h5py.File(held, "w", libver=rng.choice(("earliest", "latest"))) as pack:
        for name in ("audio_name", "waveform", "target", "fold"):
            if rng.random() < 0.9:
                _add(pack, name, clips, rng)
        for name in ("/", "waveform"):
            if rng.random() < 0.4:
                with contextlib.suppress(KeyError, RuntimeError, OSError, AttributeError):  # no such place
                    pack[name].attrs["sample_rate"] = rng.choice(RATES)
    return held.getvalue()


def _add(pack, name: str, clips: int, rng: random.Random) -> None:
    act = rng.random()
    if act < 0.04:
        pack.create_group(name)
    elif act < 0.08:
        pack[name] = rng.choice((h5py.SoftLink("/nowhere"), h5py.SoftLink(name), h5py.ExternalLink("other.h5", "/a")))
    elif act < 0.12:
        pack[name] = rng.choice((5, "text", h5py.Empty("f4"), np.void(b"ab")))
    else:
        with contextlib.suppress(ValueError, TypeError, OSError):  # what HDF5 itself will not write
            _add_dataset(pack, name, clips, rng)


def _add_dataset(pack, name: str, clips: int, rng: random.Random) -> None:
    if name == "audio_name" and rng.random() < 0.6:
        names = [rng.choice((f"{n}.wav", f"{n}.flac", "a.wav", "", "é", "a" * 2000, "..", "/")) for n in range(clips)]
        pack.create_dataset(name, data=np.array(names, dtype=object), dtype=h5py.string_dtype())
        return
    usual = {"audio_name": (clips,), "waveform": (clips, 50), "target": (clips, 2), "fold": (clips,)}[name]
    shape = list(usual) if rng.random() < 0.7 else [rng.choice((0, 1, clips, 7)) for _ in range(rng.randrange(4))]
    kind = {"audio_name": "S8", "waveform": "i2", "target": "f4", "fold": "i8"}[name]
    kind = kind if rng.random() < 0.6 else rng.choice(TYPES)
    huge = bool(shape) and rng.random() < 0.25
    if huge:  # declared, and not stored
        shape[rng.randrange(len(shape))] = rng.choice(HUGE)
    options: dict = {"chunks": tuple(min(max(1, n), 64) for n in shape)} if huge or rng.random() < 0.2 else {}
    if options and rng.random() < 0.5:
        options |= {"compression": rng.choice(("gzip", "lzf")), "fletcher32": rng.random() < 0.5}
    if kind in ("f4", "f8") and rng.random() < 0.3:
        options["fillvalue"] = np.nan
    dataset = pack.create_dataset(name, shape=tuple(shape), dtype=kind, **options)
    if not huge and rng.random() < 0.5:
        dataset[...] = rng.choice((1, 1, 9, np.nan)) if np.dtype(kind).kind == "f" else rng.choice((1, 1, 9))


def change(files: Files, rng: random.Random, other: Files) -> Files:
    if rng.random() < 0.2:
        return {NAME: _strange(rng)}
    return {NAME: mutate.change_bytes(files[NAME], rng, other[NAME])}


def forked_program(arguments: list[str]) -> tuple[int, bytes]:
    """The look by another process, forked from this one instead of started: twenty times as many inputs."""
    ours, theirs = os.pipe()
    if not (child := os.fork()):
        sys.settrace(None)
        try:
            os.dup2(theirs, 1)
            sys.argv, sys.stdout = ["-c", *arguments], os.fdopen(1, "w", closefd=False)
            exec(compile(apart.PROGRAM, "apart", "exec"), {"__name__": "__main__"})
            sys.stdout.flush()
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        printed = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed


def read(folder: Path) -> str:
    apart.run_program = forked_program
    path = folder / NAME
    waveforms.recognise(path)
    pack = waveforms.read(path)
    table = pack.table()
    assert len(table) == len(pack)
    for row in range(min(3, len(pack))):
        samples, real = pack.waveform(row, 80)
        assert samples.shape == (80,) and samples.dtype == np.float32 and np.isfinite(samples).all() and 0 < real <= 80
    return f"pack of {'some' if len(pack) else 'no'} clips"


READER = Reader("hdf5", seeds, change, read)
