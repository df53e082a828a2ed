"""What people have on disk beside a plain Whisper: padded vocabularies, encoders alone, wrapped names; and what is no
model of a kind that is read here is named as what it is, before a dataset is opened."""

import json
import subprocess
import sys
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from whisper.model import AudioEncoder, ModelDimensions, TextDecoder
from whisper.tokenizer import get_tokenizer
from whisper_forms import random_whisper, write_form

from conftest import noise, write_wav
from whisper_at_cli.extract import extract, load_backbone, load_whisper
from whisper_at_cli.extract.audio.decode import decode
from whisper_at_cli.extract.backbones.recognise import check_model
from whisper_at_cli.extract.backbones.shapes import whisper_shapes
from whisper_at_cli.extract.backbones.sizes import VOCABULARIES, WHISPER_SIZES
from whisper_at_cli.extract.backbones.weights import read_weights
from whisper_at_cli.extract.errors import UsageError, WeightsError


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return tmp_path_factory.mktemp("forms")


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "variant, padded, said, right",
    [
        ("en", 51872, {"config.json": {"begin_suppress_tokens": [220, 50256]}}, 51864),
        ("en", 51865, {"generation_config.json": {"is_multilingual": False}}, 51864),
        ("en", 51904, {"generation_config.json": {"is_multilingual": False}}, 51864),
        ("multilingual", 51872, {"config.json": {"begin_suppress_tokens": [220, 50257]}}, 51865),
        ("multilingual", 51872, {"generation_config.json": {"is_multilingual": True}}, 51865),
        ("multilingual", 51866, {"config.json": {"begin_suppress_tokens": [220, 50257]}}, 51865),
        ("v3", 51872, {}, 51866),
        ("v3", 51866, {}, 51866),
        ("multilingual", 51865, {"config.json": {"begin_suppress_tokens": [220, 50256]}}, 51865),  # a config's defaults
    ],
)
def test_a_padded_vocabulary_is_cut_back_to_whispers(tmp_path, variant, padded, said, right):
    model = random_whisper(variant)
    exact = model.get_input_embeddings().weight.detach()[:right].clone()
    model.resize_token_embeddings(padded)
    folder = write_form(model, "hf-float32", tmp_path)
    for name, values in said.items():
        edit_json(folder / name, **values)
    found = load_whisper(folder, device="cpu")
    assert torch.equal(found.decoder.token_embedding.weight, exact)
    assert found.is_multilingual == (right > 51864)
    tokenizer = get_tokenizer(found.is_multilingual, num_languages=found.num_languages)
    assert tokenizer.timestamp_begin + 1501 == right, "the last token is 30.00 s"


@pytest.mark.parametrize("name, right", [("mine.en.pt", 51864), ("mine.pt", 51865)])
def test_a_padded_file_of_random_weights_is_english_by_its_name(tmp_path, name, right):
    model = random_whisper("multilingual")
    model.resize_token_embeddings(51872)
    path = write_form(model, "pt-float16", tmp_path).rename(tmp_path / name)
    assert read_weights(path).dims["n_vocab"] == right


def test_a_padded_converted_folder_transcribes_as_before(tmp_path):
    model = random_whisper("en")
    model.resize_token_embeddings(51872)
    folder = write_form(model, "ct2-float32", tmp_path)
    (folder / "config.json").write_text('{"suppress_ids_begin": [220, 50256]}')
    assert not load_whisper(folder, device="cpu").is_multilingual


def test_real_weights_with_a_padded_vocabulary_give_the_same_text(shared, tiny_en, tmp_path):
    """As `resize_token_embeddings` leaves them: before, this text was "multiply" over and over."""
    weights = read_weights(tiny_en)
    embedding = weights.state["decoder.token_embedding.weight"]
    rows = embedding.mean(0, keepdim=True).expand(8, -1)
    state = weights.state | {"decoder.token_embedding.weight": torch.cat([embedding, rows])}
    state = {name: tensor.half() for name, tensor in state.items()}
    torch.save({"dims": weights.dims | {"n_vocab": 51872}, "model_state_dict": state}, tmp_path / "tuned.pt")
    assert read_weights(tmp_path / "tuned.pt").dims["n_vocab"] == 51864, "English by its rows, whatever its name"
    audio = decode(min((shared / "data" / "speech14" / "audio").iterdir()))
    texts = [
        load_whisper(model, device="cpu").transcribe(audio, fp16=False)["text"]
        for model in (tiny_en, tmp_path / "tuned.pt")
    ]
    assert texts[0] == texts[1] and len(texts[0].split()) > 3


LOADS = """
import sys
from whisper_at_cli.extract import load_backbone, load_whisper
for path in sys.argv[1:]:
    load_backbone(path, device="cpu"), load_whisper(path, device="cpu")
print(sorted({name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor"))}))
"""


def test_loading_a_whisper_imports_no_compiler(tmp_path):
    """Some of PyTorch's functions do, on its meta device for one, which takes 3 s of CPU time."""
    paths = [write_form(random_whisper("en"), form, tmp_path) for form in ("pt-float16", "ct2-float16", "hf-float32")]
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *map(str, paths)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["tiny.en", "large-v3", "turbo"])
def test_the_tensors_of_a_whisper_are_those_of_its_own_classes(name):
    size = WHISPER_SIZES[name]
    layers = 2  # of which all are alike
    dims = ModelDimensions(
        size.mels, 1500, size.dim, size.heads, layers, VOCABULARIES[size.mels][0], 448, size.dim, size.heads, layers
    )
    numbers = list(vars(dims).values())
    with torch.device("meta"):
        halves = {"encoder": AudioEncoder(*numbers[:5]), "decoder": TextDecoder(*numbers[5:])}
    expected = {
        f"{side}.{name}": tuple(tensor.shape)
        for side, half in halves.items()
        for name, tensor in half.state_dict().items()
    }
    assert whisper_shapes(vars(dims)) == expected
    encoder = vars(dims) | {"n_text_layer": 0}
    assert whisper_shapes(encoder) == {name: shape for name, shape in expected.items() if name.startswith("encoder.")}


SMALL = dict(
    num_mel_bins=80, vocab_size=51864, d_model=64, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=2, encoder_ffn_dim=256, decoder_ffn_dim=256,
)  # fmt: skip


def whole_and_encoders(folder):
    """One model saved whole, and its encoder in every form that transformers saves one."""
    torch.manual_seed(0)
    whole = WhisperModel(WhisperConfig(**SMALL)).eval()
    classifier = WhisperForAudioClassification(WhisperConfig(**SMALL, use_weighted_layer_sum=True, num_labels=3))
    classifier.encoder.load_state_dict(whole.encoder.state_dict())
    for name, model in (("whole", whole), ("classifier", classifier), ("encoder", whole.encoder)):
        model.save_pretrained(folder / name)
    checkpoint = torch.load(write_form(random_whisper("en"), "pt-float32", folder), weights_only=True)
    state = checkpoint["model_state_dict"]
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    torch.save(checkpoint | {"model_state_dict": encoder}, folder / "encoder.pt")
    return [("whole", "classifier"), ("whole", "encoder"), ("pt-float32.pt", "encoder.pt")]


def test_an_encoder_alone_gives_the_features_of_the_whole_model_and_no_text(tmp_path):
    clip = torch.from_numpy(noise(3, 10)).float()[None]
    for whole, encoder in whole_and_encoders(tmp_path):
        found, expected = (load_backbone(tmp_path / name, device="cpu") for name in (encoder, whole))
        assert torch.equal(found.encode(clip), expected.encode(clip)), encoder
        assert found.weights_sha256 == expected.weights_sha256
        with pytest.raises(UsageError, match=f"{encoder} holds an encoder without a decoder: extract can use it"):
            load_whisper(tmp_path / encoder, device="cpu")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("form", ["pt-float32", "hf-bin"])
def test_names_that_a_wrapper_prefixed_are_read(tmp_path, form, prefix):
    path = write_form(random_whisper("en"), form, tmp_path)
    plain = read_weights(path)
    file = path if path.is_file() else path / "pytorch_model.bin"
    content = torch.load(file, weights_only=True)
    tensors = content.get("model_state_dict", content)
    wrapped = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    torch.save(content | {"model_state_dict": wrapped} if "dims" in content else wrapped, file)
    found = read_weights(path)
    assert found.encoder_sha256() == plain.encoder_sha256() and found.state.keys() == plain.state.keys()


@pytest.fixture(scope="module")
def tiny_model():
    """As wide as tiny, so that its attention heads are known, with a block on each side."""
    torch.manual_seed(1)
    config = SMALL | dict(d_model=384, encoder_layers=1, encoder_attention_heads=6, decoder_attention_heads=6)
    config |= dict(encoder_ffn_dim=1536, decoder_ffn_dim=1536)
    return WhisperForConditionalGeneration(WhisperConfig(**config)).eval()


@pytest.mark.parametrize("wrap", ["transformers", "openai", "lightning", "wrapped"])
def test_a_state_dict_saved_by_itself_is_read_where_its_size_is_known(tmp_path, tiny_model, wrap):
    """`torch.save(model.state_dict(), path)`: no dims beside it (whisper.cpp 616, vibe 125)."""
    whole = read_weights(write_form(tiny_model, "hf-float32", tmp_path))
    theirs = tiny_model.state_dict()
    content = {
        "transformers": theirs,
        "openai": whole.state,
        "lightning": {"state_dict": {f"model.{name}": tensor for name, tensor in theirs.items()}, "epoch": 3},
        "wrapped": {f"module.{name}": tensor for name, tensor in whole.state.items()},
    }[wrap]
    torch.save(content, tmp_path / "mine.pt")
    found = read_weights(tmp_path / "mine.pt")
    assert found.dims == whole.dims and found.state.keys() == whole.state.keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in whole.state.items())


@pytest.mark.parametrize(
    "extra",
    [
        {"best_wer": np.float64(0.1), "loss": np.float32(0.2), "step": np.int64(3)},
        {"args": Namespace(lr=1e-5, data="a.csv")},
        {"optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-5}]}, "epoch": 3},
    ],
    ids=["NumPy's numbers", "arguments", "optimiser"],
)
def test_what_training_scripts_save_beside_the_weights_does_no_harm(tmp_path, extra):
    """PyTorch's own reader refuses NumPy's numbers (deepmd-kit 4147, nerfstudio 3702); no code is run for these."""
    path = write_form(random_whisper("en"), "pt-float32", tmp_path)
    plain, content = read_weights(path), torch.load(path, weights_only=True)
    content["dims"] = ModelDimensions(**content["dims"])  # `model.dims`, and not its dict
    torch.save(content | extra, path)
    found = read_weights(path)
    assert found.dims == plain.dims and found.encoder_sha256() == plain.encoder_sha256()


def test_numbers_of_numpy_1_are_read_too(tmp_path):
    path = write_form(random_whisper("en"), "pt-float32", tmp_path)
    torch.save(torch.load(path, weights_only=True) | {"best": np.float64(0.1)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data.replace(b"cnumpy._core.multiarray\nscalar", b"cnumpy.core.multiarray\nscalar"))
    assert read_weights(path).dims["n_vocab"] == 51864


def test_a_state_dict_of_an_unknown_size_is_refused(tmp_path):
    torch.save(random_whisper("en").state_dict(), tmp_path / "mine.pt")
    with pytest.raises(WeightsError, match=r"mine.pt is not an OpenAI Whisper checkpoint, .*: it has no 'dims'"):
        read_weights(tmp_path / "mine.pt")


def test_tied_weights_may_be_stored_under_either_name(tmp_path, tiny_model):
    """safetensors' own `save_model` keeps one of two names of a tensor (transformers 38870)."""
    folder = write_form(tiny_model, "hf-float32", tmp_path)
    expected = read_weights(folder)
    tensors = {name: tensor.contiguous() for name, tensor in tiny_model.state_dict().items()}
    for dropped in ("proj_out.weight", "model.decoder.embed_tokens.weight"):
        kept = {name: tensor for name, tensor in tensors.items() if name != dropped}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        found = read_weights(folder)
        assert all(torch.equal(found.state[name], tensor) for name, tensor in expected.state.items())


def test_quantised_weights_are_refused_as_such(tmp_path, tiny_model):
    folder = write_form(tiny_model, "hf-float32", tmp_path)
    edit_json(folder / "config.json", quantization_config={"load_in_8bit": True, "quant_method": "bitsandbytes"})
    with pytest.raises(WeightsError, match="is quantised, by its config.json; use the model that it was made from"):
        read_weights(folder)


@pytest.mark.parametrize("form", ["pt-float16", "hf-float32", "ct2-float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_said_at_loading(tmp_path, form, value):
    model = random_whisper("en")
    model.model.encoder.layers[1].fc1.weight.data[3, 5] = value
    path = write_form(model, form, tmp_path)
    with pytest.raises(WeightsError, match=r"encoder\.blocks\.1\.mlp\.0\.weight holds NaN or infinite"):
        read_weights(path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 151\n"
FILES = {
    "lfs": (POINTER, "a Git LFS pointer, not the file itself; run: git lfs pull"),
    "ggml": (b"lmgg" + bytes(40), "a GGML model of whisper.cpp"),
    "gguf": (b"GGUF" + bytes(40), "a GGML model of whisper.cpp"),
    "html": (b"<!DOCTYPE html><html>", r"a web page \(HTML\); download the file itself"),
    "html2": (b"\n  <html lang='en'>", r"a web page \(HTML\)"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "a message in XML"),
    "json": (b'{"error":"Repository not found"}', "a message in JSON"),
    "keras": (b"\x89HDF\r\n", "a weights file of TensorFlow"),
    "empty": (b"", "empty"),
    "words": (b"weights?", "not a PyTorch checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_form_is_named(tmp_path, kind):
    content, what = FILES[kind]
    for name in ("model.pt", "ggml-tiny.en.bin"):
        (tmp_path / name).write_bytes(content)
        for read in (read_weights, check_model, load_backbone):
            with pytest.raises(WeightsError, match=f"{name} is {what}"):
                read(tmp_path / name)


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["lfs", "html", "ggml"])
def test_a_file_of_another_form_in_a_folder_is_named(tmp_path, name, kind):
    content, what = FILES[kind]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(
        '{"model_type": "whisper", "encoder_attention_heads": 4, "decoder_attention_heads": 4}'
    )
    for read in (read_weights, check_model, load_backbone):
        with pytest.raises(WeightsError, match=f"{name} is {what}"):
            read(tmp_path)


@pytest.mark.parametrize(
    "names, what",
    [
        (["adapter_config.json", "adapter_model.safetensors"], r"holds a PEFT adapter \(LoRA\).* merge_and_unload"),
        (["config.json", "openvino_encoder_model.xml", "openvino_encoder_model.bin"], "holds an OpenVINO model"),
        (["config.json", "encoder_model.onnx"], "holds an ONNX model"),
        (["ggml-base.en.bin"], "holds a GGML model of whisper.cpp"),
        (["config.json", "weights.npz"], "holds an MLX model"),
        (["config.json", "tf_model.h5"], "holds weights for TensorFlow or Flax only"),
        (["checkpoint-500", "checkpoint-1000", "runs"], "holds the checkpoints of a training.*; give one of them"),
        (["blobs", "refs", "snapshots"], "give one of the folders in its folder snapshots"),
        (["zero_to_fp32.py", "global_step500", "latest"], "holds a DeepSpeed checkpoint; run its zero_to_fp32.py"),
        (["config.json", "vocabulary.txt", "tokenizer.json"], "a CTranslate2 model without its model.bin"),
        (["tiny.en.pt"], "holds a .pt file; give the file, not its folder"),
    ],
)
def test_a_folder_of_another_form_is_named(tmp_path, names, what):
    for name in names:
        (tmp_path / name).write_text('{"model_type": "whisper"}')
    for read in (read_weights, check_model, load_backbone):
        with pytest.raises(UsageError, match=what):
            read(tmp_path)


def test_a_wrong_model_is_refused_before_the_dataset_is_read(tmp_path, random_backbone):
    """A listing of millions of clips takes minutes."""
    (tmp_path / "model.pt").write_bytes(POINTER)
    for model in ("tyni.en", tmp_path / "none.pt", tmp_path / "model.pt", tmp_path, "no_module:load"):
        with pytest.raises((UsageError, WeightsError), match="(?i)model|no_module") as refused:
            extract(tmp_path / "no such dataset", tmp_path / "a.zarr", model=model)
        assert "no such dataset" not in str(refused.value)
    with pytest.raises(UsageError, match="no such dataset"):
        extract(tmp_path / "no such dataset", tmp_path / "a.zarr", model="tiny.en")
    write_wav(tmp_path / "sounds" / "a" / "1.wav", noise(0, 1.0))
    extract(tmp_path / "sounds", tmp_path / "a.zarr", model=random_backbone, clip_seconds=1.0)
