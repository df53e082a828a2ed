"""The same Whisper comes out of every form of its weights; what is damaged or hostile is one clear error."""

import hashlib
import pickle
import shutil
import time
import zipfile

import numpy as np
import pytest
import torch
import whisper
from whisper_forms import LOSSLESS, QUANTISED, VARIANTS, Bomb, random_whisper, write_form

from conftest import noise
from whisper_at_cli.extract import load_backbone, load_whisper
from whisper_at_cli.extract.audio.decode import decode
from whisper_at_cli.extract.backbones import weights
from whisper_at_cli.extract.backbones.mel import log_mel
from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES, name_by_size
from whisper_at_cli.extract.backbones.weights import read_weights
from whisper_at_cli.extract.errors import UsageError, WeightsError

# of features and logits; noise for weights, as here, is the worst case
TOLERANCE = {"int8": 3e-2, "int8_float16": 3e-2, "int8_bfloat16": 3e-2, "int16": 6e-3, "bfloat16": 1.2e-2}
TOKENS = torch.tensor([[50257, 50361, 11, 257, 4097, 50256, 0, 13]])


@pytest.fixture(scope="module", params=VARIANTS)
def source(request, tmp_path_factory):
    """A model of transformers, and a folder for its forms."""
    return random_whisper(request.param), tmp_path_factory.mktemp(request.param)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def clip(seconds: float) -> torch.Tensor:
    return torch.from_numpy(noise(3, seconds)).float()[None]


@torch.no_grad()
def transformers_output(model) -> tuple[torch.Tensor, torch.Tensor]:
    """A clip of 30 s through transformers' own code: every encoder block pooled (L, 25, D), and the logits."""
    blocks = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output: blocks.append(output))
        for layer in model.model.encoder.layers
    ]
    mel = log_mel(clip(30), model.config.num_mel_bins)
    logits = model(input_features=mel, decoder_input_ids=TOKENS).logits
    for hook in hooks:
        hook.remove()
    blocks = [block[0] if isinstance(block, tuple) else block for block in blocks]
    return torch.stack([block[0].unflatten(0, (25, 60)).mean(1) for block in blocks]), logits


@pytest.mark.parametrize("form", LOSSLESS + QUANTISED)
def test_every_form_gives_the_features_and_logits_of_the_model_it_was_made_from(source, form):
    model, folder = source
    path = write_form(model, form, folder)
    features, logits = transformers_output(model)
    tolerance = TOLERANCE[form.partition("-")[2]] if form in QUANTISED else 1e-5
    found = load_backbone(path, device="cpu").encode(clip(30))[0]
    assert found.shape == features.shape
    for layer in range(len(features)):
        assert relative_error(found[layer], features[layer]) < tolerance
    full = load_whisper(path, device="cpu")
    assert full.is_multilingual == (model.config.vocab_size > 51864)
    with torch.no_grad():
        found = full(log_mel(clip(30), model.config.num_mel_bins), TOKENS)
    assert relative_error(found, logits) < tolerance


def test_the_checksum_is_that_of_the_weights_and_not_of_their_form(source):
    model, folder = source
    sums = {form: read_weights(write_form(model, form, folder / "again")).encoder_sha256() for form in LOSSLESS}
    assert len(set(sums.values())) == 1, sums
    quantised = {read_weights(write_form(model, form, folder / "again")).encoder_sha256() for form in QUANTISED}
    assert not quantised & set(sums.values())


def test_int8_weights_are_within_half_a_step_of_what_they_were(source):
    model, folder = source
    exact, found = (
        read_weights(write_form(model, form, folder / "steps")).state for form in ("pt-float32", "ct2-int8")
    )
    rounded = 0
    for name, tensor in exact.items():
        if tensor.ndim == 1 or name.endswith("positional_embedding"):
            assert torch.equal(found[name], tensor), name
            continue
        step = tensor.flatten(1).abs().amax(1).div(127).view(-1, *[1] * (tensor.ndim - 1))
        assert ((found[name] - tensor).abs() <= step * 0.5001).all(), name
        rounded += int((found[name] != tensor).sum())
    assert rounded > 1e6


def test_what_a_converter_stores_once_under_many_names_is_read_as_often(tmp_path):
    """A new model's zero biases and unit norms are aliases in CTranslate2's file."""
    model = random_whisper("multilingual", initial=True)
    paths = [write_form(model, form, tmp_path) for form in ("pt-float32", "ct2-float32", "ct2-int8")]
    exact, converted, _ = (read_weights(path) for path in paths)
    assert exact.state.keys() == converted.state.keys()
    assert all(torch.equal(exact.state[name], converted.state[name]) for name in exact.state)
    assert exact.dims == converted.dims


def test_tiny_en_transcribes_real_speech_with_few_errors(shared, tiny_en):
    """Fourteen utterances; word error rate after Whisper's English normaliser."""
    import csv

    import jiwer
    from whisper.normalizers import EnglishTextNormalizer

    folder, normal = shared / "data" / "speech14", EnglishTextNormalizer()
    model = load_whisper("tiny.en", device="cpu")
    with open(folder / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    texts = [model.transcribe(decode(folder / row["audio"]), fp16=False)["text"] for row in rows]
    rate = jiwer.wer([normal(row["text"]) for row in rows], [normal(text) for text in texts])
    assert rate <= 0.08, rate


# names


def test_a_published_file_is_named_after_its_model_whatever_it_is_called(tmp_path, monkeypatch):
    path = write_form(random_whisper("en"), "pt-float16", tmp_path).rename(tmp_path / "mine.pt")
    assert read_weights(path).name == "mine"
    url = f"https://example.org/{hashlib.sha256(path.read_bytes()).hexdigest()}/tiny.en.pt"
    monkeypatch.setitem(whisper._MODELS, "tiny.en", url)
    monkeypatch.setattr(weights, "_published_alignment_heads", lambda name: ((1, 0),))
    assert read_weights(path).name == "tiny.en"


def test_a_file_with_a_published_name_that_is_not_the_published_one_is_not_named_so(tmp_path):
    path = write_form(random_whisper("en"), "pt-float16", tmp_path).rename(tmp_path / "large-v2.pt")
    assert read_weights(path).name == "large-v2.pt"


@pytest.mark.parametrize("form, file", [("hf-float16", "model.safetensors"), ("ct2-float16", "model.bin")])
def test_a_file_out_of_a_folder_is_refused_with_the_folder_to_give(tmp_path, form, file):
    folder = write_form(random_whisper("en"), form, tmp_path)
    with pytest.raises(UsageError, match=f"give the folder, {folder}"):
        read_weights(folder / file)


def test_the_heads_that_word_times_come_from_are_openais(tiny_en):
    """The same from OpenAI's table and from the converted folder; for a folder that names none, Whisper's default."""
    assert set(weights._published_alignment_heads("tiny.en")) == set(read_weights(tiny_en).alignment_heads)
    for name, size in WHISPER_SIZES.items():
        heads = weights._published_alignment_heads(name)
        assert heads and max(layer for layer, _ in heads) < size.decoder_layers
    found = load_whisper(tiny_en, device="cpu").alignment_heads.to_dense().nonzero().tolist()
    assert [tuple(pair) for pair in found] == list(read_weights(tiny_en).alignment_heads)


def test_the_files_in_whispers_download_folder_are_verified(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = write_form(random_whisper("en"), "pt-float16", tmp_path / "whisper").rename(tmp_path / "whisper/base.en.pt")
    with pytest.raises(
        WeightsError, match="base.en.pt is damaged: its SHA-256 is .*, not the published one of base.en"
    ):
        read_weights(path)

    def no_network(url, root, in_memory):
        raise OSError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(whisper, "_download", no_network)
        with pytest.raises(WeightsError, match="base.en.pt is damaged .* could not be downloaded .no route to host"):
            read_weights("base.en")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(whisper._MODELS, "base.en", f"https://example.org/{sha256}/base.en.pt")
    monkeypatch.setattr(weights, "_published_alignment_heads", lambda name: ((1, 0),))
    monkeypatch.setattr(whisper, "_download", no_network)
    assert read_weights("base.en").name == read_weights(path).name == "base.en"


def test_a_folder_is_named_by_its_sizes_where_they_say_which_model_it_is():
    def dims(name, vocabulary):
        size = WHISPER_SIZES[name]
        return {
            "n_mels": size.mels, "n_audio_layer": size.layers, "n_audio_state": size.dim, "n_audio_head": size.heads,
            "n_text_layer": size.decoder_layers, "n_vocab": vocabulary,
        }  # fmt: skip

    for name in ("tiny", "base", "small", "medium"):
        assert name_by_size(dims(name, 51865)) == name
        assert name_by_size(dims(name, 51864)) == f"{name}.en"
    assert name_by_size(dims("large-v3", 51866)) == "large-v3"
    assert name_by_size(dims("turbo", 51866)) == "turbo"
    assert name_by_size(dims("large-v2", 51865)) is None, "large-v1 has the same sizes"
    assert name_by_size(dims("tiny", 51865) | {"n_text_layer": 2}) is None


# damage


def hostile_files(folder, good):
    """Files that end in .pt and hold no Whisper, by what is wrong with them."""
    whole = good.read_bytes()
    checkpoint = torch.load(good, weights_only=True)
    state, dims = checkpoint["model_state_dict"], checkpoint["dims"]
    first = "encoder.conv1.weight"
    ran = folder / "ran"
    contents = {
        "code": {"dims": dims, "model_state_dict": state, "extra": Bomb(ran)},
        "list": [1, 2],
        "no dims": {"model_state_dict": state},
        "names": {"dims": dims, "model_state_dict": {1: 2}},
        "text": {"dims": dict.fromkeys(dims, "x"), "model_state_dict": state},
        "missing": {"dims": dims, "model_state_dict": {n: t for n, t in state.items() if n != first}},
        "extra": {"dims": dims, "model_state_dict": state | {"more": state[first]}},
        "shape": {"dims": dims, "model_state_dict": state | {first: state[first][:, :10]}},
        "integers": {"dims": dims, "model_state_dict": state | {first: state[first].to(torch.int32)}},
        "heads": {"dims": dims | {"n_audio_head": 7}, "model_state_dict": state},
        "negative": {"dims": dims | {"n_audio_head": -1}, "model_state_dict": state},
        "layers": {"dims": dims | {"n_audio_layer": 10**9}, "model_state_dict": state},
        "vast": {"dims": dims, "model_state_dict": state | {first: torch.zeros(1).expand(10**6, 10**6, 10**3)}},
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")
    (folder / "pickle.pt").write_bytes(pickle.dumps(Bomb(ran)))
    (folder / "empty.pt").write_bytes(b"")
    (folder / "words.pt").write_text("these are not weights")
    with zipfile.ZipFile(folder / "zip.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")
        archive.writestr("archive/version", b"3\n")
    for place in (len(whole) // 3, len(whole) // 2):  # in the weights
        (folder / f"flipped{place}.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    for share in (0.001, 0.1, 0.5, 0.9, 0.999):
        (folder / f"cut{share}.pt").write_bytes(whole[: int(len(whole) * share)])
    return sorted(folder.glob("*.pt")), ran


def test_no_damaged_or_hostile_pt_file_runs_code_or_gives_another_error(tmp_path):
    good = write_form(random_whisper("en"), "pt-float16", tmp_path)
    (tmp_path / "bad").mkdir()
    files, ran = hostile_files(tmp_path / "bad", good)
    assert len(files) == 24
    for path in files:
        with pytest.raises(WeightsError) as refused:
            read_weights(path)
        message = str(refused.value)
        assert str(path) in message and "\n" not in message and "weights_only" not in message, message
    assert not ran.exists()
    with pytest.raises(WeightsError, match="asks to run .*open, and no code is run from it"):
        read_weights(tmp_path / "bad" / "code.pt")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A small int8 model.bin with aliases, by CTranslate2's own converter."""
    folder = tmp_path_factory.mktemp("converted")
    model = random_whisper("en", initial=True)
    return write_form(model, "ct2-int8_float16", folder)


def headers(data: bytes) -> list[int]:
    """Positions of every byte of a model.bin that is no weight."""
    positions, at = [], 0

    def skip(count):
        nonlocal at
        positions.extend(range(at, at + count))
        at += count

    def number(size):
        skip(size)
        return int.from_bytes(data[at - size : at], "little")

    number(4), skip(number(2)), number(4)
    for _ in range(number(4)):
        skip(number(2))
        for _ in range(number(1)):
            number(4)
        number(1)
        size = number(4)
        at += size
    for _ in range(number(4)):
        skip(number(2)), skip(number(2))
    assert at == len(data)
    return positions


def test_a_truncated_ctranslate2_file_is_refused_wherever_it_ends(converted, tmp_path):
    data = (converted / "model.bin").read_bytes()
    places = headers(data)
    rng = np.random.default_rng(0)
    cuts = {0, 1, 15, 16, len(data) - 1, *rng.choice(places, 300).tolist(), *rng.integers(len(data), size=50).tolist()}
    for cut in cuts:
        (tmp_path / "model.bin").write_bytes(data[:cut])
        with pytest.raises(WeightsError):
            read_weights(tmp_path)
    (tmp_path / "model.bin").write_bytes(data + b"more")
    with pytest.raises(WeightsError, match="4 bytes after its end"):
        read_weights(tmp_path)


def test_a_changed_ctranslate2_file_is_read_or_refused_and_never_anything_else(converted, tmp_path):
    """Random bytes, mostly where the file says what is in it: counts, names, shapes, types, sizes, aliases."""
    import resource

    data = (converted / "model.bin").read_bytes()
    places = headers(data)
    rng = np.random.default_rng(1)
    refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(600):
        changed = bytearray(data)
        for place in rng.choice(places, rng.integers(1, 4)):
            changed[place] = rng.choice([0, 1, 255, rng.integers(256)])
        (tmp_path / "model.bin").write_bytes(changed)
        started = time.perf_counter()
        try:
            read_weights(tmp_path)
        except WeightsError as error:
            refused += 1
            assert "\n" not in str(error)
        assert time.perf_counter() - started < 5
    assert refused > 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kB, for a file of 4 MB"


def entry(name: str, shape: tuple, kind: int, values: bytes) -> bytes:
    """A variable as CTranslate2 writes it."""
    encoded = name.encode() + b"\0"
    head = len(encoded).to_bytes(2, "little") + encoded + bytes([len(shape)])
    head += b"".join(size.to_bytes(4, "little") for size in shape)
    return head + bytes([kind]) + len(values).to_bytes(4, "little") + values


def model_bin(variables: list[bytes], aliases: list[tuple[str, str]]) -> bytes:
    names = b"".join(
        len(name).to_bytes(2, "little") + name
        for pair in aliases
        for name in (part.encode() + b"\0" for part in pair)
    )  # fmt: skip
    head = (6).to_bytes(4, "little") + b"\x0c\0WhisperSpec\0" + (3).to_bytes(4, "little")
    head += len(variables).to_bytes(4, "little")
    return head + b"".join(variables) + len(aliases).to_bytes(4, "little") + names


def test_aliases_cannot_make_a_small_file_large(tmp_path):
    """One matrix under the names of ten thousand layers would be 640 GB."""
    big = entry("encoder/position_encodings/encodings", (4000, 4000), 1, bytes(16_000_000))
    scale = entry("encoder/position_encodings/encodings_scale", (4000,), 0, np.ones(4000, "<f4").tobytes())
    parts = [
        "self_attention/layer_norm/gamma", "self_attention/layer_norm/beta", "self_attention/linear_0/weight",
        "self_attention/linear_0/bias", "self_attention/linear_1/weight", "self_attention/linear_1/bias",
        "ffn/layer_norm/gamma", "ffn/layer_norm/beta", "ffn/linear_0/weight", "ffn/linear_0/bias",
    ]  # fmt: skip
    names = [f"encoder/conv{n}/{kind}" for n in (1, 2) for kind in ("weight", "bias")]
    names += [f"encoder/layer_{layer}/{part}" for layer in range(9_000) for part in parts]
    path = tmp_path / "model.bin"
    path.write_bytes(model_bin([big, scale], [(name, "encoder/position_encodings/encodings") for name in names]))
    started = time.perf_counter()
    with pytest.raises(WeightsError, match="name more weights than it can hold"):
        read_weights(tmp_path)
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    "variables, aliases, said",
    [
        ([entry("a", (2**32 - 1,) * 4, 1, b"1")], [], "shape"),
        ([entry("a", (1,) * 200, 1, b"1")], [], "shape"),
        ([entry("a", (), 9, b"1234")], [], "of type 9"),
        ([entry("a", (0,), 0, b"")], [], "has 0 bytes"),
        ([entry("a", (1,), 1, b"1")] * 2, [], "there twice"),
        ([entry("a" * 300, (1,), 1, b"1")], [], "a name of 301 bytes"),
        ([entry("a\0b", (1,), 1, b"1")], [], "the name"),
        ([entry("a", (1,), 1, b"1")], [("a", "a")], "alias 'a'"),
        ([entry("a", (1,), 1, b"1")], [("b", "a"), ("b", "a")], "alias 'b'"),
        ([entry("a", (1,), 1, b"1")], [("b", "c")], "alias 'b' of 'c'"),
        ([entry("a", (1,), 1, b"1")], [], "lacks the variable"),
        ([entry("encoder/position_encodings/encodings", (1,), 1, b"1")], [], "without a scale"),
    ],
)
def test_absurd_contents_of_a_ctranslate2_file_are_named(tmp_path, variables, aliases, said):
    (tmp_path / "model.bin").write_bytes(model_bin(variables, aliases))
    with pytest.raises(WeightsError, match=said):
        read_weights(tmp_path)


@pytest.mark.parametrize("damage", ["json", "list", "heads", "cut", "shard", "escape", "code", "other", "output"])
def test_a_damaged_hugging_face_folder_is_one_clear_error(tmp_path, damage):
    form = "hf-sharded" if damage in ("shard", "escape") else "hf-bin" if damage == "code" else "hf-float32"
    model = random_whisper("en")
    if damage == "output":
        model.config.tie_word_embeddings = False
        model.proj_out.weight = torch.nn.Parameter(model.proj_out.weight.data + 1)
    folder = write_form(model, form, tmp_path)
    config, index = folder / "config.json", folder / "model.safetensors.index.json"
    if damage == "json":
        config.write_text("{")
    elif damage == "list":
        config.write_text("[]")
    elif damage == "heads":
        config.write_text(config.read_text().replace('"encoder_attention_heads": 4', '"encoder_attention_heads": 5'))
    elif damage == "cut":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "shard":
        next(folder.glob("model-00002*")).unlink()
    elif damage == "escape":
        shutil.copy(next(folder.glob("model-00002*")), tmp_path / "outside.safetensors")
        index.write_text(index.read_text().replace("model-00002", "../outside"))
    elif damage == "code":
        torch.save({"a": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    elif damage == "other":
        config.write_text(config.read_text().replace('"gelu"', '"relu"'))
    with pytest.raises(WeightsError) as refused:
        read_weights(folder)
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()
