"""The command line as a user meets it: one clear line for every mistake, JSON that is JSON, exit status as promised."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest

from conftest import noise, write_wav
from planted import planted_cache
from whisper_at_cli.cli import cli, main

README = Path(__file__).resolve().parents[1] / "README.md"
COMMANDS = sorted(cli.commands)


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command run in this process."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


@pytest.fixture
def cache(tmp_path):
    """Forty clips of four classes, readable in layer 2."""
    labels = np.arange(40) % 4
    features = np.random.default_rng(0).normal(size=(40, 2, 25, 16))
    features[:, 1, :, :4] += 6 * np.eye(4)[labels][:, None, :]
    return planted_cache(tmp_path / "planted.zarr", features, labels, fold=np.arange(40) // 8 + 1).path


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_is_in_the_readme(capsys, name):
    status, out, _ = run(capsys, name, "--help")
    assert status == 0 and f"whisper-at-cli {name}" in out.split("Usage:")[1].split("\n", 1)[1]
    assert f"`{name}" in README.read_text() or f"whisper-at-cli {name}" in README.read_text()
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.name} has no help"
    assert "--json" in out


def test_help_imports_nothing_heavy():
    code = "import sys; from whisper_at_cli.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += (
        "print(','.join(m for m in ('torch', 'numpy', 'zarr', 'sklearn', 'matplotlib', 'rich') if m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == ""


@pytest.mark.parametrize("debug", [False, True])
def test_a_traceback_only_with_debug(tmp_path, debug):
    command = [sys.executable, "-m", "whisper_at_cli.cli", "info", str(tmp_path / "absent"), *["--debug"] * debug]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ("Traceback" in done.stderr) is debug
    assert done.returncode == (1 if debug else 2)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["extract", "{absent}", "{new}", "--model", "{weights}"], "does not exist"),
        (["extract", "{empty}", "{new}", "--model", "{weights}"], "holds no audio files"),
        (["extract", "{sounds}", "{new}", "--model", "huge.en"], "no model 'huge.en'"),
        (["extract", "{sounds}", "{new}", "--model", "{absent}/model.pt"], "does not exist"),
        (["extract", "{sounds}", "{new}", "--model", "{empty}"], "holds no model.bin"),
        (["extract", "{sounds}", "{new}", "--model", "{weights}", "--clip-seconds", "0.7"], "multiple of 0.5 s"),
        (["extract", "{sounds}", "{new}", "--model", "{weights}", "--dtype", "float8"], "choose from float16"),
        (["extract", "{sounds}", "{new}", "--model", "{weights}", "--precision", "int4"], "choose from float32"),
        (["extract", "{sounds}", "{new}", "--model", "{weights}", "--device", "tpu9"], "device 'tpu9'"),
        (["extract", "{sounds}", "{new}", "--model", "{weights}", "--shard", "3"], "neither of the form I/N"),
        (["extract", "{sounds}", "{new}", "--model", "{weights}", "--shard", "3/2"], "out of range"),
        (["extract", "{sounds}", "{sounds}", "--model", "{weights}"], "not a feature cache"),
        (["extract", "{sounds}", "{new}", "--model", "{weights}", "--batch-size", "0"], "batch_size is 0"),
        (["extract", "{sounds}", "{new}", "--model", "{weights}", "--workers", "0"], "workers is 0"),
        (["extract", "{sounds}", "{new}", "--model", "{weights}", "--shard-mb", "nan"], "shard_mb is nan"),
        (["probe", "{cache}", "--strength", "-1"], "strength"),
        (["extract", "{sounds}", "{new}"], "--model"),
        (["probe", "{empty}"], "not a feature cache"),
        (["probe", "{cache}", "--layer", "3"], "layers 1 to 2; layer 3 was asked for"),
        (["probe", "{cache}", "--layer", "0"], "layer 0 was asked for"),
        (["probe", "{cache}", "--layer", "1-3"], "layers 1 to 2; layer 3 was asked for"),
        (["probe", "{cache}", "--layer", "2-1"], "--layer 2-1 is empty: give the lower layer first, as 1-2"),
        (["probe", "{cache}", "--layer", "1,"], "is not a layer"),
        (["probe", "{cache}", "--layer", "two"], "--layer two is not a layer"),
        (["info", "{absent}"], "does not exist"),
        (["verify", "{sounds}"], "not a feature cache"),
        (["train-head", "{cache}", "--head", "mlp"], "last-mlp"),
        (["train-head", "{cache}", "--head", "wa-mlp", "--dim", "8"], "wa-mlp"),
        (["train-head", "{cache}", "--head", "wa-mlp", "--recipe", "mine"], "as20k"),
        (["heads", "--model", "huge"], "large-v1"),
        (["sing"], "No such command 'sing'"),
        (["probe", "{cache}", "--loud"], "No such option"),
    ],
)
def test_wrong_usage_is_one_clear_line_and_status_2(capsys, tmp_path, tiny_en, cache, arguments, said):
    (tmp_path / "empty").mkdir()
    write_wav(tmp_path / "sounds" / "dog" / "1.wav", noise(0, 0.5))
    places = {name: tmp_path / name for name in ("absent", "empty", "sounds", "new")} | {
        "weights": tiny_en,
        "cache": cache,
    }
    status, out, err = run(capsys, *(argument.format(**places) for argument in arguments))
    assert status == 2 and out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], err
    assert not (tmp_path / "new").exists()


def test_bad_files_do_not_stop_the_good_ones(capsys, tmp_path, tiny_en):
    sounds = tmp_path / "sounds"
    for index in range(3):
        write_wav(sounds / "dog" / f"{index}.wav", noise(index, 0.5))
    (sounds / "dog" / "text.wav").write_text("woof")
    (sounds / "dog" / "zero.ogg").touch()
    (sounds / "dog" / "cut.wav").write_bytes((sounds / "dog" / "0.wav").read_bytes()[:4000])
    (sounds / "dog" / "new\nline.wav").write_text("woof")
    arguments = ("extract", sounds, tmp_path / "a.zarr", "--model", tiny_en, "--clip-seconds", "0.5")
    status, out, err = run(capsys, *arguments)
    assert status == 1
    assert "3 clips written, 0 were there, 4 failed" in out
    failed = sorted(line for line in err.splitlines() if line.startswith("failed: "))
    assert [line.split(": ")[1] for line in failed] == [
        "'dog/new\\nline.wav'", "dog/cut.wav", "dog/text.wav", "dog/zero.ogg",
    ]  # fmt: skip
    status, out, _ = run(capsys, *arguments, "--json")
    report = json.loads(out)
    assert status == 1 and {"clips", "written", "skipped", "failed", "seconds", "clips_per_second"} <= set(report)
    assert (report["clips"], report["written"], report["skipped"], report["failed"]) == (7, 0, 3, 4)
    assert {"id", "path", "error"} == set(report["failures"][0])
    status, out, _ = run(capsys, "info", tmp_path / "a.zarr", "--json")
    info = json.loads(out)
    assert (
        status == 0
        and info["complete"]
        and (info["clips"], info["failed"], info["layers"], info["dim"]) == (7, 4, 4, 384)
    )


def test_progress_is_plain_lines_on_stderr_and_only_the_result_on_stdout(capsys, tmp_path, tiny_en):
    write_wav(tmp_path / "sounds" / "dog" / "1.wav", noise(0, 0.5))
    arguments = ("extract", tmp_path / "sounds", tmp_path / "a.zarr", "--model", tiny_en, "--clip-seconds", "0.5")
    status, out, err = run(capsys, *arguments)
    assert status == 0 and len(out.splitlines()) == 1
    assert "extract: 1/1 clips" in err and "\r" not in err and "\x1b" not in err
    status, _, err = run(capsys, "--quiet", *arguments)
    assert status == 0 and err == "note: 1 class from folder names: dog\n"


@pytest.mark.parametrize("given", [("1-2",), ("1,2",), ("2", "1"), ("1, 2",), ("all",), ("1-1", "2")])
def test_layers_are_given_as_lists_and_ranges(capsys, cache, given):
    options = [word for layer in given for word in ("--layer", layer)]
    status, out, _ = run(capsys, "probe", cache, "--json", *options)
    assert status == 0 and [row["layer"] for row in json.loads(out)["layers"]] == [1, 2]


def test_probe_finds_the_layer_that_holds_the_label(capsys, cache, tmp_path):
    status, out, _ = run(capsys, "probe", cache, "--json", "--figure", tmp_path / "layers.png")
    result = json.loads(out)
    assert status == 0 and [row["layer"] for row in result["layers"]] == [1, 2]
    assert result["layers"][0]["accuracy"] < 0.6 < 0.9 < result["layers"][1]["accuracy"]
    assert {"accuracy", "folds", "macro_f1", "class_f1"} <= set(result["layers"][0])
    assert (tmp_path / "layers.png").stat().st_size > 5000
    status, out, _ = run(capsys, "probe", cache, "--layer", "2")
    assert status == 0 and "accuracy" in out


def test_probe_and_heads_print_map_where_clips_have_several_labels(capsys, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.random((60, 4)) < (0.5, 0.4, 0.3, 0.0)  # no clip has the last class
    features = rng.normal(size=(60, 2, 25, 16))
    features[:, 0, :, :4] += 4 * labels[:, None, :]
    path = planted_cache(tmp_path / "a.zarr", features, labels.astype(np.uint8), fold=np.arange(60) % 3 + 1).path
    status, out, err = run(capsys, "probe", path)
    assert status == 0 and "mAP" in out and "note: " in err
    status, out, _ = run(capsys, "probe", path, "--json")
    result = json.loads(out)
    assert result["metric"] == "mAP" and result["layers"][0]["mAP"] > 0.9 > result["layers"][1]["mAP"]
    status, out, _ = run(capsys, "train-head", path, "--head", "last-mlp", "--epochs", "2", "--json")
    assert status == 0 and json.loads(out)["metric"] == "mAP"


def test_a_trained_head_can_be_loaded(capsys, cache, tmp_path):
    import torch

    from whisper_at_cli.heads import load_head

    arguments = ("train-head", cache, "--head", "tl-tr", "--dim", "8", "--epochs", "3", "--out", tmp_path / "head")
    status, out, _ = run(capsys, *arguments, "--json")
    result = json.loads(out)
    assert status == 0 and {"head", "dim", "params", "metric", "value", "folds", "samples_per_second"} <= set(result)
    assert result["metric"] == "accuracy" and len(result["folds"]) == 5
    module = load_head(result["checkpoint"])
    assert module(torch.zeros(2, 2, 25, 16)).shape == (2, 4)


def test_heads_prints_both_ways_of_counting(capsys):
    status, out, _ = run(capsys, "heads", "--model", "large-v1", "--json")
    rows = json.loads(out)["heads"]
    assert status == 0 and {"head", "dim", "params", "flops", "share_of_encoder"} <= set(rows[0])
    ratios = {row["name"]: row["flops_two_per_multiply_add"] / row["flops"] for row in rows}
    assert all(1 < ratio <= 2 for ratio in ratios.values())  # layer norms count once in both
    assert all(ratio > 1.9 for name, ratio in ratios.items() if not name.startswith("wa-pool"))
    assert run(capsys, "heads")[0] == 0


def test_verify_fails_on_damage(capsys, cache):
    assert run(capsys, "verify", cache)[0] == 0
    shard = cache / "features/c.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 4
    shard.write_bytes(data)
    status, out, _ = run(capsys, "verify", cache)
    assert status == 1 and "damaged: clip0" in out
    status, out, _ = run(capsys, "verify", cache, "--json")
    assert status == 1 and json.loads(out)["ok"] is False


def test_what_the_system_refuses_is_said_as_that(capsys, cache, tmp_path, monkeypatch):
    """A test run as root may write anywhere, so the refusal is planted."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr("whisper_at_cli.extract.cache.export.export_npz", refuse)
    status, out, err = run(capsys, "export", cache, tmp_path / "out")
    assert status == 1 and out == "" and err.count("\n") == 1
    assert f"{tmp_path / 'out'}: Permission denied" in err and "should not happen" not in err


@pytest.mark.parametrize(
    "given, used", [({}, "5000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")]
)
def test_waiting_threads_soon_sleep_unless_the_user_says_otherwise(given, used):
    """It has to be said before torch is loaded, and importing the commands does not load it."""
    code = "import os, sys, whisper_at_cli.cli; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [used, "False"]
