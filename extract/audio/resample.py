"""FFmpeg's resampler and mixer: frames of one form in, 16 kHz mono int16 out, as Whisper's loader has them."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING, cast

import numpy as np

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.errors import AudioError

if TYPE_CHECKING:
    from av import AudioFrame

RESAMPLER_SECONDS = 0.25  # decoded beyond what is asked for, so that the resampler's end lies behind it
RATES = range(1000, 768_001)  # beyond them a few bytes of a damaged header would become gigabytes
MAX_CHANNELS = 64  # that FFmpeg's mixer takes

Form = tuple[str, int, int]  # sample format, channels, rate


def form_of(frame: AudioFrame) -> Form:
    return frame.format.name, frame.layout.nb_channels, frame.rate


def samples_of(frame: AudioFrame) -> np.ndarray:
    """The samples of a frame that is mono int16, without a copy. A third of the time of its own `to_ndarray`."""
    return np.frombuffer(cast("memoryview[int]", frame.planes[0]), np.int16, frame.samples)


class Resampler:
    """Frames of one form to 16 kHz mono, with large pieces coming out.

    `skip` samples are left off at the start. What is not `whole` may be left without its end. With `checked`, NaN and
    infinity, which would become ordinary numbers in 16 bits, are refused.
    """

    def __init__(self, form: Form, layout: str, *, skip: int = 0, checked: bool = False, whole: bool = True):
        import av

        name, channels, rate = form
        if rate not in RATES:
            raise AudioError(f"its sample rate is {rate} Hz; rates from {RATES[0]} to {RATES[-1]} Hz can be read")
        layout, mix = _mixed(layout, channels)
        self.checked = checked
        self.graph = graph = av.filter.Graph()  # kept: what it holds goes with it
        graph.threads = 1  # one for each core would be started, and have nothing to do
        self.source = graph.add_abuffer(sample_rate=rate, format=name, layout=layout, time_base=Fraction(1, rate))
        self.sink = graph.add("abuffersink")
        filters = [("atrim", f"start_sample={skip}")] if skip else []
        filters += [
            *mix,
            ("aresample", str(SAMPLE_RATE)),
            ("aformat", "sample_fmts=s16:channel_layouts=mono"),
        ]
        filters += [("asetnsamples", f"n={SAMPLE_RATE}:p=0")] if whole else []
        last = self.source
        for filter_name, arguments in filters:
            following = graph.add(filter_name, arguments)
            last.link_to(following)
            last = following
        last.link_to(self.sink)
        graph.configure()

    def push(self, frame: AudioFrame) -> None:
        if self.checked and not np.isfinite(frame.to_ndarray()).all():
            raise AudioError("it holds samples that are not finite (NaN or infinity)")
        self.source.push(frame)

    def finish(self, *, ended: bool = True) -> list[np.ndarray]:
        """All that was resampled; with `ended`, also what the resampler still holds back."""
        import av

        if ended:
            self.source.push(None)
        pieces = []
        while True:
            try:
                pieces.append(samples_of(cast("AudioFrame", self.sink.pull())))
            except (av.EOFError, av.BlockingIOError):
                return pieces


class Unchanged:
    """Stands for a Resampler where there is nothing to do: frames that are 16 kHz mono int16 already."""

    FORMS = tuple((name, 1, SAMPLE_RATE) for name in ("s16", "s16p"))
    LAYOUTS = ("mono", "1 channels")

    def __init__(self, *, skip: int = 0):
        self.skip = skip
        self.pieces: list[np.ndarray] = []

    def push(self, frame: AudioFrame) -> None:
        self.pieces.append(samples_of(frame))

    def finish(self, *, ended: bool = True) -> list[np.ndarray]:
        return [np.concatenate(self.pieces)[self.skip :]] if self.pieces else []


def resampler_of(frame: AudioFrame, codec: str, *, skip: int = 0, whole: bool = True) -> Resampler | Unchanged:
    """For frames like this one, of this codec. Only uncompressed floating point can hold what is not finite."""
    form, layout = form_of(frame), frame.layout.name
    if form in Unchanged.FORMS and layout in Unchanged.LAYOUTS:
        return Unchanged(skip=skip)
    return Resampler(form, layout, skip=skip, checked=codec.startswith("pcm_f"), whole=whole)


class FormChangesError(Exception):
    """A stream changes its rate, its channels or its sample format on the way."""


def decode_frames(
    codec: str, frames: Iterable[AudioFrame], max_seconds: float, *, changing: bool = False
) -> np.ndarray:
    """int16 samples at 16 kHz mono, of all these frames or of a little more than their first `max_seconds`.

    Where the form changes, FFmpeg's program begins with a new resampler and drops what the old one holds back. So does
    this with `changing`, which is slower; without it, FormChangesError is raised there.
    """
    pieces: list[np.ndarray] = []
    resampler, form, seconds = None, None, 0.0
    for frame in frames:
        if resampler is None or form != form_of(frame):
            if resampler and not changing:
                raise FormChangesError
            pieces += resampler.finish(ended=False) if resampler else []
            form, resampler = form_of(frame), resampler_of(frame, codec, whole=not changing)
        resampler.push(frame)
        seconds += frame.samples / frame.rate
        if seconds > max_seconds + RESAMPLER_SECONDS:
            break
    pieces += resampler.finish() if resampler else []
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int16)


def _mixed(layout: str, channels: int) -> tuple[str, list[tuple[str, str]]]:
    """The layout that FFmpeg is told, and the filter that mixes channels of which nobody says where they belong."""
    import av

    if not layout.endswith(" channels"):
        return layout, []
    try:
        return av.AudioLayout(f"{channels}c").name, []  # FFmpeg's default for their number
    except ValueError:
        if channels > MAX_CHANNELS:
            raise AudioError(f"it has {channels} channels; at most {MAX_CHANNELS} can be mixed") from None
    equal = "+".join(f"{1 / channels:.9f}*c{channel}" for channel in range(channels))
    return f"{channels}C", [("pan", f"mono|c0={equal}")]
