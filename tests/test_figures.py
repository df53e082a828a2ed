"""The paper's figures from results on disk: the numbers drawn are those of the results, and pictures can be read."""

import json

import numpy as np
import pytest
from matplotlib.text import Text
from scipy.stats import pearsonr, spearmanr
from test_cli import run

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe.figures import draw_figure_1, draw_figure_2, draw_figure_3, draw_figure_5
from whisper_at_cli.probe.figures.inputs import as_result, load_results
from whisper_at_cli.probe.figures.labels import label_points
from whisper_at_cli.probe.figures.sizes import whisper_parameters

CLASSES = [f"class{c}" for c in range(12)]


def robustness(model="tiny.en", *, classes=CLASSES, seed=0, **fields):
    rng = np.random.default_rng(seed)
    rows = []
    for snr in (-10.0, 0.0, 20.0):
        wer = dict(zip(classes, (rng.uniform(0.1, 0.3, len(classes)) + (20 - snr) / 60).tolist(), strict=True))
        rows.append(
            {
                "snr": snr, "wer": float(np.mean(list(wer.values()))), "class_wer": wer,
                "wer_paper": 0.9, "class_wer_paper": dict.fromkeys(classes, 0.9), "utterances": 40,
            }
        )  # fmt: skip
    clean = {"wer": 0.05, "wer_paper": 0.08}
    return {"model": model, "kind": "robustness", "parameters": 37184640, "clean": clean, "results": rows} | fields


def probe_json(f1, *, backbone="tiny.en", metric="accuracy"):
    """Result of a probe whose layer l has class-wise scores f1[l - 1], in the fields that older results have too."""
    field = "class_f1" if metric == "accuracy" else "class_ap"
    layers = [
        {"layer": at, metric: float(np.mean(row)), f"{metric}_std": 0.01, field: dict(zip(CLASSES, row, strict=True))}
        for at, row in enumerate(f1, start=1)
    ]
    return {"metric": metric, "layers": layers, "backbone": backbone}


def head_json(backbone, value):
    return {"head": "tl-tr", "dim": 128, "metric": "mAP", "value": value, "backbone": backbone}


F1 = np.random.default_rng(1).uniform(0.5, 1, (3, 12)).round(3).tolist()


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_figure_1_has_wer_above_and_layers_below(tmp_path):
    results = [as_result("tiny.en", robustness()), as_result("tiny.en", probe_json(F1)), as_result("b", probe_json(F1))]
    numbers = draw_figure_1(results, tmp_path / "1.pdf")
    assert json.loads((tmp_path / "1.json").read_text()) == numbers
    (upper,) = numbers["upper"]["curves"]
    assert upper["snr"] == [-10, 0, 20] and upper["wer"] == [row["wer"] for row in robustness()["results"]]
    assert [curve["name"] for curve in numbers["lower"]["curves"]] == ["tiny.en", "b"]
    assert draw_figure_1(results[:1], tmp_path / "1.png", wer="paper")["upper"]["curves"][0]["wer"] == [0.9] * 3
    assert draw_figure_1(results[1:], tmp_path / "1.svg")["upper"] is None


def test_figure_2_fits_all_classes_and_says_how_sure_it_is(tmp_path):
    numbers = draw_figure_2([as_result("p", probe_json(F1)), as_result("r", robustness())], tmp_path / "2.png")
    low, _, high = (row["class_wer"] for row in robustness()["results"])
    increase = [low[name] - high[name] for name in CLASSES]
    expected = pearsonr(F1[2], increase)
    assert (numbers["pearson"]["r"], numbers["pearson"]["p"]) == pytest.approx(expected)
    slope, intercept = np.polyfit(F1[2], increase, 1)
    assert numbers["line"] == {"slope": pytest.approx(slope), "intercept": pytest.approx(intercept)}
    assert numbers["layer"] == 3 and len(numbers["classes"]) == 12 and numbers["left_out"] == []


def test_figure_2_takes_another_layer_and_other_snrs(tmp_path):
    results = [as_result("p", probe_json(F1)), as_result("r", robustness(classes=[*CLASSES[:9], "unheard"]))]
    numbers = draw_figure_2(results, tmp_path / "2.png", layer=1, low_snr=0, high_snr=20)
    assert [point["score"] for point in numbers["classes"]] == F1[0][:9] and numbers["snr"] == [0, 20]
    assert numbers["left_out"] == [*CLASSES[10:], "class9", "unheard"]


def test_a_line_through_classes_that_do_not_differ_is_not_drawn(tmp_path):
    results = [as_result("p", probe_json([[0.5] * 12])), as_result("r", robustness())]
    assert draw_figure_2(results, tmp_path / "2.png")["line"] is None


def test_labels_in_a_crowd_cover_neither_each_other_nor_points_nor_the_edge(tmp_path):
    from whisper_at_cli.probe.figures import canvas

    rng = np.random.default_rng(0)
    figure = canvas.new_figure(1.0)
    axes = figure.add_subplot()
    x, y = rng.normal(size=(2, 50))
    axes.plot(x, y, "o", markersize=3)
    axes.margins(0.1)
    assert label_points(axes, x, y, [f"some class {i}" for i in range(50)], fontsize=4.5, mark=3) == 0
    figure.draw_without_rendering()
    texts = [Text.get_window_extent(annotation) for annotation in axes.texts]  # without its leader
    assert len(texts) == 50
    marks = axes.transData.transform(np.column_stack([x, y]))
    for i, box in enumerate(texts):
        assert not any(box.overlaps(other) for other in texts[i + 1 :])
        assert not any(box.contains(*mark) for mark in marks)
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1


def test_figure_3_counts_layers_from_one_and_gives_ties_to_the_lower(tmp_path):
    f1 = np.zeros((4, 12))
    f1[0, :3], f1[3, 3:9], f1[[1, 2], 9:11] = 0.9, 0.8, 0.7
    f1[:, 11] = 0.3
    numbers = draw_figure_3([as_result("a", probe_json(f1.tolist()))], tmp_path / "3.png")
    (panel,) = numbers["histograms"]
    assert (
        panel["layers"] == [1, 2, 3, 4] and panel["classes"] == [4, 2, 0, 6] and panel["of_these_tied"] == [1, 2, 0, 0]
    )
    assert panel["ties"] == {"class9": [2, 3], "class10": [2, 3], "class11": [1, 2, 3, 4]}


def test_figure_3_from_a_cache_recovers_the_layers_where_classes_were_planted(capsys, tmp_path):
    """Class c can only be read in layer 1 + c % 4: everywhere else its clips look like those of another class."""
    y = np.arange(240) % 12
    rng = np.random.default_rng(0)
    features = 0.1 * rng.normal(size=(240, 4, 2, 24))
    for layer in range(4):
        readable = y % 4 == layer
        features[readable, layer, :, :12] += np.eye(12)[y[readable]][:, None]
        features[~readable, layer, :, 12:] += np.eye(12)[rng.permutation(y[~readable])][:, None]
    cache = planted_cache(tmp_path / "a.zarr", features, y, fold=np.arange(240) // 48 + 1).path
    status, out, _ = run(capsys, "figure", "3", cache, "--out", tmp_path / "3.png", "--json")
    (panel,) = json.loads(out)["histograms"]
    assert status == 0 and panel["classes"] == [3, 3, 3, 3] and panel["ties"] == {}
    expected = {f"class{c}": 1 + c % 4 for c in range(12)}
    assert panel["best_layer_per_class"] == expected
    status, out, _ = run(capsys, "probe", cache, "--json")
    assert json.loads(out)["best_layer_per_class"] == expected


def test_figure_5_orders_models_by_size_and_knows_the_sizes_of_whispers(tmp_path):
    results = [
        as_result("base.en", head_json("base.en", 0.4)), as_result("tiny.en", head_json("tiny.en", 0.3)),
        as_result("tiny.en", robustness()), as_result("base.en", robustness("base.en", parameters=None)),
    ]  # fmt: skip
    numbers = draw_figure_5(results, tmp_path / "5.svg")
    assert [(point["model"], point["value"]) for point in numbers["tagging"]] == [("tiny.en", 0.3), ("base.en", 0.4)]
    assert [point["wer"] for point in numbers["transcription"]] == [0.05, 0.05]
    assert numbers["tagging"][1]["parameters"] == numbers["transcription"][1]["parameters"] == 71825408
    numbers = draw_figure_5(results[2:], tmp_path / "5.png", wer="paper", snr=-10.0, parameters={"base.en": 7})
    assert [point["model"] for point in numbers["transcription"]] == ["base.en", "tiny.en"]
    assert numbers["transcription"][0]["wer"] == 0.9 and numbers["metric"] is None


@pytest.mark.parametrize("name", ["tiny.en", "base", "turbo"])
def test_parameters_are_those_of_openais_own_model(name):
    from whisper.model import ModelDimensions, Whisper

    from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES

    whole = {"tiny.en": (51864, 4), "base": (51865, 6), "turbo": (51866, 4)}
    size, (words, decoder) = WHISPER_SIZES[name], whole[name]
    one_layer = Whisper(ModelDimensions(size.mels, 10, size.dim, size.heads, 1, words, 448, size.dim, size.heads, 1))
    parts = [one_layer.encoder.blocks[0], one_layer.decoder.blocks[0]]
    blocks = [sum(p.numel() for p in part.parameters()) for part in parts]
    rest = sum(p.numel() for p in one_layer.parameters()) - sum(blocks)
    assert whisper_parameters(name) == rest + size.layers * blocks[0] + decoder * blocks[1]
    assert whisper_parameters("hubert-xlarge") is None


def test_fonts_are_embedded_as_truetype_and_svg_text_is_paths(tmp_path):
    results = [as_result("a", probe_json(F1))]
    draw_figure_3(results, tmp_path / "3.pdf")
    assert b"/FontFile2" in (tmp_path / "3.pdf").read_bytes() and b"/Type3" not in (tmp_path / "3.pdf").read_bytes()
    draw_figure_3(results, tmp_path / "3.svg")
    first = (tmp_path / "3.svg").read_bytes()
    assert b"<text" not in first and b"font-family" not in first
    draw_figure_3(results, tmp_path / "3.svg")
    assert (tmp_path / "3.svg").read_bytes() == first


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_every_figure_is_one_column_wide_and_comes_from_files_on_disk(capsys, tmp_path, number):
    from PIL import Image

    probe, heads = write(tmp_path / "p.json", probe_json(F1)), write(tmp_path / "h.json", head_json("tiny.en", 0.3))
    inputs = {1: [probe], 2: [probe], 3: [probe], 5: [heads]}[number]
    robust = [] if number == 3 else ["--robustness", write(tmp_path / "r.json", robustness())]
    out = tmp_path / "figure.png"
    status, text, _ = run(capsys, "figure", number, *inputs, *robust, "--out", out)
    assert status == 0 and "figure.json" in text
    with Image.open(out) as image:
        assert image.width / image.info["dpi"][0] == pytest.approx(3.15, abs=0.02)
        grey = np.asarray(image.convert("L"))
    assert (grey < 100).mean() > 0.005 and (grey > 250).mean() > 0.5


def test_an_input_can_be_given_a_name_of_its_own(capsys, tmp_path):
    path = write(tmp_path / "p.json", probe_json(F1))
    status, out, _ = run(capsys, "figure", "1", path, f"other={path}", "--out", tmp_path / "1.png", "--json")
    assert status == 0 and [curve["name"] for curve in json.loads(out)["lower"]["curves"]] == ["tiny.en", "other"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["4", "{probe}"], "no figure 4 to draw; choose from 1, 2, 3, 5"),
        (["1"], "figure 1 has nothing to draw"),
        (["1", "{absent}"], "absent.json does not exist"),
        (["1", "{text}"], "is not a JSON file"),
        (["1", "{other}"], "is not a result of probe, robustness, train-head: its fields are answer"),
        (["1", "{head}"], "is a result of train-head; figure 1 takes those of probe and robustness"),
        (["1", "{probe}", "{copy}"], "are both called tiny.en; name them as NAME=PATH"),
        (["1", "{probe}", "{map}"], "accuracy and mAP cannot share an axis"),
        (["1", "--robustness", "{probe}"], "is a result of probe, and --robustness needs one of robustness"),
        (["2", "{probe}"], "takes one result of probe, or a cache, and one of robustness"),
        (["2", "{probe}", "--robustness", "{robust}", "--low-snr", "-15"], "for SNR -10, 0, 20, none for -15 dB"),
        (["2", "{probe}", "--robustness", "{robust}", "--layer", "9"], "holds layers 1, 2, 3; layer 9 was asked for"),
        (["2", "{probe}", "--robustness", "{strange}"], "have 0 classes in common"),
        (["3", "{one}"], "holds one layer, and figure 3 compares layers"),
        (["3", "{robust}"], "is a result of robustness, and figure 3 needs one of probe"),
        (["3", "{probe}", "--snr", "5"], "--snr is for figure 5"),
        (["5", "{unknown}"], "nothing says how many parameters hubert"),
        (["5", "{head}", "--parameters", "hubert"], "is not of the form NAME=N"),
        (["1", "{probe}", "--wer", "mine"], "choose from whisper, paper"),
        (["1", "{old}", "--wer", "paper"], "has no wer_paper; choose another --wer"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_one_clear_line(capsys, tmp_path, arguments, said):
    places = {
        "probe": write(tmp_path / "probe.json", probe_json(F1)),
        "copy": write(tmp_path / "copy.json", probe_json(F1)),
        "map": write(tmp_path / "map.json", probe_json(F1, metric="mAP", backbone="base")),
        "one": write(tmp_path / "one.json", probe_json(F1[:1])),
        "head": write(tmp_path / "head.json", head_json("tiny.en", 0.3)),
        "unknown": write(tmp_path / "unknown.json", head_json("hubert", 0.3)),
        "robust": write(tmp_path / "robust.json", robustness()),
        "old": write(tmp_path / "old.json", {"results": [{"snr": 0.0, "wer": 0.1}], "model": "old"}),
        "strange": write(tmp_path / "strange.json", robustness(classes=["x", "y"])),
        "other": write(tmp_path / "other.json", {"answer": 42}),
        "absent": tmp_path / "absent.json",
        "text": tmp_path / "text.json",
    }
    places["text"].write_text("no JSON")
    out = tmp_path / "figure.png"
    status, text, err = run(capsys, "figure", *(part.format(**places) for part in arguments), "--out", out)
    assert status == 2 and text == "" and said in err and len(err.strip().splitlines()) == 1, err
    assert not out.exists()


def test_a_figure_does_not_replace_the_result_it_is_drawn_from(capsys, tmp_path):
    path = write(tmp_path / "layers.json", probe_json(F1))
    for given in (path, f"mine={path}"):
        status, _, err = run(capsys, "figure", "1", given, "--out", tmp_path / "layers.pdf")
        assert status == 2 and "which is one of the inputs; choose another --out" in err
    assert json.loads(path.read_text()) == probe_json(F1) and not (tmp_path / "layers.pdf").exists()


def test_results_without_a_wer_of_clean_speech_need_an_snr(tmp_path):
    with pytest.raises(UsageError, match="has no WER of clean speech; give --snr"):
        draw_figure_5([as_result("tiny.en", robustness(clean=None))], tmp_path / "5.png")


@pytest.mark.parametrize("field, name", [("backbone", "base.en"), ("model", "base.en"), ("other", "head")])
def test_a_result_of_train_head_is_called_by_what_it_was_trained_on(tmp_path, field, name):
    path = tmp_path / "head.json"
    path.write_text(json.dumps({"head": "wa-mlp", "metric": "accuracy", "value": 0.9, field: "base.en"}))
    (result,) = load_results([path], probe=None)
    assert (result.kind, result.name) == ("train-head", name)


def with_intervals(f1):
    """A probe's result with the fields that intervals have."""
    content = probe_json(f1)
    for at, row in enumerate(content["layers"]):
        row |= {"ci95": [0.5, 0.9], "band95": [0.4 + at / 100, 0.95]}
        row["class_ci95"] = {name: [value - 0.1, min(1, value + 0.2)] for name, value in row["class_f1"].items()}
    content["best_layer_counts"] = [{"layer": at + 1, "classes": 4, "ci95": [at, 9.0]} for at in range(len(f1))]
    content["best_layer_per_class_kept"] = dict.fromkeys(CLASSES, 0.5) | {"class0": None}
    return content


def titles(figure_numbers, draw, monkeypatch, path):
    """What the drawn figure's titles say."""
    from whisper_at_cli.probe.figures import canvas

    kept = []
    monkeypatch.setattr(canvas, "save", lambda figure, numbers, path: kept.append(figure) or numbers)
    draw(figure_numbers, path)
    return [axes.get_title(loc="right") for axes in kept[0].axes], kept[0]


def test_figure_1_draws_the_band_of_the_result_and_says_which(tmp_path, monkeypatch):
    results = [as_result("a", with_intervals(F1)), as_result("old", probe_json(F1))]
    lower = draw_figure_1(results, tmp_path / "1.png")["lower"]
    assert lower["curves"][0]["low"] == pytest.approx([0.4, 0.41, 0.42]) and lower["curves"][0]["high"] == [0.95] * 3
    old = lower["curves"][1]
    assert old["low"] == pytest.approx([value - 0.01 for value in old["value"]])
    said, figure = titles(results, draw_figure_1, monkeypatch, tmp_path / "1.png")
    assert said == ["shaded: 95 % simultaneous band, 1 std over folds"]
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(40) and band[:, 1].max() == pytest.approx(95)
    assert titles(results[:1], draw_figure_1, monkeypatch, tmp_path / "1.png")[0] == ["shaded: 95 % simultaneous band"]


def test_figure_3_has_whiskers_and_says_how_often_a_class_keeps_its_layer(tmp_path, monkeypatch):
    results = [as_result("a", with_intervals(F1))]
    (panel,) = draw_figure_3(results, tmp_path / "3.png")["histograms"]
    assert panel["classes_ci95"] == [[0, 9], [1, 9], [2, 9]] and len(panel["kept"]) == 11
    (said,), figure = titles(results, draw_figure_3, monkeypatch, tmp_path / "3.png")
    assert said.endswith("kept in 50% of draws") and figure.axes[0].get_ylim()[1] > 9
    (whiskers,) = (one for one in figure.axes[0].collections if type(one).__name__ == "LineCollection")
    assert [sorted(line[:, 1]) for line in whiskers.get_segments()] == [[0, 9], [1, 9], [2, 9]]
    assert draw_figure_3([as_result("a", probe_json(F1))], tmp_path / "3.png")["histograms"][0]["classes_ci95"] is None


def test_figure_2_has_bars_both_ways_and_intervals_of_both_correlations(tmp_path, monkeypatch):
    noisy = robustness()
    utterances, rng = [f"u{i}" for i in range(20)], np.random.default_rng(3)
    for row in noisy["results"]:
        row["class_counts"] = {
            name: {"utterances": utterances, "wer_errors": rng.integers(0, 9, 20).tolist(), "wer_words": [9] * 20}
            for name in CLASSES
        }
    results = [as_result("p", with_intervals(F1)), as_result("r", noisy)]
    numbers = draw_figure_2(results, tmp_path / "2.png")
    for point in numbers["classes"]:
        low, high = (noisy["results"][at]["class_counts"][point["class"]]["wer_errors"] for at in (0, 2))
        differences = (np.array(low) - high) / 9
        error = differences.std() / np.sqrt(20)
        expected = differences.mean() + np.array([-1.96, 1.96]) * error
        np.testing.assert_allclose(point["wer_increase_ci95"], expected, atol=0.25 * error)
        assert point["score_ci95"] == [point["score"] - 0.1, min(1, point["score"] + 0.2)]
    x, y = (np.array([point[field] for point in numbers["classes"]]) for field in ("score", "wer_increase"))
    at = np.random.default_rng(9).integers(0, 12, (4000, 12))
    for name, of in (("pearson", pearsonr), ("spearman", spearmanr)):
        slow = np.quantile([of(x[draw], y[draw])[0] for draw in at], [0.025, 0.975])
        np.testing.assert_allclose(numbers[name]["ci95"], slow, atol=0.05)
    _, figure = titles(results, draw_figure_2, monkeypatch, tmp_path / "2.png")
    axes = figure.axes[0]
    assert len(axes.containers) == 24 and not axes.yaxis_inverted() and not axes.xaxis_inverted()
    assert (
        min(text.get_fontsize() for text in [*axes.texts, axes.title, *axes.get_xticklabels()] if text.get_text()) >= 6
    )


def test_curves_of_many_layers_keep_their_dashes_and_the_eighth_is_not_the_first(tmp_path, monkeypatch):
    from whisper_at_cli.probe.figures import canvas

    looks = [canvas.look(number) for number in range(9)]
    for a, b in ((0, 7), (1, 8)):
        assert looks[a]["marker"] != looks[b]["marker"] and looks[a]["linestyle"] != looks[b]["linestyle"]
    many = np.linspace(0.5, 1, 32 * 12).reshape(32, 12).tolist()
    _, figure = titles([as_result("a", probe_json(many))], draw_figure_1, monkeypatch, tmp_path / "1.png")
    first, every = figure.axes[0].lines[0].get_markevery()
    assert len(range(first, 32, every)) <= 8
