"""Figures: the numbers that were drawn lie beside the picture, in every format, and nothing global is touched."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe.figures import draw_layer_accuracy
from whisper_at_cli.probe.figures.curves import layer_ticks
from whisper_at_cli.probe.layers import ProbeResult
from whisper_at_cli.probe.scores import LayerAccuracy

RESULT = ProbeResult(
    metric="accuracy",
    layers=[
        LayerAccuracy(layer, 0.5 + layer / 10, 0.02, [], 0.5, {}, {}, ci95=[0.5, 0.95], band95=[0.4, 0.97])
        for layer in (1, 2, 4)
    ],
    best_layer=4, best_layer_per_class={}, clips=10, backbone="tiny.en", strength=1.0, seed=0, device="cpu",
)  # fmt: skip
EXPECTED = {
    "name": "tiny.en", "metric": "accuracy", "layers": [1, 2, 4],
    "value": pytest.approx([0.6, 0.7, 0.9]), "std": [0.02] * 3, "ci95": [[0.5, 0.95]] * 3,
    "band": "95 % simultaneous band", "low": [0.4] * 3, "high": [0.97] * 3,
}  # fmt: skip


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_the_picture_is_what_its_suffix_says_and_its_numbers_lie_beside_it(tmp_path, suffix, magic):
    path = tmp_path / "new" / f"layers{suffix}"
    numbers = draw_layer_accuracy([("tiny.en", RESULT)], path)
    assert path.read_bytes().startswith(magic)
    assert numbers["curves"] == [EXPECTED]
    assert json.loads(path.with_suffix(".json").read_text()) == numbers
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, "layers.json"])


def test_a_result_read_from_json_draws_the_same_curve(tmp_path):
    read = json.loads(json.dumps(asdict(RESULT)))
    numbers = draw_layer_accuracy([("tiny.en", RESULT), ("tiny.en", read)], tmp_path / "a.png")
    assert numbers["curves"][0] == numbers["curves"][1]


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_the_same_numbers_give_the_same_bytes(tmp_path, suffix):
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for path in (first, second):
        draw_layer_accuracy([("tiny.en", RESULT)], path)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("last, ticks", [(1, [1]), (4, [1, 2, 3, 4]), (12, [1, 2, 4, 6, 8, 10, 12])])
def test_layer_ticks_are_whole_numbers_from_one(last, ticks):
    assert layer_ticks(last) == ticks


def test_layer_ticks_stay_few():
    assert layer_ticks(32) == [1, 4, 8, 12, 16, 20, 24, 28, 32]
    assert all(layer_ticks(last)[0] == 1 and len(layer_ticks(last)) <= 9 for last in range(1, 200))


def test_a_suffix_that_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"layers\.gif ends in none of \.png, \.pdf, \.svg"):
        draw_layer_accuracy([("tiny.en", RESULT)], tmp_path / "layers.gif")


def test_accuracy_and_map_do_not_share_an_axis(tmp_path):
    other = {"metric": "mAP", "layers": [{"layer": 1, "mAP": 0.3, "mAP_std": None}]}
    with pytest.raises(UsageError, match="accuracy and mAP cannot share an axis"):
        draw_layer_accuracy([("a", RESULT), ("b", other)], tmp_path / "a.png")


def test_drawing_needs_neither_pyplot_nor_a_display(tmp_path):
    program = (
        "import sys; from whisper_at_cli.probe.figures import draw_layer_accuracy\n"
        f"draw_layer_accuracy([('a', {{'layers': [{{'layer': 1, 'accuracy': 0.5}}]}})], {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_the_room_imports_nothing_heavy():
    program = "import sys, whisper_at_cli.probe; assert not {'torch', 'sklearn', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
