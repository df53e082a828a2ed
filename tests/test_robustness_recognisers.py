"""Recognisers: batching changes nothing, and the text is what Whisper's or transformers' own code gives."""

import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import whisper

from conftest import noise
from whisper_at_cli.extract import load_backbone
from whisper_at_cli.extract.datasets import open_dataset
from whisper_at_cli.extract.errors import UsageError, WeightsError
from whisper_at_cli.probe.robustness.greedy import decode_greedily
from whisper_at_cli.probe.robustness.measure import measure_robustness
from whisper_at_cli.probe.robustness.mixing import mix
from whisper_at_cli.probe.robustness.recognisers import WhisperRecogniser, is_transformers, load_recogniser
from whisper_at_cli.probe.robustness.utterances import read_speech

VOCABULARY = ["<pad>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]


@pytest.fixture(scope="module")
def recogniser(tiny_en):
    return load_recogniser(tiny_en, greedy=True)


@pytest.fixture(scope="module")
def spoken(shared):
    speech = read_speech(shared / "data" / "speech14")
    return [speech.waveform(utterance) for utterance in speech.utterances]


@pytest.fixture(scope="module")
def mixtures(spoken, esc10):
    """Short and long utterances, clean and buried in noise."""
    noises = open_dataset(esc10)
    made = [spoken[1]]
    for at, row, snr_db in ((3, 11, 10), (7, 130, -10), (9, 222, -20)):
        hum, real = noises.waveform(row, 80000)
        made.append(mix(spoken[at], hum[:real], snr_db).samples)
    return made


@pytest.fixture(scope="module")
def alone(recogniser, mixtures):
    """What Whisper itself makes of each mixture."""
    options = {"language": "en", "temperature": 0, "fp16": False}
    return [recogniser.model.transcribe(samples, **options)["text"].strip() for samples in mixtures]


def small_whisper(seed: int = 0, text_tokens: int = 32):
    """Random weights: greedy decoding goes on to its limit, and every window is doubtful."""
    torch.manual_seed(seed)
    dims = whisper.model.ModelDimensions(80, 1500, 64, 2, 1, 51864, text_tokens, 64, 2, 1)
    model = whisper.model.Whisper(dims).eval()
    model.decoder.positional_embedding.data.normal_()  # Whisper leaves it as the memory was
    return model


def one_by_one(recogniser, windows):
    options = whisper.DecodingOptions(language="en", fp16=False)
    return [whisper.decode(recogniser.model, window, options) for window in windows]


def test_batched_transcripts_equal_whispers_own_one_by_one(recogniser, mixtures, alone):
    mels = torch.stack([recogniser.log_mel(samples) for samples in mixtures])
    batched, single = recogniser.decode(mels), one_by_one(recogniser, mels)
    assert [result.tokens for result in batched] == [result.tokens for result in single]
    assert len({len(result.tokens) for result in single}) > 2, "rows must end at different times for this to say much"
    for ours, theirs in zip(batched, single, strict=True):
        assert ours.text == theirs.text
        assert ours.avg_logprob == pytest.approx(theirs.avg_logprob, abs=1e-4)
        assert ours.no_speech_prob == pytest.approx(theirs.no_speech_prob, abs=1e-4)
    assert recogniser.transcribe(mixtures[::-1])[::-1] == alone


def test_threads_do_not_disturb_each_other(recogniser, mixtures, alone):
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda samples: recogniser.transcribe([samples])[0], mixtures)) == alone


def test_the_mel_is_the_one_that_transcribe_makes_whatever_else_is_in_the_batch(recogniser, mixtures):
    for samples in mixtures[:3]:
        whole = whisper.log_mel_spectrogram(samples, padding=30 * 16000)[:, : len(samples) // 160]
        torch.testing.assert_close(recogniser.log_mel(samples), whisper.pad_or_trim(whole, 3000), rtol=0, atol=1e-5)
    assert recogniser.log_mel(np.zeros(30 * 16000 + 100, np.float32)).shape == (80, 3000)


def test_rows_that_leave_early_and_rows_at_the_limit_decode_as_in_whisper():
    model = small_whisper()
    torch.manual_seed(1)
    model.decoder.token_embedding.weight.data[50256] *= 9  # the end becomes probable now and then
    model.decoder.blocks[0].cross_attn.out.weight.data *= 5  # and what is heard matters
    windows = torch.randn(12, 1500, 64) + 3 * torch.randn(12, 1, 64)
    options = whisper.DecodingOptions(language="en", fp16=False)
    single = [whisper.decode(model, window, options) for window in windows]
    batched = decode_greedily(model, windows, "en")
    assert [result.tokens for result in batched] == [result.tokens for result in single]
    assert [result.avg_logprob for result in batched] == pytest.approx([r.avg_logprob for r in single], abs=1e-4)
    lengths = [len(result.tokens) for result in single]
    assert sum(length < 16 for length in lengths) >= 3 and len(set(lengths)) > 2 and max(lengths) == 16, lengths


def test_decoding_leaves_no_hooks_behind(recogniser, mixtures):
    recogniser.transcribe(mixtures[:1])
    assert not any(module._forward_hooks for module in recogniser._own_model().modules())
    own = recogniser._own_model()
    assert own is not recogniser.model
    assert own.decoder.token_embedding.weight is recogniser.model.decoder.token_embedding.weight, "weights were copied"


def test_utterances_over_thirty_seconds_go_through_whispers_windows(recogniser, spoken):
    long = np.concatenate([spoken[0], spoken[2], spoken[6], spoken[3]])
    assert len(long) > 30 * 16000
    expected = recogniser.model.transcribe(long, language="en", temperature=0, fp16=False)["text"].strip()
    assert recogniser.transcribe([spoken[1], long]) == ["in being comparatively modern.", expected]
    assert "printed book" in expected, "the end of it was not transcribed"


def test_fallback_gives_what_transcribe_gives_and_the_same_every_time():
    recogniser = WhisperRecogniser(small_whisper(), name="random", weights_sha256="")
    waveforms = [noise(seed, 1.5).astype(np.float32) for seed in range(4)]
    texts = []
    for samples in waveforms:
        torch.manual_seed(zlib.crc32(samples.tobytes()))
        texts.append(recogniser.model.transcribe(samples, language="en", fp16=False)["text"].strip())
    assert recogniser.transcribe(waveforms) == recogniser.transcribe(waveforms[::-1])[::-1] == texts
    with ThreadPoolExecutor(2) as pool:
        assert [text for [text] in pool.map(lambda samples: recogniser.transcribe([samples]), waveforms)] == texts
    greedy = WhisperRecogniser(small_whisper(), name="random", weights_sha256="", greedy=True)
    assert texts != greedy.transcribe(waveforms), "random weights are improbable to themselves: decoded again"
    assert "temperature fallback" in recogniser.settings["decoding"] and greedy.settings["decoding"] == "greedy"


def test_the_record_of_a_recogniser_names_its_weights_as_a_cache_does(recogniser, tiny_en):
    assert recogniser.weights_sha256 == load_backbone(tiny_en).weights_sha256
    assert recogniser.name == "tiny.en" and recogniser.parameters == 37184256


def test_languages_are_checked(tiny_en):
    with pytest.raises(UsageError, match="knows English alone; leave out --language de"):
        load_recogniser(tiny_en, language="de")
    with pytest.raises(UsageError, match="'klingon' is not known"):
        load_recogniser(tiny_en, language="klingon")


def save_ctc(folder, *, head: bool = True, tokenizer: bool = True):
    """A small wav2vec 2.0 of random weights, with group norm as in wav2vec2-base: padding would change its output."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        conv_dim=(16, 16, 16), conv_kernel=(10, 8, 4), conv_stride=(5, 8, 4), num_feat_extract_layers=3,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = (transformers.Wav2Vec2ForCTC if head else transformers.Wav2Vec2Model)(config)
    if head:
        model.lm_head.weight.data *= 40  # many different symbols win
    model.save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    extractor.save_pretrained(folder)
    if tokenizer:
        import json

        (folder / "vocab.json").write_text(json.dumps({symbol: at for at, symbol in enumerate(VOCABULARY)}))
        written = transformers.Wav2Vec2CTCTokenizer(
            str(folder / "vocab.json"), pad_token="<pad>", unk_token="<unk>", word_delimiter_token="|",
            bos_token="<unk>", eos_token="<unk>",
        )  # fmt: skip
        transformers.Wav2Vec2Processor(extractor, written).save_pretrained(folder)
    return folder


def test_ctc_transcripts_equal_transformers_own_one_by_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = save_ctc(tmp_path / "wav2vec2-small")
    recogniser = load_recogniser(folder)
    waveforms = [noise(seed, seconds).astype(np.float32) for seed, seconds in enumerate((0.5, 1.3, 0.5, 2.0, 0.0001))]
    texts = recogniser.transcribe(waveforms)
    processor = transformers.Wav2Vec2Processor.from_pretrained(folder)
    model = transformers.Wav2Vec2ForCTC.from_pretrained(folder).eval()
    for samples, text in zip(waveforms[:-1], texts, strict=False):
        with torch.no_grad():
            logits = model(processor(samples, sampling_rate=16000, return_tensors="pt").input_values).logits
        assert text == processor.batch_decode(logits.argmax(-1))[0].strip()
        assert len(text) > 3
    assert texts[-1] == "", "one sample holds no frame"
    assert len(set(texts)) == 5
    assert recogniser.name == "wav2vec2-small" and len(recogniser.weights_sha256) == 64
    assert recogniser.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_ctc_model_goes_through_a_whole_run(tmp_path, shared, esc10):
    report = measure_robustness(
        shared / "data" / "speech14", esc10, model=save_ctc(tmp_path / "wav2vec2-small"), snrs=(20, -20), utterances=2,
        clips_per_class=2, language="de", out=tmp_path / "out",
    )  # fmt: skip
    assert (report.model, report.normaliser, report.results[0].mixtures) == ("wav2vec2-small", "whisper-basic", 20)
    assert all(level.wer >= 0.9 for level in report.results), "random weights understand nothing"
    with pytest.raises(UsageError, match="'klingon' is not known"):
        load_recogniser(tmp_path / "wav2vec2-small", language="klingon")


def test_a_model_that_was_only_pre_trained_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="was not trained to recognise speech"):
        load_recogniser(save_ctc(tmp_path / "headless", head=False))
    with pytest.raises(UsageError, match="tokenizer|cannot be used"):
        load_recogniser(save_ctc(tmp_path / "wordless", tokenizer=False))
    with pytest.raises(UsageError, match="--greedy is for Whisper models"):
        load_recogniser(tmp_path / "headless", greedy=True)


def test_models_are_told_apart_by_their_form(tmp_path, tiny_en, monkeypatch):
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper" / "config.json").write_text('{"model_type": "whisper"}')
    (tmp_path / "hubert").mkdir()
    (tmp_path / "hubert" / "config.json").write_text('{"model_type": "hubert"}')
    assert is_transformers(tmp_path / "hubert") and is_transformers("facebook/hubert-large-ls960-ft")
    for whisper_model in (
        tmp_path / "whisper",
        tiny_en,
        "tiny.en",
        "openai/whisper-tiny.en",
        "distil-whisper/distil-small.en",
        "./absent/m.pt",
        "m.pt",
    ):
        assert not is_transformers(whisper_model), whisper_model
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="nobody/nothing is no folder, and no model that can be had"):
        load_recogniser("nobody/nothing")
    with pytest.raises(UsageError, match="no model 'huge.en'"):
        load_recogniser("huge.en")
    (tmp_path / "hubert" / "config.json").write_text("not JSON")
    with pytest.raises(UsageError, match="not a readable configuration"):
        load_recogniser(tmp_path / "hubert")
