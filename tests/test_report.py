"""The report: its numbers are those of the results, and nothing a user wrote gets out of its place."""

import copy
import json
import re

import numpy as np
import pytest
from predicted import planted

from pages import HOSTILE, Elements, assert_nothing_got_out
from planted import planted_cache
from results import CLASSES, HEAD, noise_result, probe_result
from whisper_at_cli.cli import main
from whisper_at_cli.probe.report.charts import Curve, fit_line, line_chart, nice_ticks, scatter_chart, whole_ticks
from whisper_at_cli.probe.report.page import Source, render_report, report_numbers
from whisper_at_cli.probe.report.results import name_probes, scored_in_noise, wer_increase


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(["--quiet", *map(str, arguments)])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def places(chart):
    """Where the two dots of a chart lie, in the drawing: right and down."""
    found = re.findall(r'<circle class="dot[^>]*cx="([\d.]+)" cy="([\d.]+)"', chart)
    return [(float(x), float(y)) for x, y in found[:2]]  # a legend has dots too


def cells(page, kind):
    """Rows of the first table of a class, as text."""
    table = re.search(rf'<table class="{kind}[ "].*?</table>', page, re.DOTALL)[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]


def test_best_layers_are_found_where_the_result_does_not_name_them_and_taken_where_it_does():
    result = probe_result()
    del result["best_layer"]
    probe = name_probes([Source("a.json", result)])[0]
    assert probe.best_layer == 3
    assert probe.best_per_class == {"dog": 2, "rain": 1, "sea_waves": None}
    named = name_probes([Source("a.json", probe_result(best_layer_per_class={"dog": 3}))])[0]
    assert named.best_per_class["dog"] == 3


def test_the_class_table_has_every_score_best_layer_and_increase():
    page = render_report([Source("a.json", probe_result())], [Source("n.json", noise_result())])
    assert cells(page, "classes") == [
        ["Class", "1", "2", "3", "Best F1", "Best layer", "WER increase"],
        ["dog", "50", "90", "70", "90.0", "2", "40.0"],
        ["rain", "60", "60", "20", "60.0", "1", "80.0"],
        ["sea waves", "–", "–", "–", "–", "–", "–"],
    ]


def test_the_confusion_matrix_is_that_of_the_best_layer():
    result = probe_result()
    result["layers"][0]["confusion"] = {"dog": {"rain": 3}}
    page = render_report([Source("a.json", result)])
    assert "Confusion in layer 3: tiny.en" in page
    assert cells(page, "confusion") == [["", "dog", "rain"], ["dog", "2", "1"], ["rain", "", "3"]]


def test_many_classes_are_a_list_of_what_is_taken_for_what():
    names = [f"c{i:02d}" for i in range(70)]
    result = probe_result()
    for row in result["layers"]:
        row["class_f1"] = dict.fromkeys(names, 0.5)
        row["confusion"] = {name: {name: 2, names[0]: i} for i, name in enumerate(names)}
    page = render_report([Source("a.json", result)])
    assert '<td>c69</td><td>c00</td><td class="number">69</td>' in page and 'class="confusion"' not in page


def test_wer_increase_is_between_the_papers_snrs_where_they_were_measured():
    assert wer_increase(Source("n", noise_result())) == pytest.approx({"dog": 0.4, "rain": 0.8, "wind": 0.0})
    levels = [level | {"snr": level["snr"] + 1} for level in noise_result()["results"]]
    assert wer_increase(Source("n", noise_result(results=levels))) == pytest.approx({"dog": 1.0, "wind": 0.0})
    assert wer_increase(Source("n", noise_result(results=levels[:1]))) == {}


def test_probe_and_noise_meet_where_they_are_of_one_model():
    probe = name_probes([Source("a", probe_result())])[0]
    noisy = Source("n", noise_result())
    points = scored_in_noise(probe, noisy)
    assert set(points) == {"dog", "rain"}
    assert points["dog"] == pytest.approx((70, 40)) and points["rain"] == pytest.approx((20, 80))
    page = render_report([Source("a", probe_result())], [noisy])
    assert "WER at −10 dB minus at 20 dB" in page and "F1 of the class in layer 3" in page
    other = render_report([Source("a", probe_result(backbone="base"))], [noisy])
    assert "minus at" not in other


def test_a_line_through_known_points_is_that_line():
    xs = np.random.default_rng(0).normal(size=40)
    ys = 3 - 2 * xs + np.random.default_rng(1).normal(size=40)
    slope, offset, r = fit_line(xs, ys)
    assert (slope, offset) == pytest.approx(np.polyfit(xs, ys, 1))
    assert r == pytest.approx(np.corrcoef(xs, ys)[0, 1])
    assert fit_line([1, 1, 1], [1, 2, 3]) is None and fit_line([1, 2], [1, 2]) is None


@pytest.mark.parametrize("low, high", [(0, 1), (88.1, 97.2), (0, 0), (-3, 1234), (0.02, 0.021), (4, 110)])
def test_ticks_are_few_and_enclose_what_is_drawn(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_layer_ticks_are_whole_numbers_from_the_first():
    assert whole_ticks(1, 4) == [1, 2, 3, 4]
    assert whole_ticks(1, 32) == [1, 4, 8, 12, 16, 20, 24, 28, 32]


def test_a_curve_has_its_values_where_they_belong():
    page = render_report([Source("a.json", probe_result())])
    said = re.findall(r"<title>(tiny\.en: [^<]*)</title>", page)
    expected = [f"tiny.en: {v}.0 % ({v - std}.0 to {v + std}.0) at {std}" for v, std in ((60, 1), (70, 2), (80, 3))]
    assert said == expected
    line = re.search(r'<polyline class="line s1" stroke-dasharray="" points="([^"]*)"', page)[1]
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    assert points[0][0] < points[1][0] < points[2][0] and points[0][1] > points[1][1] > points[2][1]
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.2)


def test_axes_run_as_in_the_figures():
    """Harder to the right: low SNR. A larger increase of the word error rate is higher."""
    curve = Curve("tiny.en", [-10.0, 20.0], [90.0, 5.0])
    chart = line_chart([curve], x_ticks=[-10, 20], x_label="", y_label="", about="", falling_x=True)
    (noisy, top), (quiet, bottom) = places(chart)
    assert noisy > quiet and top < bottom
    chart = scatter_chart({"a": (1.0, 10.0), "b": (2.0, 40.0)}, x_label="", y_label="", about="")
    (left, little), (right, much) = places(chart)
    assert left < right and little > much
    page = render_report([Source("a.json", probe_result())], [Source("n.json", noise_result())])
    drawn = re.findall(r'aria-label="word error rate against.*?</svg>', page, re.DOTALL)[0]
    ticks = re.findall(r'x="([\d.]+)"[^>]*text-anchor="middle">([−\d]+)<', drawn)
    across = {int(tick.replace("−", "-")): float(x) for x, tick in ticks}
    assert sorted(across, reverse=True) == sorted(across, key=across.get)


def test_probes_of_several_labels_are_drawn_by_map_beside_those_by_accuracy():
    layers = [{"layer": n, "mAP": n / 10, "mAP_std": None, "folds": [], "class_ap": {"dog": n / 10}} for n in (1, 2)]
    mixed = {"metric": "mAP", "layers": layers, "backbone": "base", "clips": 5}
    page = render_report([Source("a", probe_result()), Source("b", mixed)])
    assert "Accuracy of a probe of each layer" in page and "mAP of a probe of each layer" in page
    assert ["Class", "1", "2", "Best AP", "Best layer"] in list(cells(page.split("Classes: base")[1], "classes"))


def test_two_caches_of_one_backbone_can_be_told_apart():
    names = [p.name for p in name_probes([Source("x/a.zarr", probe_result()), Source("x/b.zarr", probe_result())])]
    assert names == ["tiny.en, a", "tiny.en, b"]
    names = [p.name for p in name_probes([Source("x/a.zarr", probe_result()), Source("y/a.zarr", probe_result())])]
    assert len(set(names)) == 2


def test_settings_provenance_and_notes_are_all_there():
    cache = {
        "cache": "a.zarr", "failed": 2, "pending": 0, "weights_sha256": "beef" * 16, "clip_seconds": 5.0,
        "dtype": "float16", "class_names": CLASSES, "failures": [], "made": {"tool_version": "0.1.0"},
    }  # fmt: skip
    page = render_report(
        [Source("a.zarr", probe_result(), cache)], [Source("n.json", noise_result())], [Source("h", HEAD)]
    )
    text = Elements(page).text
    for said in (
        "beef" * 16, "clip seconds5", "dtypefloat16", "made: tool version0.1.0", "strength1", "settings.mixingexact",
        "2 clips failed in extraction", "1 of 3 classes have no clip", "4,622", "93.0 ± 2.0",
    ):  # fmt: skip
        assert said in text, said


def test_nothing_that_a_user_wrote_gets_out_of_its_place():
    result, noisy, head = probe_result(backbone=HOSTILE, warnings=[HOSTILE]), noise_result(model=HOSTILE), dict(HEAD)
    for row in result["layers"]:
        row["class_f1"] = {HOSTILE: 0.5, "rain": 0.7, "x": 0.1}
        row["confusion"] = {HOSTILE: {HOSTILE: 1, "rain": 2}}
    for level in noisy["results"]:
        level["class_wer"] = {HOSTILE: level["wer"], "rain": 0.5, "x": 0.4}
    noisy["settings"] = {HOSTILE: HOSTILE}
    head["head"] = HOSTILE
    page = render_report([Source(HOSTILE, result)], [Source(HOSTILE, noisy)], [Source(HOSTILE, head)], title=HOSTILE)
    found = assert_nothing_got_out(page)
    assert found.text.count(HOSTILE) > 10
    assert not [1 for _, attributes in found.elements if "style" in attributes]


def test_the_same_results_give_the_same_page_and_are_not_changed():
    sources = [Source("a.json", probe_result())], [Source("n.json", noise_result())]
    before = copy.deepcopy(sources)
    assert render_report(*sources) == render_report(*sources) and sources == before


def test_results_with_nothing_defined_still_make_a_page():
    rows = [{"layer": 1, "mAP": None, "mAP_std": None, "folds": [], "class_ap": {"dog": None}}]
    empty = {"metric": "mAP", "layers": rows, "best_layer": None, "backbone": "tiny.en", "clips": 0}
    levels = [{"snr": 0.0, "wer": None, "class_wer": {"dog": None}}]
    page = render_report(
        [Source("a", empty)], [Source("n", noise_result(results=levels, clean={}))], [Source("h", {"mAP": 0.4})]
    )
    assert page.endswith("</html>\n")


@pytest.fixture
def cache(tmp_path):
    """Forty clips of four classes, readable in layer 2 alone."""
    labels = np.arange(40) % 4
    features = np.random.default_rng(0).normal(size=(40, 2, 25, 16))
    features[:, 1, :, :4] += 6 * np.eye(4)[labels][:, None, :]
    return planted_cache(
        tmp_path / "planted.zarr", features, labels, fold=np.arange(40) // 8 + 1, backbone="tiny.en",
        class_names=["dog", "rain", "wind", "sea_waves"], weights_sha256="beef" * 16,
    )  # fmt: skip


def test_the_command_probes_a_cache_and_reads_results(capsys, cache, tmp_path):
    noisy, head, out = tmp_path / "n.json", tmp_path / "h.json", tmp_path / "new" / "report.html"
    noisy.write_text(json.dumps(noise_result()))
    head.write_text(json.dumps(HEAD))
    status, text, _ = run(capsys, "report", cache.path, "--out", out, "--robustness", noisy, "--head", head, "--json")
    numbers = json.loads(text)
    assert status == 0 and numbers["bytes"] == out.stat().st_size
    assert numbers["probes"][0]["best_layer"] == 2 and numbers["probes"][0]["value"] > 0.9
    assert numbers["heads"][0]["value"] == 0.93 and numbers["robustness"][0]["clean_wer"] == 0.05
    assert numbers["classes_and_noise"][0]["classes"] == 3
    page = out.read_text(encoding="utf-8")
    assert "beef" * 16 in page and str(cache.path) in page and len(cells(page, "classes")) == 5


def test_a_probes_json_gives_the_table_that_its_cache_gives(capsys, cache, tmp_path):
    _, text, _ = run(capsys, "probe", cache.path, "--json")
    (tmp_path / "probe.json").write_text(text)
    for source, out in ((cache.path, "a.html"), (tmp_path / "probe.json", "b.html")):
        assert run(capsys, "report", source, "--out", tmp_path / out)[0] == 0
    assert cells((tmp_path / "a.html").read_text(), "classes") == cells((tmp_path / "b.html").read_text(), "classes")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--out", "{new}"], "nothing to report on"),
        (["{absent}.json", "--out", "{new}"], "does not exist; make it with: whisper-at-cli probe --json"),
        (["{text}", "--out", "{new}"], "is not JSON"),
        (["{noisy}", "--out", "{new}"], "not that of `probe --json`"),
        (["--robustness", "{head}", "--out", "{new}"], "not that of `robustness --json`"),
        (["--head", "{noisy}", "--out", "{new}"], "not that of `train-head --json`"),
        (["{absent}", "--out", "{new}"], "does not exist"),
        (["{noisy}"], "--out"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(capsys, tmp_path, arguments, said):
    places = {name: tmp_path / name for name in ("new", "absent")}
    for name, text in (("text", "woof"), ("noisy", json.dumps(noise_result())), ("head", json.dumps(HEAD))):
        places[name] = tmp_path / f"{name}.json"
        places[name].write_text(text)
    status, out, err = run(capsys, "report", *(argument.format(**places) for argument in arguments))
    assert status == 2 and out == "" and said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_numbers_for_programs_are_those_of_the_page():
    numbers = report_numbers([Source("a", probe_result())], [Source("n", noise_result())], [Source("h", {"mAP": 0.4})])
    assert numbers["probes"] == [
        {"name": "tiny.en", "source": "a", "metric": "accuracy", "layers": 3, "best_layer": 3, "value": 0.8}
    ]
    assert numbers["heads"] == [{"head": "h", "source": "h", "metric": "mAP", "value": 0.4}]
    assert numbers["classes_and_noise"] == [{"probe": "tiny.en", "model": "tiny.en", "classes": 2, "r": None}]


def test_intervals_of_layers_classes_and_heads_are_on_the_page():
    result = probe_result(
        best_layer_counts=[{"layer": layer, "classes": 1, "ci95": [0.0, 2.0]} for layer in (1, 2, 3)],
        best_layer_per_class_kept={"dog": 0.9, "rain": 0.5, "sea_waves": None},
        best_layer_per_class_ties={"rain": [1, 2]},
    )
    for row in result["layers"]:
        row |= {"ci95": [row["accuracy"] - 0.031, row["accuracy"] + 0.021], "differs_from_best": row["layer"] == 1}
        row["band95"] = [row["accuracy"] - 0.05, row["accuracy"] + 0.04]
    page = render_report([Source("a.json", result)], heads=[Source("h.json", HEAD | {"ci95": [0.9, 0.951]})])
    assert "tiny.en: 60.0 % (55.0 to 64.0) at 1" in page
    assert "80.0 (76.9–82.1)" in page and "93.0 (90.0–95.1)" in page
    assert page.count('class="whisker"') == 3
    assert "a class keeps its layer in 70% of bootstrap draws" in page
    assert "1 at 1, 1 of them as good in a higher layer" in page and 'class="bar tied s1"' in page
    rows = re.search(r"95 % interval</th>.*?</table>", page, re.DOTALL)[0]
    assert re.findall(r">(yes|no)<", rows) == ["yes", "no", "no"] and "56.9–62.1" in rows


def test_predictions_make_one_table_of_all_models_with_intervals_and_chance(capsys, tmp_path):
    planted(np.random.default_rng(5), true=[0.6, 0.9], clips=100).save(tmp_path / "p.npz")
    out = tmp_path / "report.html"
    status, text, err = run(capsys, "report", "--predictions", tmp_path / "p.npz", "--out", out, "--json")
    assert status == 0, err
    compared = json.loads(text)["compared"]
    assert [row["name"] for row in compared] == ["layer-1", "layer-2", "chance"]
    page = out.read_text()
    best = compared[1]
    shown = f"{100 * best['value']:.1f} ({100 * best['ci95'][0]:.1f}–{100 * best['ci95'][1]:.1f})"
    assert "All models" in page and shown in page and "&lt; 0.0001" in page and ">best<" in page


def test_dots_have_their_intervals_across_and_up_inside_the_axes():
    points = {"dog": (50.0, 10.0), "rain": (60.0, 20.0), "wind": (70.0, 25.0)}
    bars = {"dog": ([30.0, 95.0], None), "rain": ([55.0, 65.0], [-40.0, 120.0]), "wind": (None, None)}
    chart = scatter_chart(points, x_label="F1", y_label="WER", about="", bars=bars)
    crosses = re.findall(r'class="cross" points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', chart)
    assert len(crosses) == 3, "two across and one up"
    across, _, up = [list(map(float, ends)) for ends in crosses]
    assert across[1] == across[3] and across[0] < across[2] and up[0] == up[2] and up[1] > up[3]
    assert all(54 <= x <= 448 and 12 <= y <= 250 for ends in (across, up) for x, y in (ends[:2], ends[2:]))
