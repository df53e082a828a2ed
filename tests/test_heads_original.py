"""Heads come from and go to the original project's form unchanged, and nothing in a file is ever run.

The oracle is an implementation of the original's modules of its own, on whose state dicts imports are tested.
"""

import json
import os
import pickle
from collections import OrderedDict

import pytest
import torch
from test_cli import run
from torch import nn

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.heads import build_head, export_head, import_head, load_head
from whisper_at_cli.heads.checkpoint import HeadDescription, save_head
from whisper_at_cli.heads.original import read_class_names, read_state

L, T, D, C = 4, 25, 384, 7
HEADS = [
    *((head, None) for head in ("last-mlp", "wa-mlp", "last-tr", "wa-tr", "tl-tr")),
    ("tl-tr", 128),
]


class TheirAttention(nn.Module):
    """Scaled dot products written out, one head after another."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        query, key, value = self.query(x), self.key(x), self.value(x)
        size = x.shape[-1] // self.heads
        mixed = []
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            weight = torch.softmax(query[..., part] @ key[..., part].mT / size**0.5, dim=-1)
            mixed.append(weight @ value[..., part])
        return self.out(torch.cat(mixed, dim=-1))


class TheirBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attn = TheirAttention(dim, heads)
        self.attn_ln = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.mlp_ln = nn.LayerNorm(dim)

    def forward(self, x):
        x = x + self.attn(self.attn_ln(x))
        return x + self.mlp(self.mlp_ln(x))


class TheirHead(nn.Module):
    """One clip at a time, layer by layer: slow, and by the definition of each form."""

    def __init__(self, head, width=None):
        super().__init__()
        inner = width or D
        self.head = head
        if width:
            self.down_layer = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, width))
        if head.startswith("wa"):
            self.layer_weight = nn.Parameter(torch.full((L,), 1 / L))
        if head.endswith("tr"):
            self.time_tr = TheirBlock(inner, 1)
        if head == "tl-tr":
            self.layer_tr = TheirBlock(inner, 8)
        self.mlp_layer = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, C))

    def forward(self, features):
        return torch.stack([self.mlp_layer(self.clip(clip)[None])[0] for clip in features])

    def clip(self, clip):
        if self.head == "tl-tr":
            layers = [self.down_layer(layer) if hasattr(self, "down_layer") else layer for layer in clip]
            means = [self.time_tr(layer[None])[0].mean(dim=0) for layer in layers]
            return self.layer_tr(torch.stack(means)[None])[0].mean(dim=0)
        one = clip[-1]
        if self.head.startswith("wa"):
            one = sum(weight * layer for weight, layer in zip(self.layer_weight, clip, strict=True))
            one = one / self.layer_weight.sum()
        if self.head.endswith("tr"):
            one = self.time_tr(one[None])[0]
        return one.mean(dim=0)


def their_head(head, width=None):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = TheirHead(head, width).eval()
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)  # norms and layer weights other than their start
    return module


def their_file(path, module, prefix="module."):
    torch.save(OrderedDict((prefix + name, value) for name, value in module.state_dict().items()), path)
    return path


def options(**changes):
    return {"backbone": "tiny.en", "class_names": tuple("abcdefg"), "clip_seconds": 5.0} | changes


@pytest.mark.parametrize("prefix", ["module.", "at_model.", "module.at_model.", ""])
@pytest.mark.parametrize("head, width", HEADS)
@torch.no_grad()
def test_an_imported_head_gives_the_originals_logits(tmp_path, head, width, prefix):
    theirs = their_head(head, width)
    found = import_head(their_file(tmp_path / "a.pth", theirs, prefix), tmp_path / "head", **options())
    assert (found.head, found.dim, found.layers, found.classes) == (head, width or D, L, C)
    features = torch.randn(3, L, T, D)
    ours = load_head(tmp_path / "head")
    torch.testing.assert_close(ours(features), theirs(features), rtol=1e-5, atol=1e-5)
    spec = ours.description
    assert (spec.backbone, spec.clip_seconds, spec.class_names) == ("tiny.en", 5.0, tuple("abcdefg"))
    assert spec.class_names_known and spec.weights_sha256 == "unknown" and spec.source == "a.pth"


@pytest.mark.parametrize("prefix", ["module.", "at_model."])
@pytest.mark.parametrize("head, width", HEADS)
def test_exported_tensors_have_the_originals_names_and_come_back_bit_for_bit(tmp_path, head, width, prefix):
    module = build_head(head, layers=L, dim=D, classes=C, width=width)
    description = HeadDescription(
        head=head, width=width, layers=L, dim=D, frames=T, class_names=tuple("abcdefg"), backbone="tiny.en",
        weights_sha256="0" * 64, clip_seconds=5.0, loss="bce",
    )  # fmt: skip
    save_head(module, tmp_path / "head", description)
    names = export_head(tmp_path / "head", tmp_path / "out.pth", prefix=prefix)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    theirs = {prefix + name: value for name, value in their_head(head, width).state_dict().items()}
    assert set(names) == set(written) == set(theirs)
    assert {name: value.shape for name, value in written.items()} == {n: v.shape for n, v in theirs.items()}
    import_head(tmp_path / "out.pth", tmp_path / "again", **options())
    for name, value in load_head(tmp_path / "again").state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_the_head_of_a_whole_whisper_at_is_taken_alone(tmp_path):
    theirs = their_head("tl-tr", 128)
    state = {f"at_model.{name}": value for name, value in theirs.state_dict().items()}
    whisper = {"encoder.conv1.weight": torch.zeros(2, 2, 3), "decoder.ln.weight": torch.zeros(2)}
    torch.save({"dims": {"n_mels": 80}, "model_state_dict": state | whisper, "epoch": 3}, tmp_path / "a.pth")
    found = import_head(tmp_path / "a.pth", tmp_path / "head", **options())
    assert (found.head, found.dim, found.left_out) == ("tl-tr", 128, 2)
    found, left_out = read_state(tmp_path / "a.pth")
    assert left_out == 2 and set(found) == set(theirs.state_dict())


class Malicious:
    """Pickled, it would make a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path, form):
    mark, file = tmp_path / "was-run", tmp_path / "a.pth"
    state = {"module." + name: value for name, value in their_head("wa-mlp").state_dict().items()}
    state["module.extra"] = Malicious(mark)
    if form == "pickle":
        file.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(WhisperATError, match="not a file of tensors alone: .*Nothing in it was run"):
        import_head(file, tmp_path / "head", **options())
    assert not mark.exists() and not (tmp_path / "head").exists()
    pickle.loads(pickle.dumps(Malicious(mark)))  # the trap itself works
    assert mark.exists()


def without(name):
    def change(state):
        return {key: value for key, value in state.items() if name not in key}

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (without("mlp_layer"), "none of the forms"),
        (without("mlp_layer.1.bias"), "not whole: mlp_layer.1.bias is absent"),
        (without("time_tr.attn.query.weight"), "not whole: time_tr.attn.query.weight is absent"),
        (lambda state: state | {"module.layer_tr.mlp.0.bias": torch.zeros(3)}, "layer_tr.mlp.0.bias is .3,."),
        (lambda state: state | {"module.time_tr.attn.key.bias": torch.zeros(D)}, "key.bias is .384,. and"),
        (lambda state: state | {"module.cls.weight": torch.zeros(3)}, "no part of one: 'module.cls.weight'"),
        (lambda state: state | {"at_model.layer_weight": torch.zeros(3)}, "heads under 'at_model.', 'module.'"),
        (lambda state: {"conv.weight": torch.zeros(3)}, "holds no head: none of its 1 tensors"),
        (lambda state: [1, 2], "holds a list, not a state dict"),
    ],
)
def test_what_is_not_a_whole_head_is_refused_and_leaves_nothing(tmp_path, change, message):
    state = {f"module.{name}": value for name, value in their_head("tl-tr").state_dict().items()}
    torch.save(change(state), tmp_path / "a.pth")
    with pytest.raises(WhisperATError, match=message):
        import_head(tmp_path / "a.pth", tmp_path / "head", **options())
    assert not (tmp_path / "head").exists()


def test_a_truncated_file_is_refused(tmp_path):
    file = their_file(tmp_path / "a.pth", their_head("wa-mlp"))
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(WhisperATError, match="cannot be read"):
        import_head(file, tmp_path / "head", **options())
    with pytest.raises(UsageError, match="is not a file"):
        import_head(tmp_path / "absent.pth", tmp_path / "head", **options())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"backbone": None}, "give --backbone. 384 channels are those of tiny, tiny.en"),
        ({"backbone": "base"}, "reads 384 channels and base has 512"),
        ({"backbone": "my-encoder"}, "no Whisper size, so its number of layers has to be given: --layers"),
        ({"layers": 6}, "one for 6 layers and 4 has tiny.en|6 were given"),
        ({"class_names": None}, "does not name its 7 classes: give --class-names"),
        ({"class_names": ("a", "b")}, "has 7 classes and 2 names"),
        ({"clip_seconds": None}, "how long the clips were: give --clip-seconds"),
        ({"clip_seconds": -1}, "clips of -1 seconds"),
        ({"loss": "mse"}, "choose bce"),
    ],
)
def test_what_shapes_cannot_say_has_to_be_given(tmp_path, changes, message):
    file = their_file(tmp_path / "a.pth", their_head("tl-tr"))
    with pytest.raises(UsageError, match=message):
        import_head(file, tmp_path / "head", **options(**changes))


def test_layers_are_those_of_the_layer_weights(tmp_path):
    file = their_file(tmp_path / "a.pth", their_head("wa-mlp"))
    assert import_head(file, tmp_path / "head", **options(backbone="my-encoder")).layers == L
    with pytest.raises(UsageError, match="one for 4 layers and 9 were given"):
        import_head(file, tmp_path / "head", **options(backbone="my-encoder", layers=9))


def test_527_classes_without_names_are_numbered_and_said_to_be(tmp_path):
    head = build_head("wa-mlp", layers=L, dim=D, classes=527)
    file = their_file(tmp_path / "a.pth", head)
    found = import_head(file, tmp_path / "head", backbone="tiny")
    description = load_head(tmp_path / "head").description
    assert description.class_names == tuple(map(str, range(527))) and not description.class_names_known
    assert description.clip_seconds == 10.0
    assert "called by their numbers" in found.notes[0] and "clips of 10 s" in found.notes[1]


def test_a_cache_says_what_the_file_does_not(tmp_path):
    features = torch.randn(6, L, T, D).numpy()
    cache = planted_cache(
        tmp_path / "a.zarr", features, [0, 1, 2, 3, 4, 6], backbone="tiny.en", weights_sha256="a" * 64
    )
    file = their_file(tmp_path / "a.pth", their_head("tl-tr"))
    import_head(file, tmp_path / "head", like=cache.spec)
    description = load_head(tmp_path / "head").description
    assert (description.weights_sha256, description.class_names) == ("a" * 64, cache.spec.class_names)


def test_class_names_come_from_every_form_of_list(tmp_path):
    lines, as_json, audioset, esc = (tmp_path / name for name in ("a.txt", "a.json", "a.csv", "esc50.csv"))
    lines.write_text("dog\n\nSpeech, male\n")
    as_json.write_text('["dog", "Speech, male"]')
    audioset.write_text('index,mid,display_name\n1,/m/1,"Speech, male"\n0,/m/0,dog\n')
    esc.write_text("filename,fold,target,category\n1.wav,1,1,rain\n2.wav,1,0,dog\n3.wav,2,1,rain\n")
    assert read_class_names(lines) == read_class_names(as_json) == read_class_names(audioset) == ("dog", "Speech, male")
    assert read_class_names(esc) == ("dog", "rain")
    lines.write_text("dog\ndog\n")
    with pytest.raises(UsageError, match="names the class 'dog' twice"):
        read_class_names(lines)
    audioset.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="no column display_name"):
        read_class_names(audioset)


def test_an_unknown_prefix_is_refused(tmp_path):
    with pytest.raises(UsageError, match="choose from module., at_model."):
        export_head(tmp_path, tmp_path / "a.pth", prefix="model.")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"head": "wa-pool", "width": 128, "standardised": True}, "no wa-pool-128 of standardised features"),
        ({"head": "wa-pool", "width": 128, "block": False}, "no wa-pool-128-no-block"),
        ({"head": "wa-tr", "width": 64}, "no wa-tr-64"),
        ({"head": "wa-mlp", "standardised": True}, "no wa-mlp of standardised features"),
    ],
)
def test_what_the_original_has_not_is_not_exported(tmp_path, options, said):
    module = build_head(layers=L, dim=D, classes=C, **options)
    description = HeadDescription(
        layers=L, dim=D, frames=T, class_names=tuple("abcdefg"), backbone="tiny.en", weights_sha256="0" * 64,
        clip_seconds=5.0, loss="bce", **options,
    )  # fmt: skip
    save_head(module, tmp_path / "head", description)
    again = load_head(tmp_path / "head")
    assert type(again) is type(module) and again.state_dict().keys() == module.state_dict().keys()
    with pytest.raises(UsageError, match=said):
        export_head(tmp_path / "head", tmp_path / "a.pth")


def test_the_commands_import_and_export(capsys, tmp_path):
    file = their_file(tmp_path / "a.pth", their_head("tl-tr", 128))
    (tmp_path / "names.txt").write_text("\n".join("abcdefg"))
    arguments = ["import-head", file, tmp_path / "head", "--backbone", "tiny.en", "--clip-seconds", "5"]
    status, out, _ = run(capsys, *arguments, "--class-names", tmp_path / "names.txt", "--json")
    assert status == 0 and json.loads(out)["head"] == "tl-tr" and json.loads(out)["dim"] == 128
    status, _, err = run(capsys, *arguments)
    assert status == 2 and "give --class-names FILE" in err
    status, out, _ = run(
        capsys, "export-head", tmp_path / "head", tmp_path / "b.pth", "--prefix", "at_model.", "--json"
    )
    assert status == 0 and all(name.startswith("at_model.") for name in json.loads(out)["tensors"])
    assert "38 tensors" in run(capsys, "export-head", tmp_path / "head", tmp_path / "b.pth")[1]
