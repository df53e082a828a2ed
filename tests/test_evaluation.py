"""Intervals, bands and tests: SciPy's or a slow and obvious way's, and none of them forgets recordings or seeds."""

import json
from itertools import combinations, product

import numpy as np
import pytest
from predicted import planted, predictions
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import average_precision_score, f1_score, log_loss
from test_cli import run

from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.evaluation import bootstrap as resampling
from whisper_at_cli.extract.evaluation import statistics
from whisper_at_cli.extract.evaluation.bootstrap import (
    bootstrap,
    bootstrap_classes,
    bootstrap_together,
    draw_weights,
)
from whisper_at_cli.extract.evaluation.compare import compare
from whisper_at_cli.extract.evaluation.intervals import band, difference, exact_test, interval, intervals, pair_p
from whisper_at_cli.extract.evaluation.metrics import class_ap
from whisper_at_cli.extract.evaluation.predictions import load_predictions
from whisper_at_cli.extract.evaluation.statistics import right


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def several_labels(rng, *, clips=60, layers=2, classes=4, ties=False):
    """Predictions of clips with any number of labels, in three folds, three clips a recording."""
    labels = (rng.random((clips, classes)) < (0.5, 0.3, 0.2, 0.05)).astype(np.uint8)
    scores = rng.normal(size=(layers, clips, classes)) + labels
    of = np.arange(clips) // 3
    return predictions(scores.round(0) if ties else scores, labels, folds=of % 3 + 1, recordings=of)


def repeated(found, weights):
    """The clips as often as their recordings were drawn."""
    _, of = np.unique(found.recordings, return_inverse=True)
    return np.repeat(np.arange(len(of)), weights[of].astype(int))


def test_the_interval_of_an_accuracy_is_scipys_bca_interval(rng):
    found = planted(rng, true=[0.7, 0.93], clips=120)
    ours = interval(bootstrap(found, seed=3))
    for correct, bounds in zip(right(found).astype(float), ours, strict=True):
        scipys = stats.bootstrap(
            (correct,), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(3)
        ).confidence_interval
        np.testing.assert_allclose(bounds, (scipys.low, scipys.high), atol=1e-9)


def test_the_interval_of_a_difference_is_scipys(rng):
    found = planted(rng, true=[0.7, 0.8], clips=120)
    a, b = right(found).astype(float)
    value, bounds = difference(bootstrap(found, seed=3), (0, 1))
    scipys = stats.bootstrap(
        (a - b,), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(3)
    ).confidence_interval
    assert value == pytest.approx((a - b).mean())
    np.testing.assert_allclose(bounds, (scipys.low, scipys.high), atol=1e-9)


def test_draws_of_accuracy_repeat_whole_recordings_and_count_folds_alike(rng):
    found = planted(rng, true=[0.6, 0.8], clips=90, per_recording=3)
    found = predictions(found.scores, found.labels, folds=np.arange(90) // 3 % 4 // 2, recordings=np.arange(90) // 3)
    drawn = bootstrap(found, draws=20, seed=1)
    share = np.where(found.folds == 0, 1 / (found.folds == 0).sum(), 1 / (found.folds == 1).sum()) / 2
    assert drawn.recordings == 30 and drawn.estimate == pytest.approx((right(found) * share).sum(axis=1))
    by_fold = [right(found)[:, found.folds == number].mean(axis=1) for number in (0, 1)]
    assert drawn.estimate == pytest.approx(np.mean(by_fold, axis=0))
    for weights, values in zip(np.concatenate(list(draw_weights(30, 20, 1))), drawn.draws, strict=True):
        clips = repeated(found, weights)
        assert weights.sum() == 30
        assert values == pytest.approx((right(found) * share)[:, clips].sum(axis=1) / share[clips].sum())


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("ties", [False, True])
def test_draws_of_map_are_those_of_repeated_clips(rng, ties, few, monkeypatch):
    monkeypatch.setattr(statistics, "FEW_POSITIVES", 40 if few else 0)
    found = several_labels(rng, ties=ties)
    found.scores[1][found.labels > 0] += 3  # most positives have nothing but positives above them
    drawn = bootstrap(found, draws=15, seed=2)
    assert drawn.metric == "mAP"
    for weights, values in zip(np.concatenate(list(draw_weights(20, 15, 2))), drawn.draws, strict=True):
        clips = repeated(found, weights)
        ap = [class_ap(found.labels[clips], scores[clips], found.folds[clips]) for scores in found.scores]
        assert values == pytest.approx(np.nanmean(ap, axis=1), rel=1e-6)


def test_average_precision_ranks_within_folds_and_weighs_positives(rng):
    found = several_labels(rng)
    ap = class_ap(found.labels, found.scores[0], found.folds)
    for c in range(4):
        total = sum(
            average_precision_score(found.labels[here, c], found.scores[0][here, c]) * found.labels[here, c].sum()
            for here in (found.folds == number for number in (1, 2, 3))
            if found.labels[here, c].any()
        )
        assert ap[c] == pytest.approx(total / found.labels[:, c].sum())


def test_scores_of_models_that_learned_nothing_have_the_precision_of_chance():
    """A model that gives all clips of its fold one score for a class; over all clips those scores would rank folds."""
    labels = np.zeros((100, 1), dtype=np.uint8)
    labels[[3, 23, 43]] = 1
    folds = np.arange(100) // 20
    scores = np.where(folds <= 2, 0.0, -1.0)[:, None]
    assert class_ap(labels, scores, folds)[0] == pytest.approx(1 / 20)
    assert class_ap(labels, scores)[0] == pytest.approx(3 / 60)


def test_a_class_that_no_model_could_learn_has_the_precision_of_chance_by_the_same_rule():
    """All its positives lie in one fold, whose models have seen none of them."""
    labels = np.zeros((400, 2), dtype=np.uint8)
    labels[:12, 0], labels[12:, 1] = 1, 1
    folds = np.arange(400) // 80
    scores = np.where(folds == 0, 0.0, -3.0)[:, None].repeat(2, axis=1)
    found = predictions(scores[None], labels, folds=folds)
    assert class_ap(labels, scores, folds)[0] == pytest.approx(12 / 80) == class_ap(labels, scores)[0]
    assert bootstrap_classes(found.of_chance(), draws=10).estimate.shape == (1, 2)
    assert class_ap(labels, found.of_chance().scores[0], folds)[0] == pytest.approx(12 / 80)


def test_a_model_that_does_not_look_is_one_more_row_of_a_comparison(rng):
    found = planted(rng, true=[0.7, 0.9], clips=200)
    compared = compare([("", found)], chance=True)
    assert [row["name"] for row in compared.systems] == ["layer-1", "layer-2", "chance"]
    shares = [(found.labels[found.folds != number].sum(axis=0)).argmax() for number in found.folds]
    right_N = found.labels[np.arange(200), shares]
    expected = np.mean([right_N[found.folds == number].mean() for number in np.unique(found.folds)])
    assert compared.systems[2]["value"] == pytest.approx(expected) and compared.systems[2]["p_best"] < 0.001
    assert len(compared.pairs) == 3 and compared.systems[1]["p_best"] == 1


def test_one_table_for_a_paper_is_printed_as_markdown(capsys, tmp_path, rng):
    planted(rng, true=[0.6, 0.9], clips=100).save(tmp_path / "p.npz")
    status, out, err = run(capsys, "compare", str(tmp_path / "p.npz"), "--chance", "--table", "markdown")
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == "| model | accuracy (%) | 95 % interval | p against the best |" and len(lines) == 5
    assert lines[3].endswith("| best |") and lines[4].startswith("| chance |")
    status, out, _ = run(capsys, "compare", str(tmp_path / "p.npz"), "--table", "text")
    assert status == 0 and "p against the best" in out and "difference" not in out
    assert run(capsys, "compare", str(tmp_path / "p.npz"), "--table", "html")[0] == 2


def test_draws_of_f1_are_those_of_repeated_clips(rng):
    found = planted(rng, true=[0.6, 0.8], clips=60, per_recording=2, classes=4)
    drawn = bootstrap_classes(found, draws=10, seed=4)
    y = found.labels.argmax(axis=1)
    expected = [f1_score(y, of.argmax(axis=1), average=None) for of in found.scores]
    np.testing.assert_allclose(drawn.estimate, expected)
    for weights, values in zip(np.concatenate(list(draw_weights(30, 10, 4))), drawn.draws, strict=True):
        clips = repeated(found, weights)
        for scores, of_layer in zip(found.scores, values, strict=True):
            expected = f1_score(
                y[clips], scores[clips].argmax(axis=1), labels=range(4), average=None, zero_division=np.nan
            )
            expected[[c not in y[clips] for c in range(4)]] = np.nan
            np.testing.assert_allclose(of_layer, expected, rtol=1e-6)


def test_the_same_draws_come_in_pieces_of_any_size(rng, monkeypatch):
    for found in (planted(rng, true=[0.6, 0.9], clips=50), several_labels(rng)):
        whole = bootstrap(found, draws=50)
        monkeypatch.setattr(resampling, "CHUNK", 400)
        pieces = bootstrap(found, draws=50)
        monkeypatch.undo()
        np.testing.assert_array_equal(pieces.draws, whole.draws)
        np.testing.assert_array_equal(pieces.jackknife, whole.jackknife)


def test_the_band_and_the_p_values_are_those_of_the_obvious_way(rng):
    drawn = bootstrap(planted(rng, true=[0.6, 0.7, 0.7, 0.9], clips=80), draws=500)
    widening = np.sqrt(80 / 79)
    largest = [0.0] * 500
    for layer in range(4):
        for at, value in enumerate(drawn.draws[:, layer]):
            below, equal = (drawn.draws[:, layer] < value).sum(), (drawn.draws[:, layer] == value).sum()
            largest[at] = max(largest[at], abs(stats.norm.ppf((below + equal / 2) / 500)))
    reach = widening * stats.t.isf(stats.norm.sf(np.quantile(largest, 0.95)), 79)
    np.testing.assert_allclose(band(drawn), interval(drawn, level=1 - 2 * stats.norm.sf(reach)))
    assert (band(drawn)[:, 0] < interval(drawn)[:, 0]).all() and (band(drawn)[:, 1] > interval(drawn)[:, 1]).all()
    pairs = [(0, 1), (1, 2), (0, 3)]
    t = {}
    for a, b in combinations(range(4), 2):
        difference = drawn.draws[:, a] - drawn.draws[:, b]
        measured = drawn.estimate[a] - drawn.estimate[b]
        t[a, b] = abs(difference - measured) / difference.std(), abs(measured) / (difference.std() * widening)
    alone, adjusted = pair_p(drawn, pairs, among=list(t))
    most = np.max([draws for draws, _ in t.values()], axis=0)
    for at, pair in enumerate(pairs):
        assert alone[at] == pytest.approx((1 + (t[pair][0] >= t[pair][1] - 1e-9).sum()) / 501)
        assert adjusted[at] == pytest.approx((1 + (most >= t[pair][1] - 1e-9).sum()) / 501)


def test_the_exact_test_is_mcnemars_where_each_recording_has_one_clip(rng):
    for seed in range(5):
        found = planted(np.random.default_rng(seed), true=[0.7, 0.8], clips=60)
        test = exact_test(found.only("layer-1"), found.only("layer-2"))
        assert test.mcnemar
        assert test.p == pytest.approx(
            stats.binomtest(int(test.only_first), int(test.only_first + test.only_second)).pvalue
        )


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_exact_test_tries_every_swap_of_whole_recordings(rng, seeds):
    found = planted(rng, true=[0.6] * seeds + [0.8], clips=30, per_recording=3)
    names = ["a"] * seeds + ["b"]
    found = predictions(
        found.scores, found.labels, recordings=np.arange(30) // 3, names=names, seeds=[*range(seeds), 0]
    )
    test = exact_test(found.only("a"), found.only("b"))
    correct = right(found).astype(float)
    of_recording = (correct[:seeds].mean(axis=0) - correct[-1]).reshape(10, 3).sum(axis=1)
    sums = [np.dot(signs, of_recording) for signs in product((-1, 1), repeat=10)]
    assert test.p == pytest.approx(np.mean(np.abs(sums) >= abs(of_recording.sum()) - 1e-9)) and not test.mcnemar


def test_two_systems_that_say_the_same_do_not_differ(rng):
    found = planted(rng, true=[0.8], clips=50)
    twice = predictions(np.concatenate([found.scores] * 2), found.labels)
    judged = intervals(bootstrap(twice))
    assert not judged.differs.any() and judged.p.tolist() == [1, 1]
    assert exact_test(twice.only("layer-1"), twice.only("layer-2")).p == 1


def test_seeds_are_averaged_within_each_draw(rng):
    for found in (planted(rng, true=[0.7, 0.8, 0.9], clips=60), several_labels(rng, layers=3)):
        apart = bootstrap(found, draws=40)
        together = predictions(
            found.scores, found.labels, folds=found.folds, names=["a", "a", "b"], seeds=[0, 1, 0],
            recordings=[int(name[1:]) for name in found.recordings],
        )  # fmt: skip
        drawn = bootstrap(together, draws=40)
        assert drawn.systems == ("a", "b")
        np.testing.assert_allclose(drawn.draws[:, 0], apart.draws[:, :2].mean(axis=1), atol=1e-7)
        np.testing.assert_allclose(drawn.draws[:, 1], apart.draws[:, 2], atol=1e-7)


def test_an_accuracy_of_one_has_the_binomial_bound_and_one_recording_none(rng):
    y = np.arange(40) % 4
    perfect = predictions(np.eye(4)[[y, (y + 1) % 4]], y, recordings=np.arange(40) // 2)
    drawn = bootstrap(perfect)
    expected = stats.binomtest(20, 20).proportion_ci(method="exact").low
    np.testing.assert_allclose(interval(drawn), [[expected, 1], [0, 1 - expected]])
    assert (band(drawn)[0] == [0.0125 ** (1 / 20), 1]).all()
    alone = predictions(np.eye(4)[[y]], y, recordings=np.zeros(40, dtype=int))
    judged = intervals(bootstrap(alone))
    assert np.isnan(judged.ci).all() and np.isnan(judged.band).all()


@pytest.mark.parametrize("clips, per_recording, true", [(200, 1, 0.9), (200, 5, 0.8)])
def test_intervals_and_bands_hold_the_truth_as_often_as_they_say(clips, per_recording, true):
    """A small form of the slow test below: 60 datasets of four layers."""
    held = coverage(60, clips=clips, per_recording=per_recording, true=[true - 0.1, true, true, true], draws=1000)
    assert 0.88 <= held["interval"] <= 0.99 and held["band"] >= 0.88 and held["equal called different"] <= 0.12


@pytest.mark.slow
@pytest.mark.parametrize("clips, per_recording", [(400, 1), (400, 5), (150, 1)])
def test_coverage_on_300_planted_datasets(clips, per_recording):
    true = [0.6, 0.7, 0.8, 0.85, 0.88, 0.9, 0.9, 0.9]
    held = coverage(300, clips=clips, per_recording=per_recording, true=true, draws=2000)
    print(f"{clips} clips, {per_recording} a recording: {held}")
    assert 0.92 <= held["interval"] <= 0.98
    assert held["band"] >= 0.92
    assert held["equal called different"] <= 0.07
    assert held["two equal called different"] <= 0.07


def coverage(datasets, *, true, draws, **shape):
    """Shares of datasets in which intervals (mean over layers) and the band hold the truth, and in which any two layers
    that are truly equal are called different: of all pairs of layers, and of one pair that was compared alone."""
    equal = [(a, b) for b in range(len(true)) for a in range(b) if true[a] == true[b]]
    pairs = [(a, b) for b in range(len(true)) for a in range(b)]
    inside, whole, wrong, wrong_alone = [], 0, 0, 0
    for number in range(datasets):
        drawn = bootstrap(planted(np.random.default_rng(number), true=true, **shape), draws=draws, seed=number)
        low, high = interval(drawn).T
        inside.append((low <= true) & (true <= high))
        low, high = band(drawn).T
        whole += bool(((low <= true) & (true <= high)).all())
        wrong += bool((pair_p(drawn, equal, among=pairs)[1] < 0.05).any())
        wrong_alone += bool(pair_p(drawn, equal[:1])[0][0] < 0.05)
    return {
        "interval": float(np.mean(inside)), "band": whole / datasets, "equal called different": wrong / datasets,
        "two equal called different": wrong_alone / datasets,
    }  # fmt: skip


def test_predictions_come_back_as_they_were_saved(rng, tmp_path):
    found = several_labels(rng)
    found.save(tmp_path / "a.npz")
    read = load_predictions(tmp_path / "a.npz")
    for name in ("ids", "recordings", "labels", "folds", "seeds", "scores"):
        np.testing.assert_array_equal(getattr(read, name), getattr(found, name))
    assert (read.names, read.class_names, read.source) == (found.names, found.class_names, str(tmp_path / "a.npz"))


def test_what_holds_no_predictions_is_refused(rng, tmp_path):
    found = several_labels(rng)
    with pytest.raises(UsageError, match="saved as .npz"):
        found.save(tmp_path / "a.json")
    with pytest.raises(UsageError, match="does not exist; write it with --predictions"):
        load_predictions(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_text("text")
    with pytest.raises(UsageError, match="is not an .npz file"):
        load_predictions(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", ids=found.ids)
    with pytest.raises(UsageError, match="lacks class_names, folds"):
        load_predictions(tmp_path / "b.npz")
    with pytest.raises(UsageError, match="same seed"):
        predictions(found.scores, found.labels, names=["a", "a"])
    with pytest.raises(WhisperATError, match="not finite"):
        predictions(np.full((1, 3, 2), np.nan), [0, 1, 0])


def test_compare_matches_clips_and_classes_by_name(rng):
    found = planted(rng, true=[0.6, 0.9], clips=80)
    a, b = found.only("layer-1"), found.only("layer-2")
    shuffled = b.clips(rng.permutation(80)[:70]).classes(found.class_names[::-1])
    for other in (b, shuffled):
        result = compare([("", a), ("", other)], draws=500)
        kept = np.isin(a.ids, other.ids)
        (pair,) = result.pairs
        weights = np.bincount(a.folds[kept])[a.folds[kept]]
        expected = np.average(right(found)[0, kept] * 1.0 - right(found)[1, kept], weights=1 / weights)
        assert pair["difference"] == pytest.approx(expected) and result.clips == kept.sum()
        assert pair["ci95"][0] < pair["difference"] < pair["ci95"][1] and pair["p"] < 0.01
        assert bool(result.warnings) is (other is shuffled)


def test_bits_are_the_log_loss_of_a_model_that_does_not_look_minus_that_of_the_model(rng):
    y, folds = rng.integers(0, 4, 80), np.arange(80) % 4 // 2
    scores = rng.normal(size=(2, 80, 4)) + 2 * np.eye(4)[y]
    found = predictions(scores, y, folds=folds)
    drawn = bootstrap(found, metric="bits", draws=10, seed=1)
    gained = np.empty((2, 80))
    for fold in (0, 1):
        here = folds == fold
        shares = (np.bincount(y[~here], minlength=4) + 1) / ((~here).sum() + 4)
        for of_layer, logits in zip(gained, scores[:, here].astype(np.float32), strict=True):
            probability = softmax(logits.astype(float), axis=1)[np.arange(here.sum()), y[here]]
            of_layer[here] = np.log2(probability / shares[y[here]])
    for fold in (0, 1):
        here = folds == fold
        loss = [log_loss(y[here], softmax(of[here], axis=1), labels=range(4)) / np.log(2) for of in scores]
        shares = (np.bincount(y[~here], minlength=4) + 1) / ((~here).sum() + 4)
        blind = -np.log2(shares[y[here]]).mean()
        np.testing.assert_allclose(gained[:, here].mean(axis=1), blind - np.array(loss), rtol=1e-5)
    np.testing.assert_allclose(drawn.estimate, gained.mean(axis=1), rtol=1e-6)
    weights = np.concatenate(list(draw_weights(80, 10, 1)))
    np.testing.assert_allclose(drawn.draws, (weights @ gained.T) / 80, rtol=1e-6)


def test_a_model_that_says_nothing_of_clips_has_no_bits_and_an_unknown_class_costs_a_fixed_number():
    y = np.arange(400) % 4
    blind = predictions(np.zeros((1, 400, 4)), y, folds=np.arange(400) // 4 % 2)
    assert bootstrap(blind, metric="bits", draws=5).estimate[0] == pytest.approx(0, abs=1e-9)
    unknown = np.zeros((1, 400, 4))
    unknown[:, :, 3] = -np.inf
    found = bootstrap(predictions(unknown, y), metric="bits", draws=5).estimate[0]
    assert found == pytest.approx(0.75 * np.log2(4 / 3) + 0.25 * (2 - 40), abs=1e-6)


def test_what_cannot_be_compared_is_refused(rng):
    found = planted(rng, true=[0.6, 0.9], clips=40)
    with pytest.raises(UsageError, match="needs two"):
        compare([("", found.only("layer-1"))])
    with pytest.raises(UsageError, match="same name"):
        compare([("", found), ("", found)])
    other = predictions(found.scores, (found.labels.argmax(axis=1) + 1) % 10)
    with pytest.raises(UsageError, match="40 of 40 clips have other labels in planted, the first 'clip00000'"):
        compare([("a", found), ("b", other)])
    with pytest.raises(UsageError, match="has no layer-3; it has layer-1, layer-2"):
        found.only("layer-3")
    with pytest.raises(UsageError, match="exactly one label"):
        bootstrap(several_labels(rng), metric="accuracy")
    with pytest.raises(UsageError, match="choose from accuracy, mAP, bits"):
        bootstrap_together([found], metric="F1")


def test_the_command_compares_files_and_parts_of_files(capsys, rng, tmp_path):
    found = planted(rng, true=[0.6, 0.9, 0.9], clips=80)
    found.save(tmp_path / "probe.npz")
    found.only("layer-3").save(tmp_path / "head.npz")
    status, out, _ = run(
        capsys, "compare", f"{tmp_path}/probe.npz:layer-1", f"{tmp_path}/probe.npz:layer-2", tmp_path / "head.npz",
        "--json",
    )  # fmt: skip
    result = json.loads(out)
    assert status == 0 and [each["name"] for each in result["systems"]] == [
        "probe:layer-1", "probe:layer-2", "head:layer-3",
    ]  # fmt: skip
    assert {"a", "b", "difference", "ci95", "p"} <= set(result["pairs"][0]) and len(result["pairs"]) == 3
    assert [each["value"] for each in result["systems"]] == pytest.approx(right(found).mean(axis=1))
    status, out, _ = run(capsys, "compare", tmp_path / "probe.npz", "--draws", "200")
    assert status == 0 and "layer-1 - layer-2" in out and "McNemar" in out and "200 draws" in out
    status, _, err = run(capsys, "compare", f"{tmp_path}/probe.npz:layer-9", f"{tmp_path}/probe.npz:layer-1")
    assert status == 2 and "has no layer-9" in err
