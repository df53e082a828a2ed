"""The command `doctor`: a report for a person, 80 columns wide, or the same as JSON. Heavy imports sit inside it."""

from __future__ import annotations

import contextlib
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from whisper_at_cli.extract.options import DEVICE, command
from whisper_at_cli.extract.output import print_json
from whisper_at_cli.extract.progress import progress_on_stderr

if TYPE_CHECKING:
    from whisper_at_cli.extract.doctor.decoding import Decoding
    from whisper_at_cli.extract.doctor.disk import DiskSpeed, Folder
    from whisper_at_cli.extract.doctor.examine import Estimate, Report, Weights
    from whisper_at_cli.extract.doctor.installed import Dependency, Installation

WIDTH = 79
LABEL = 17  # columns of what stands before a value
MARKS = {"ok": "ok", "missing": "MISSING", "out of bounds": "BOUNDS", "broken": "BROKEN"}
UNITS = ((1 / 60, 3600, "s"), (1, 60, "minutes"), (48, 1, "hours"), (float("inf"), 1 / 24, "days"))


@command("doctor")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path(), show_default="here",
    help="Where caches shall go: its disk is measured.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Look, and measure nothing.")
@DEVICE
@click.pass_context
def doctor_command(ctx: click.Context, folder: Path, quick: bool, device: str, as_json: bool) -> None:
    """Say what is installed, what is missing and for what, and how fast this disk and device are.

    Exit status 1 if something that the core needs is missing, out of bounds or broken, or the folder cannot be written;
    a missing extra is no failure. Nothing is downloaded, and no file is left behind.

    \b
        whisper-at-cli doctor
        whisper-at-cli doctor --folder /data --device cuda:1 --json
    """
    from whisper_at_cli.extract.doctor.examine import examine

    with contextlib.ExitStack() as stack:
        progress = None
        with contextlib.suppress(ImportError):  # the bar's own library may be what is broken
            progress = stack.enter_context(progress_on_stderr("doctor", "checks", quiet=ctx.obj["quiet"]))
        report = examine(folder, device=device, quick=quick, progress=progress)
    if as_json:
        print_json(report)
    else:
        click.echo("\n".join(_text(report)))
    if not report.ok:
        ctx.exit(1)


def _text(report: Report) -> list[str]:
    """The report's lines."""
    sections = (
        (None, _installation(report.installation)),
        ("Extras", _extras(report.installation)),
        ("Devices", _devices(report)),
        ("Weights at hand", _weights(report.weights)),
        ("Decoding", _decoding(report.decoding)),
        (f"Folder {report.folder.folder}", _folder(report.folder, report.disk)),
        ("Speed", _speed(report)),
        ("Estimate, from the rates above; not measured", _estimate(report.estimate)),
    )
    lines = []
    for title, body in sections:
        if body:
            lines += [*([title] if title else []), *body, ""]
    return lines + _problems(report)


def _row(label: str, value: str) -> list[str]:
    """A label and its value, wrapped."""
    indent = "  " + " " * LABEL
    return textwrap.wrap(value, WIDTH, initial_indent=f"  {label:<{LABEL}}", subsequent_indent=indent) or [f"  {label}"]


def _installation(found: Installation | None) -> list[str]:
    if found is None:
        return []
    lines = [
        f"whisper-at-cli {found.version}{' (editable)' if found.editable else ''}, {found.place}",
        f"Python {found.python} (needs {found.python_needs}), {found.executable}",
        found.system,
        "",
        "Dependencies",
    ]
    return lines + [line for one in found.dependencies for line in _dependency(one)]


def _dependency(one: Dependency) -> list[str]:
    line = f"  {MARKS[one.state]:<9}{one.name:<22}{one.version or '-':<18}{one.needs}".rstrip()
    return [line, *_indented(one.error)]


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 11, subsequent_indent=" " * 11)


def _extras(found: Installation | None) -> list[str]:
    lines = []
    for extra in found.extras if found else ():
        first, *rest = textwrap.wrap(extra.purpose or "-", WIDTH - 18)
        lines += [f"  {MARKS[extra.state]:<9}{extra.name:<7}{first}", *(" " * 18 + line for line in rest)]
        if extra.state != "ok":
            lacking = [one.name for one in extra.dependencies if not one.ok]
            lines += [f"{'':18}{line}" for line in textwrap.wrap(f"lacks {', '.join(lacking)}", WIDTH - 18)]
            lines.append(f"{'':18}{extra.install}")
    return lines


def _devices(report: Report) -> list[str]:
    found, memory = report.devices, report.free_memory_bytes
    cores = f"{report.processor}, {report.cores} core{'s' * (report.cores != 1)}"
    lines = _row("processor", cores)
    if memory is not None:
        lines += _row("memory", f"{memory / 1e9:.1f} GB free")
    if found is None:
        return lines
    types = [name for name, there in (("bfloat16", found.bfloat16), ("AMX", found.amx)) if there]
    without = [name for name in ("bfloat16", "AMX") if name not in types]
    says = f"{found.torch}, {found.threads} thread{'s' * (found.threads != 1)}, {found.capability}"
    says += f", with {' and '.join(types)}" * bool(types) + f", without {' and '.join(without)}" * bool(without)
    lines += _row("torch", says)
    for one in found.accelerators:
        parts = [one.name]
        if one.memory_bytes and one.free_memory_bytes is not None:
            parts.append(f"{one.memory_bytes / 1e9:.0f} GB, {one.free_memory_bytes / 1e9:.0f} GB of them free")
        if one.compute_capability:
            parts.append(f"compute capability {one.compute_capability}")
        parts.append("bfloat16 works" if one.bfloat16 else "no bfloat16")
        lines += _row(one.device, ", ".join(parts))
    if not found.accelerators:
        build = f"torch is built for CUDA {found.cuda_build}" if found.cuda_build else "torch is built without CUDA"
        lines += _row("GPU", f"none ({build}; no MPS)")
    return lines


def _weights(found: Weights | None) -> list[str]:
    if found is None:
        return []
    lines = _row("tiny.en", "in the demo extra, checksum verified") if found.demo else []
    sizes = [f"{name} ({size:,.0f} MB)" for name, size in found.downloaded_mb.items()]
    return lines + _row("downloaded", f"{', '.join(sizes) or 'none'}, in {found.downloads_folder}")


def _decoding(found: Decoding | None) -> list[str]:
    if found is None:
        return []
    lines = _row("FFmpeg", f"{found.ffmpeg}, in PyAV {found.pyav}; no ffmpeg program is needed")
    timed = [one for one in found.containers if one.clips_per_second_per_core]
    untimed = [one.container for one in found.containers if one.state == "ok" and one not in timed]
    if timed:
        rates = ", ".join(f"{one.container} {one.clips_per_second_per_core:.0f}" for one in timed)
        lines += _row("decodes", f"{rates} (clips of {found.clip_seconds:g} s a second and core)")
    if untimed:
        lines += _row("decodes", ", ".join(untimed))
    for one in found.containers:
        if one.state != "ok":
            lines += _row("FAILS" if one.state == "failed" else one.state, f"{one.container}: {one.error}")
    return lines


def _folder(found: Folder, disk: DiskSpeed | None) -> list[str]:
    free = f", {found.free_bytes / 1e9:.0f} GB free" if found.free_bytes is not None else ""
    lines = _row("file system", f"{found.file_system or 'unknown'}{free}")
    if not found.writable:
        return lines + _row("NOT WRITABLE", found.error)
    lines += _row("file locks", "work" if found.locks else "DO NOT WORK")
    if disk:
        source = "" if disk.reads_from == "disk" else " (from memory, not from a disk)"
        piece = f"each {disk.write_piece_bytes >> 20} MiB synchronised to disk"
        lines += _row("write", f"{disk.write_mb_per_second:,.0f} MB/s, {piece}")
        lines += _row("read", f"{disk.read_mb_per_second:,.0f} MB/s{source}")
        lines += _row(
            "at random",
            f"{disk.random_chunks_per_second:,.0f} chunks/s of {disk.random_chunk_bytes / 1000:.0f} kB by one thread, "
            f"{disk.random_mb_per_second:,.0f} MB/s",
        )
    return lines


def _speed(report: Report) -> list[str]:
    speed = report.speed
    if speed is None:
        return []
    rates = ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in speed.matrix_gflops.items())
    lines = _row("device", speed.device) + _row("matrix products", rates)
    if speed.encoder:
        each = ", ".join(f"{name} {rate:,.1f} clips/s" for name, rate in speed.encoder.clips_per_second.items())
        lines += _row("encoder", f"{speed.encoder.model}, clips of {speed.encoder.clip_seconds:g} s: {each}")
    else:
        lines += _row("encoder", "not measured: no weights of tiny.en are at hand; the extra demo has them")
    return lines


def _estimate(found: Estimate | None) -> list[str]:
    if found is None:
        return []
    lines = _row("for", f"extract --model {found.model}, float32, clips of {found.clip_seconds:g} s")
    for name, hours in found.hours.items():
        lines += _row(name, f"about {_time(hours)}")
    limits = ", ".join(f"{name} {rate:,.0f}" for name, rate in found.limits_clips_per_second.items())
    return lines + _row("held back by", f"the {found.held_back_by} (clips/s of each by itself: {limits})")


def _time(hours: float) -> str:
    """Two figures, in the unit that suits."""
    factor, unit = next((factor, unit) for most, factor, unit in UNITS if hours < most)
    value = float(f"{hours * factor:.2g}")
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


def _problems(report: Report) -> list[str]:
    if not report.problems:
        return ["No problems found."]
    lines = ["Problems"]
    for problem in report.problems:
        mark = "problem" if problem.serious else "note"
        lines += textwrap.wrap(f"{mark}: {problem.what}", WIDTH, initial_indent="  ", subsequent_indent="    ")
        lines += textwrap.wrap(f"do: {problem.do}", WIDTH, initial_indent="    ", subsequent_indent="      ")
    return lines


COMMANDS = (doctor_command,)
