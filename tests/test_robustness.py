"""A whole run: pairs, planted error rates, continuing after every kind of end, and the command line."""

import json
import multiprocessing
import time

import numpy as np
import pytest
import torch

from conftest import noise, write_wav
from whisper_at_cli.extract.datasets import open_dataset
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.probe.robustness.measure import measure_robustness, plan
from whisper_at_cli.probe.robustness.transcripts import Key
from whisper_at_cli.probe.robustness.utterances import read_speech

SNRS = (0.0, 20.0, -10.0)
WORDS = "red green blue pink white black brown amber violet teal".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five utterances of ten words, each with a length of its own; two classes of six clips, some shorter."""
    root = tmp_path_factory.mktemp("robustness")
    rows = ["audio,text"]
    for at in range(5):
        write_wav(root / "speech" / f"{at}.wav", noise(100 + at, 0.5 + at / 10))
        rows.append(f"{at}.wav,{' '.join(WORDS)} and {at}")
    (root / "speech" / "manifest.csv").write_text("\n".join(rows) + "\n")
    for at in range(12):
        name = ("low", "high")[at % 2]
        write_wav(root / "noise" / name / f"{11 - at:02d}.wav", noise(at, 0.4 + at / 10))
    return root


class PlantedRecogniser:
    """Knows what it hears by comparing it with everything it could be; as deaf as planted.

    Keeps what it heard as (utterance, clip, SNR in whole dB), found from the samples alone.
    """

    name, weights_sha256, parameters, batch_size, streams = "planted", "0" * 64, 7, 4, 2
    settings = {"decoding": "planted", "language": "en"}
    reads_int16, device = True, torch.device("cpu")

    def __init__(self, data, *, fail_at=None, seconds=0.0):
        self.speech, self.noises = read_speech(data / "speech"), open_dataset(data / "noise")
        self.fail_at, self.seconds, self.heard, self.batches = fail_at, seconds, [], 0
        self.clean = {
            len(samples): (u, samples) for u in self.speech.utterances if len(samples := self.speech.waveform(u))
        }

    def transcribe(self, waveforms):
        self.batches += 1
        if self.fail_at is not None and self.batches > self.fail_at:
            raise RuntimeError("planted failure")
        time.sleep(self.seconds)
        return [self._text(samples) for samples in waveforms]

    def _text(self, samples) -> str:
        utterance, clean = self.clean[len(samples)]
        added = samples.astype(np.float64) - clean
        if not np.abs(added).max():
            self.heard.append((utterance.id, None, None))
            return utterance.text
        snr = round(20 * np.log10(np.sqrt(np.mean(clean**2.0)) / np.sqrt(np.mean(added**2))))
        clip, name = max(
            (self._likeness(row, added), clip.id, clip.labels) for row, clip in enumerate(self.noises.clips)
        )[1:]
        self.heard.append((utterance.id, clip, snr))
        wrong = {20: 0, 0: 3, -10: 8}[snr] + (self.noises.class_names[name[0]] == "low")
        return " ".join(["wrong"] * wrong + utterance.text.split()[wrong:])

    def _likeness(self, row, added) -> float:
        hum, real = self.noises.waveform(row, 16000 * 2)
        return float(np.corrcoef(np.resize(hum[:real], len(added)), added)[0, 1])


def run(data, out, recogniser=None, **options):
    options = {"snrs": SNRS, "batch_size": 4} | options
    return measure_robustness(
        data / "speech", data / "noise", model=recogniser or PlantedRecogniser(data), out=out, **options
    )


def results(out) -> dict:
    """What a run found, without how long it took."""
    document = json.loads((out / "results.json").read_text())
    document.pop("run")
    return document


@pytest.fixture(scope="module")
def whole(data):
    run(data, data / "whole")
    return results(data / "whole")


def test_utterance_i_is_mixed_with_clip_i_of_every_class_at_every_snr(data, tmp_path):
    recogniser = PlantedRecogniser(data)
    run(data, tmp_path / "out", recogniser)
    clips = {"high": ["00", "02", "04", "06", "08"], "low": ["01", "03", "05", "07", "09"]}  # by path, six each
    expected = [(str(i), names[i], snr) for names in clips.values() for i in range(5) for snr in (20, 0, -10)]
    expected += [(str(i), None, None) for i in range(5)]
    assert sorted(recogniser.heard, key=str) == sorted(expected, key=str)


def test_planted_error_rates_come_out(data, tmp_path):
    report = run(data, tmp_path / "out")
    assert (report.model, report.kind, report.parameters, report.normaliser) == ("planted", "robustness", 7, "whisper")
    assert (report.clean.wer, report.clean.wer_paper, report.clean.utterances) == (0, 0, 5)
    assert [level.snr for level in report.results] == [20, 0, -10]
    for level, wrong in zip(report.results, (0, 3, 8), strict=True):
        assert level.class_wer == pytest.approx({"high": wrong / 12, "low": (wrong + 1) / 12})
        assert level.class_wer_paper == pytest.approx(level.class_wer)
        assert level.wer == pytest.approx((wrong + 0.5) / 12) == level.wer_paper
        assert (level.utterances, level.mixtures, level.skipped) == (5, 10, 0)
        assert level.snr_measured == pytest.approx({"lowest": level.snr, "highest": level.snr}, abs=0.1)


def test_the_document_has_the_fields_that_figures_are_drawn_from(whole):
    assert list(whole)[:7] == ["model", "kind", "weights_sha256", "parameters", "normaliser", "clean", "results"]
    assert {"snr", "wer", "wer_paper", "class_wer", "class_wer_paper", "utterances"} <= set(whole["results"][0])
    assert whole["settings"]["mixing"] == "exact" and whole["settings"]["snr"] == [20, 0, -10]


def test_pairs_start_over_where_clips_or_utterances_end(data):
    speech, noises = read_speech(data / "speech"), open_dataset(data / "noise")
    pairs = {
        (job.key.utterance, job.key.clip) for job in plan(speech, noises, (0.0,), 8) if job.key.noise_class == "low"
    }
    clips = ["01", "03", "05", "07", "09", "11"]
    assert pairs == {(str(i % 5), clips[i % 6]) for i in range(8)} and len(pairs) == 8
    everything = plan(speech, noises, (0.0,), 99)  # 5 and 6 have no common factor: 30 pairs, then they repeat
    assert len(everything) == len({job.key for job in everything}) == 5 + 2 * 30
    assert len(plan(speech, noises, SNRS, 2)) == 5 + 3 * 2 * 2


def test_a_failure_and_half_a_line_leave_no_trace(data, tmp_path, whole):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="planted failure"):
        run(data, out, PlantedRecogniser(data, fail_at=4))
    path = out / "transcripts.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert 4 <= len(lines) < 35 and not (out / "results.json").exists()
    path.write_bytes(b"".join(lines)[:-25])
    again = PlantedRecogniser(data)
    report = run(data, out, again)
    assert results(out) == whole
    assert len(again.heard) == report.run["transcribed"] == 35 - (len(lines) - 1)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(kept) == len({(row["utterance"], row["clip"], row["snr"]) for row in kept}) == 35
    assert {"utterance", "class", "clip", "snr", "reference", "text"} <= set(kept[0])
    idle = PlantedRecogniser(data)
    record = run(data, out, idle).run
    assert (record["transcribed"], record["resumed"], record["utterances_per_second"]) == (0, 35, None)
    assert not idle.heard and results(out) == whole


def run_in_child(data, out):
    run(data, out, PlantedRecogniser(data, seconds=0.2))


def test_killed_twice_it_ends_with_the_same_results(data, tmp_path, whole):
    out, context = tmp_path / "out", multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "whisper_at_cli.probe.robustness.measure"])
    path, seen = out / "transcripts.jsonl", 0
    for _ in range(2):
        child = context.Process(target=run_in_child, args=(data, out))
        child.start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not path.exists() or path.stat().st_size <= seen):
            time.sleep(0.01)
        child.kill()
        child.join()
        assert child.exitcode == -9 and path.stat().st_size > seen, "it was not killed in the middle"
        seen = path.stat().st_size
    assert not (out / "results.json").exists()
    run(data, out)
    assert results(out) == whole


def test_another_setting_is_refused_and_named_and_more_of_the_same_is_added(data, tmp_path):
    out = tmp_path / "out"
    run(data, out, snrs=(20.0,), utterances=3)
    before = (out / "transcripts.jsonl").read_bytes()
    other = PlantedRecogniser(data)
    other.weights_sha256 = "1" * 64
    with pytest.raises(WhisperATError, match="weights_sha256 '0000.* there, '1111.* now"):
        run(data, out, other)
    with pytest.raises(WhisperATError, match="mixing 'exact' there, 'paper' now"):
        run(data, out, mixing="paper")
    assert (out / "transcripts.jsonl").read_bytes() == before
    more = run(data, out, snrs=(20.0, 0.0), utterances=5)
    assert more.run["resumed"] == 3 + 6 and more.run["transcribed"] == 2 + 4 + 10
    assert [level.utterances for level in more.results] == [5, 5]
    assert (out / "transcripts.jsonl").read_bytes().startswith(before)


def test_damage_in_the_middle_other_contents_and_a_second_process_are_refused(data, tmp_path):
    out = tmp_path / "out"
    run(data, out, snrs=(20.0,))
    lines = (out / "transcripts.jsonl").read_bytes().splitlines(keepends=True)
    (out / "transcripts.jsonl").write_bytes(b"".join([*lines[:2], b'{"utterance": 3\n', *lines[3:]]))
    with pytest.raises(WhisperATError, match="line 3 of .* is damaged"):
        run(data, out, snrs=(20.0,))
    (out / "transcripts.jsonl").write_bytes(b"".join([*lines[:2], *lines[3:]]))
    assert run(data, out, snrs=(20.0,)).run["transcribed"] == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(UsageError, match="holds other things"):
        run(data, tmp_path / "mine")
    inside = PlantedRecogniser(data)
    inside.transcribe = lambda waveforms: run(data, tmp_path / "two")
    with pytest.raises(WhisperATError, match="another process is at work"):
        run(data, tmp_path / "two", inside)


def test_silence_and_unreadable_files_are_skipped_with_their_reason(data, tmp_path):
    for name in ("a", "b", "c"):
        write_wav(tmp_path / "speech" / f"{name}.wav", noise(ord(name), 0.5) * (name != "b"))
    (tmp_path / "speech" / "c.wav").write_text("no audio")
    (tmp_path / "speech" / "manifest.csv").write_text("audio,text\na.wav,hello\nb.wav,there\nc.wav,my\n")
    for at in range(3):
        write_wav(tmp_path / "noise" / "hum" / f"{at}.wav", noise(at, 0.5) * (at != 0))
    recogniser = PlantedRecogniser(data)
    recogniser.transcribe = lambda waveforms: ["Hello." for _ in waveforms]
    report = measure_robustness(
        tmp_path / "speech", tmp_path / "noise", model=recogniser, snrs=(10,), out=tmp_path / "out", clips_per_class=3
    )
    said = {(skip.what, skip.reason.split(":")[0], skip.failed) for skip in report.skipped}
    assert said == {
        ("a.wav with hum 0", "the noise is silent", False), ("b.wav", "the speech is silent", False),
        ("b.wav with hum 1", "the speech is silent", False), ("c.wav", "it cannot be decoded", True),
    }  # fmt: skip
    assert report.failed and report.notes == ("1 class from folder names: hum",)
    assert (report.clean.wer, report.clean.utterances) == (0, 1)
    level = report.results[0]
    assert (level.wer, level.class_wer, level.mixtures, level.skipped) == (None, {"hum": None}, 0, 3)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]["wer"] is None


def test_the_papers_mixing_is_clipped_for_recognisers_that_read_16_bits(data, tmp_path):
    heard = {}
    for reads_int16 in (True, False):
        recogniser = PlantedRecogniser(data)
        recogniser.reads_int16, waveforms = reads_int16, []
        recogniser.transcribe = lambda batch, kept=waveforms: kept.extend(batch) or [""] * len(batch)
        report = run(data, tmp_path / str(reads_int16), recogniser, mixing="paper", snrs=(-40.0,))
        heard[reads_int16] = max(float(np.abs(samples).max()) for samples in waveforms)
    assert heard[True] <= 1 < heard[False] and report.results[0].over_full_scale == 10
    assert abs(report.results[0].snr_measured["lowest"] + 40) < 6


@pytest.mark.parametrize(
    "options, said",
    [
        ({"snrs": ()}, "no SNR was asked for"),
        ({"snrs": (float("nan"),)}, "--snr nan is out of range"),
        ({"snrs": (1000,)}, "--snr 1000 is out of range"),
        ({"utterances": 0}, "--utterances is 0"),
        ({"clips_per_class": 0}, "--clips-per-class is 0"),
        ({"batch_size": -1}, "--batch-size is -1"),
        ({"mixing": "stirred"}, "choose from exact, paper"),
    ],
)
def test_values_out_of_range_are_refused_before_any_work(data, tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        run(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_noise_without_classes_is_refused(data, tmp_path):
    write_wav(tmp_path / "flat" / "a.wav", noise(0, 0.3))
    with pytest.raises(UsageError, match="has no labels"):
        measure_robustness(data / "speech", tmp_path / "flat", model=PlantedRecogniser(data), out=tmp_path / "out")


def test_every_key_of_a_transcript_survives_the_file(data, tmp_path):
    from whisper_at_cli.probe.robustness.transcripts import Transcript, TranscriptFolder

    rows = [
        Transcript(Key("u"), "clean\ntext", "reference"),
        Transcript(Key("ü \u2028", "dog", "clip", -20.0), "", "r", -19.9999, 3.5),
    ]
    with TranscriptFolder(tmp_path / "out", {"a": 1}) as folder:
        folder.append(rows)
    with TranscriptFolder(tmp_path / "out", {"a": 1}) as folder:
        assert list(folder.found.values()) == rows


def command(capsys, *arguments):
    from whisper_at_cli.cli import main

    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def test_the_command_on_real_speech_noise_and_weights(capsys, tmp_path, shared, tiny_en):
    """Three utterances, ten classes, one clip of each: quiet noise is understood, and again costs nothing."""
    arguments = (
        "robustness", "--speech", shared / "data" / "speech14", "--noise", shared / "data" / "esc10",
        "--model", tiny_en, "--snr", "20", "--utterances", "3", "--clips-per-class", "1", "--out", tmp_path / "out",
    )  # fmt: skip
    status, out, err = command(capsys, *arguments, "--json")
    result = json.loads(out)
    assert status == 0, err
    assert result["model"] == "tiny.en" and result["parameters"] == 37184256 and result["clean"]["wer"] <= 0.15
    level = result["results"][0]
    assert level["snr"] == 20 and level["wer"] <= 0.15 and len(level["class_wer"]) == 10 and level["mixtures"] == 10
    assert level["snr_measured"] == pytest.approx({"lowest": 20, "highest": 20}, abs=0.1)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result
    status, out, err = command(capsys, "--quiet", *arguments)
    assert status == 0 and "20 dB" in out and "helicopter" in out and err == ""


def test_the_command_fails_where_a_file_is_to_blame(capsys, tmp_path, data, monkeypatch):
    (tmp_path / "noise" / "hum").mkdir(parents=True)
    (tmp_path / "noise" / "hum" / "0.wav").write_text("no audio")
    loader = "whisper_at_cli.probe.robustness.measure.load_recogniser"
    monkeypatch.setattr(loader, lambda *_, **__: PlantedRecogniser(data))
    arguments = ("robustness", "--speech", data / "speech", "--noise", tmp_path / "noise", "--model", "planted")
    status, out, err = command(capsys, *arguments, "--out", tmp_path / "out", "--snr", 0)
    assert status == 1 and "failed: hum/0.wav: it cannot be decoded" in err and "undefined" in out
    status, out, err = command(capsys, *arguments, "--batch-size", "some")
    assert status == 2 and "--batch-size some" in err and out == ""


@pytest.mark.slow
def test_errors_rise_as_noise_does_on_speech14_with_esc10(capsys, tmp_path, shared, tiny_en):
    report = measure_robustness(
        shared / "data" / "speech14",
        shared / "data" / "esc10",
        model=tiny_en,
        snrs=(20, 10, 0, -10),
        out=tmp_path / "out",
    )
    rates = [level.wer for level in report.results]
    assert rates == sorted(rates) and len(set(rates)) == 4 and rates[0] <= 0.15, rates
    assert all(len(level.class_wer) == 10 and level.mixtures == 140 for level in report.results)
