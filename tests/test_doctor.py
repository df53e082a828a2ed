"""`doctor` finds what was planted, measures only when asked, leaves nothing behind, and outlives what is broken."""

import errno
import fcntl
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from whisper_at_cli.cli import main
from whisper_at_cli.extract.doctor import decoding as decoding_check
from whisper_at_cli.extract.doctor import disk as disk_speed
from whisper_at_cli.extract.doctor import examine as doctor
from whisper_at_cli.extract.doctor import installed
from whisper_at_cli.extract.doctor.disk import DiskSpeed, examine_folder, measure_disk

ROOT = Path(__file__).resolve().parents[1]


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(["doctor", *map(str, arguments)])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def plant(folder: Path, name: str, version: str, *, code: str = "", metadata_lines=()) -> None:
    """An installed distribution with one module, and lines of its metadata."""
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *metadata_lines]
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "top_level.txt").write_text(name.replace("-", "_") + "\n")
    if code:
        (folder / f"{name.replace('-', '_')}.py").write_text(code)


@pytest.fixture
def needs(tmp_path, monkeypatch):
    """Makes this package ask for what a test plants, instead of what it asks for."""

    def ask(*requirements: str, extras=(), python=">=3.11"):
        lines = [f"Requires-Python: {python}", *(f"Provides-Extra: {extra}" for extra in extras)]
        lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
        plant(tmp_path / "site", "whisper-at-cli", "0.1.0", metadata_lines=lines)
        monkeypatch.syspath_prepend(tmp_path / "site")
        return tmp_path / "site"

    return ask


def quickly(capsys, tmp_path, *arguments):
    (tmp_path / "here").mkdir(exist_ok=True)
    return run(capsys, "--quick", "--folder", tmp_path / "here", *arguments)


def test_all_that_is_installed_here_is_within_bounds():
    found = installed.examine_installation()
    own = [text for text in metadata.requires("whisper-at-cli") if "extra ==" not in text]
    assert [one.name for one in found.dependencies] == [re.match(r"[\w.-]+", text)[0] for text in own]
    assert all(one.ok and one.version == metadata.version(one.name) for one in found.dependencies), found.dependencies
    assert next(one for one in found.dependencies if one.name == "torch").needs == ">=2.7,<3"
    assert found.python_ok and "all" not in [extra.name for extra in found.extras]


def test_every_extra_has_a_purpose_and_no_purpose_is_of_an_extra_that_is_gone():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(installed.EXTRAS) == set(extras) - {"all"}


def test_a_missing_extra_is_named_with_its_pip_line_and_is_no_failure(capsys, tmp_path, needs):
    needs("numpy>=1", 'no-such-package>=3; extra == "ray"', extras=["ray"])
    status, out, _ = quickly(capsys, tmp_path)
    assert status == 0 and "No problems found." in out
    assert re.search(r"MISSING +ray +extract --engine ray", out) and "lacks no-such-package" in out
    assert "pip install 'whisper-at-cli[ray]'" in out


def test_a_version_out_of_bounds_is_a_failure_with_the_remedy(capsys, tmp_path, needs):
    plant(needs("old-thing<3,>=2.1", "numpy>=1"), "old-thing", "2.0", code="")
    status, out, _ = quickly(capsys, tmp_path)
    assert status == 1 and re.search(r"BOUNDS +old-thing +2\.0 +>=2\.1,<3", out)
    assert "problem: old-thing 2.0 is out of bounds (>=2.1,<3)" in out and "do: pip install 'old-thing>=2.1,<3'" in out


@pytest.mark.parametrize(
    "version, state", [("2.0", "out of bounds"), ("2.1", "ok"), ("2.9+cpu", "ok"), ("3.0", "out of bounds")]
)
def test_bounds_are_those_of_the_metadata(tmp_path, needs, version, state):
    plant(needs("old-thing<3,>=2.1"), "old-thing", version, code="fine = True\n")
    assert installed.examine_installation().dependencies[0].state == state


def test_a_missing_dependency_is_a_failure(capsys, tmp_path, needs):
    needs("no-such-package>=3")
    status, out, _ = quickly(capsys, tmp_path)
    assert status == 1 and "problem: no-such-package is missing" in out and "pip install 'no-such-package>=3'" in out


@pytest.mark.parametrize("code", ["raise ImportError('its library\\nis gone')", "raise OSError('its library is gone')"])
def test_a_broken_import_is_one_line_and_the_rest_is_still_told(capsys, tmp_path, needs, code):
    plant(needs("broken-one>=1"), "broken-one", "1.0", code=code)
    status, out, _ = quickly(capsys, tmp_path)
    sys.modules.pop("broken_one", None)
    assert status == 1 and "Error: its library is gone" in out and "--force-reinstall 'broken-one>=1'" in out
    assert "Devices" in out and re.search(r"decodes +wav, flac", out)


def test_an_extra_that_is_broken_is_a_note(capsys, tmp_path, needs):
    plant(
        needs('half-there>=1; extra == "ray"', extras=["ray"]), "half-there", "1.0", code="import no_such_module_at_all"
    )
    status, out, _ = quickly(capsys, tmp_path)
    assert (
        status == 0 and re.search(r"BROKEN +ray", out) and "note: extra ray: half-there 1.0 cannot be imported" in out
    )


def test_a_python_out_of_bounds_is_a_failure(capsys, tmp_path, needs):
    needs(python=">=4")
    status, out, _ = quickly(capsys, tmp_path)
    assert status == 1 and "is out of bounds (>=4)" in out


def test_a_report_comes_out_where_torch_itself_is_broken(tmp_path):
    """In a process of its own: torch, and all that is built on it, cannot be imported there."""
    needs = [f"Requires-Dist: {name}" for name in ("torch>=2", "openai-whisper", "numpy>=1")]
    plant(tmp_path, "whisper-at-cli", "0.1.0", metadata_lines=["Requires-Python: >=3.11", *needs])
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from whisper_at_cli.cli import main; main()"
    arguments = [sys.executable, "-c", code, "doctor", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(arguments, check=False, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"BROKEN +torch", done.stdout) and "cannot open shared object file" in done.stdout
    assert re.search(r"ok +numpy", done.stdout) and "file locks       work" in done.stdout
    assert done.stdout.count("problem: torch") == 1


def test_no_line_is_wider_than_a_terminal(capsys, tmp_path, needs):
    site = needs("broken-one>=1", *(f'absent-{n}; extra == "test"' for n in range(20)), extras=["test"])
    plant(site, "broken-one", "1.0", code="raise ImportError('a long story ' * 40)")
    out = quickly(capsys, tmp_path)[1]
    lines = [line for line in out.splitlines() if "/" not in line]  # a path may be as long as it is
    assert max(map(len, lines)) <= 80 and "absent-19" in out


def test_quick_measures_nothing(capsys, tmp_path, needs, monkeypatch):
    needs("numpy>=1")
    for name in ("measure_disk", "_matrix_rates", "_encoder_speed"):
        monkeypatch.setattr(doctor, name, lambda *_, **__: pytest.fail("it was measured"))
    status, out, _ = quickly(capsys, tmp_path, "--json")
    report = json.loads(out)
    assert status == 0 and report["quick"] and report["problems"] == []
    assert report["disk"] is report["speed"] is report["estimate"] is None
    assert {one["clips_per_second_per_core"] for one in report["decoding"]["containers"]} == {None}


def test_a_whole_run_measures_says_units_and_leaves_nothing_behind(capsys, tmp_path, tiny_en):
    status, out, err = run(capsys, "--folder", tmp_path, "--device", "cpu", "--json")
    report = json.loads(out)
    assert status == 0 and report["ok"] and list(tmp_path.iterdir()) == []
    numbers = [report["free_memory_bytes"], report["folder"]["free_bytes"], *report["speed"]["matrix_gflops"].values()]
    numbers += [report["disk"][f"{name}_mb_per_second"] for name in ("write", "read", "random")]
    numbers += [one["clips_per_second_per_core"] for one in report["decoding"]["containers"]]
    encoder, estimate = report["speed"]["encoder"], report["estimate"]
    numbers += encoder["clips_per_second"].values()
    assert all(0 < number < math.inf for number in numbers)
    assert [one["container"] for one in report["decoding"]["containers"]] == ["wav", "flac", "mp3", "m4a", "opus"]
    assert {one["state"] for one in report["decoding"]["containers"]} == {"ok"}
    assert encoder["stored_bytes_per_clip"] == 4 * 25 * 384 * 2
    limits = estimate["limits_clips_per_second"]
    assert estimate["held_back_by"] == min(limits, key=limits.get)
    hours = estimate["hours"]
    assert hours["AudioSet-2M"] == pytest.approx(2_000_000 / estimate["clips_per_second"] / 3600)
    assert "\r" not in err


@pytest.mark.parametrize(
    "device, rates, rate, by",
    [
        ("cpu", (30.0, 60.0, 1e9), 20.0, "encoder"),  # cores are shared: 1/20 = 1/30 + 1/60
        ("cuda:0", (30.0, 60.0, 1e9), 30.0, "encoder"),
        ("cuda:0", (90.0, 60.0, 1e9), 60.0, "decoding"),
        ("cpu", (30.0, 60.0, 5.0), 5.0, "disk"),
    ],
)
def test_an_estimate_follows_from_the_rates(device, rates, rate, by):
    encoder, decoding, disk = rates
    speed = doctor.Speed(device, {}, doctor.EncoderSpeed("tiny.en", 10.0, {"float32": encoder}, 1000))
    each = [decoding_check.Decoded(name, "ok", per_core) for name, per_core in (("wav", 40.0), ("mp3", 24.0))]
    containers = decoding_check.Decoding("", "", {}, 10.0, tuple(each))  # 30 clips/s a core, on two cores
    found = doctor._estimate(speed, containers, DiskSpeed(disk / 1000, 1, 1, 1, 1, 1, "disk", 1), 2)
    assert found.clips_per_second == pytest.approx(rate) and found.held_back_by == by


def test_a_folder_that_refuses_is_a_failure_and_nothing_is_measured_in_it(capsys, needs):
    if not Path("/proc/self").exists():
        pytest.skip("this system has no folder in which nobody may write")
    needs("numpy>=1")
    status, out, _ = run(capsys, "--folder", "/proc", "--quick")
    assert status == 1 and "NOT WRITABLE" in out and "problem: nothing can be written in /proc" in out


def test_a_folder_that_does_not_exist_is_wrong_usage(capsys, tmp_path):
    status, out, err = run(capsys, "--folder", tmp_path / "absent")
    assert status == 2 and out == "" and "absent is not a folder" in err


def test_a_device_that_is_not_here_is_a_problem_and_the_rest_is_told(capsys, tmp_path, needs, monkeypatch):
    needs("numpy>=1")
    monkeypatch.setattr(doctor, "measure_disk", lambda folder: None)
    status, out, _ = run(capsys, "--folder", tmp_path, "--device", "cuda:99")
    assert status == 1 and "device 'cuda:99' cannot be used here" in out and "decodes" in out


def test_a_file_system_without_locks_is_noted(capsys, tmp_path, needs, monkeypatch):
    needs("numpy>=1")
    assert examine_folder(tmp_path).locks is True

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    status, out, _ = quickly(capsys, tmp_path)
    assert status == 0 and "DO NOT WORK" in out and "give each process its own --shard I/N" in " ".join(out.split())


@pytest.mark.parametrize("load, noted", [(0.1, False), (900.0, True)])
def test_a_busy_machine_is_noted(capsys, tmp_path, needs, monkeypatch, load, noted):
    needs("numpy>=1")
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    for name in ("measure_disk", "_matrix_rates"):
        monkeypatch.setattr(doctor, name, lambda *_: None)
    status, out, _ = run(capsys, "--folder", tmp_path)
    assert status == 0 and ("note: this machine is busy with other work" in out) is noted


@pytest.mark.parametrize("stopped_in", ["_write", "_read", "_read_chunks"])
def test_an_interrupted_measurement_leaves_no_file(tmp_path, monkeypatch, stopped_in):
    seen = []

    def interrupt(*_):
        seen.append(list(tmp_path.iterdir()))
        raise KeyboardInterrupt

    monkeypatch.setattr(disk_speed, stopped_in, interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure_disk(tmp_path, seconds=0.05)
    assert seen and list(tmp_path.iterdir()) == []
    if hasattr(os, "O_TMPFILE"):
        assert seen == [[]], "a kill at this moment would have left a file"


def test_measurements_keep_to_their_time(tmp_path, monkeypatch):
    """A disk on which each piece takes a second is written to once."""
    pieces = []
    monkeypatch.setattr(disk_speed, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(os, "fsync", lambda _: pieces.append(1))
    clock = iter(float(n) for n in range(10_000))
    monkeypatch.setattr(disk_speed.time, "perf_counter", lambda: next(clock))
    measure_disk(tmp_path, seconds=0.5)
    assert len(pieces) == 1


def test_reads_from_memory_are_called_that(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_speed, "_forget", lambda _: False)
    assert measure_disk(tmp_path, seconds=0.02).reads_from == "memory"


@pytest.mark.parametrize(
    "heard, said",
    [(lambda sound: sound[:8000], "0.50 s came back of 10 s"), (lambda sound: sound * 0.1, "times its level")],
)
def test_a_decoder_that_loses_sound_is_a_problem(capsys, tmp_path, needs, monkeypatch, heard, said):
    needs("numpy>=1")
    decode = decoding_check.decode
    monkeypatch.setattr(decoding_check, "decode", lambda file: heard(decode(file)))
    status, out, _ = quickly(capsys, tmp_path)
    assert status == 1 and said in out and "a wav file of one's own is not decoded" in out


def test_weights_at_hand_are_named(capsys, tmp_path, needs, monkeypatch):
    needs("numpy>=1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "whisper").mkdir(parents=True)
    (tmp_path / "cache" / "whisper" / "base.en.pt").write_bytes(np.zeros(3_000_000, np.uint8).tobytes())
    report = json.loads(quickly(capsys, tmp_path, "--json")[1])
    assert report["weights"]["downloaded_mb"] == {"base.en": 3.0}
    assert "base.en (3 MB)" in quickly(capsys, tmp_path)[1]


def test_an_nvidia_driver_that_torch_does_not_use_is_noted(capsys, tmp_path, needs, monkeypatch):
    import torch

    needs("numpy>=1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path)
    status, out, _ = quickly(capsys, tmp_path)
    assert status == 0 and "note: there is an NVIDIA driver" in out and "is built without CUDA" in " ".join(out.split())
