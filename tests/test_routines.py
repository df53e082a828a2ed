"""A fast routine is compared with the plain one before it is used: one that gives wrong numbers is noticed."""

import pytest
import torch
import torch.nn.functional as F

from conftest import make_backbone, noise
from whisper_at_cli.extract import load_backbone
from whisper_at_cli.extract.backbones import precision, routines
from whisper_at_cli.extract.backbones.routines import PackedLinear, PlainLinear, agrees, attention, conv_is_right

CPU = torch.device("cpu")
VERDICTS = (routines._packed_is_right, routines._products_are_right, routines._conv_is_right, precision._best)


@pytest.fixture(autouse=True)
def no_verdicts():
    """Nothing is known of any routine before a test, nor after it of the planted ones."""
    for verdict in VERDICTS:
        verdict.cache_clear()
    yield
    for verdict in VERDICTS:
        verdict.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_agrees_and_one_wrong_number_does_not(dtype):
    right = torch.randn(40, 60)
    assert agrees(lambda: right.to(dtype), right, dtype)
    for wrong in (float("nan"), float("inf"), right[3, 5] + 5):
        one_wrong = right.clone()
        one_wrong[3, 5] = wrong
        assert not agrees(lambda found=one_wrong: found.to(dtype), right, dtype)
    assert not agrees(lambda: torch.mm(right, right), right, dtype), "a routine that fails is not right either"


@pytest.mark.parametrize(
    "fault",
    [
        lambda y: y * 1.02,
        lambda y: torch.cat([y[..., :-1], torch.zeros_like(y[..., -1:])], dim=-1),
        lambda y: torch.cat([y[:16], y[:16], y[32:]]) if y.ndim == 2 and len(y) > 32 else y,
    ],
    ids=["scaled", "one channel", "one tile of rows"],
)
def test_a_packed_layer_that_gives_wrong_numbers_is_noticed_and_not_used(monkeypatch, fault):
    expected = make_backbone().encode(torch.from_numpy(noise(0, 1)).float()[None])
    for verdict in VERDICTS:
        verdict.cache_clear()
    original = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x, gelu=False: fault(original(self, x, gelu=gelu)))
    assert not PackedLinear.is_right(64, 192, torch.float32) and not PackedLinear.is_right(64, 256, torch.float32)
    backbone = make_backbone()
    assert all(isinstance(getattr(backbone.encoder.blocks[0], name), PlainLinear) for name in ("qkv", "expand"))
    found = backbone.encode(torch.from_numpy(noise(0, 1)).float()[None])
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_a_gelu_that_is_left_out_is_noticed(monkeypatch):
    original = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x, gelu=False: original(self, x))
    assert PackedLinear.is_right(64, 256, torch.float32)
    assert not PackedLinear.is_right(64, 256, torch.float32, gelu=True)


def test_each_shape_is_compared_once(monkeypatch):
    calls, original = [], routines.agrees
    monkeypatch.setattr(routines, "agrees", lambda *arguments: calls.append(1) or original(*arguments))
    make_backbone()
    first = len(calls)
    make_backbone(1)
    assert len(calls) == first == 6, "two layers of the stem, and four of a block for all blocks"


def test_attention_by_products_is_used_where_it_is_right(monkeypatch):
    q, k, v = (torch.randn(2, 3, 30, 16).bfloat16() for _ in range(3))
    plain, products = F.scaled_dot_product_attention(q, k, v), routines.attention_by_products(q, k, v)
    assert torch.equal(attention(q, k, v), products)
    original = routines.attention_by_products
    monkeypatch.setattr(routines, "attention_by_products", lambda q, k, v: original(q, k, v) * 1.1)
    routines._products_are_right.cache_clear()
    assert torch.equal(attention(q, k, v), plain)


def test_a_convolution_that_gives_wrong_numbers_stays_in_float32(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    from test_backbones_speech import make_model, oracle, relative_error, save, sounds

    from whisper_at_cli.extract.backbones import speech

    model = make_model("wav2vec2")
    folder, conv1d = save(model, tmp_path / "model"), F.conv1d

    def wrong_in_bfloat16(x, *arguments, **options):
        y = conv1d(x, *arguments, **options)
        return y * -1.1 if y.dtype == torch.bfloat16 else y

    expected = oracle(model, sounds(1)[0])
    monkeypatch.setattr(speech, "has_instructions", lambda dtype: True)
    monkeypatch.setattr(F, "conv1d", wrong_in_bfloat16)
    monkeypatch.setattr(torch, "conv1d", wrong_in_bfloat16)
    assert not conv_is_right(torch.nn.Conv1d(16, 16, 3), torch.bfloat16, CPU)
    backbone = load_backbone(folder, device="cpu", precision="bfloat16")
    assert {m.weight.dtype for m in backbone.model.modules() if isinstance(m, torch.nn.Conv1d)} == {torch.float32}
    assert relative_error(backbone.encode(sounds(1))[0], expected) < 2e-2


def test_the_positional_convolution_stays_in_float32_on_a_cpu(tmp_path):
    pytest.importorskip("transformers")
    from test_backbones_speech import make_model, save

    seen = []
    for name in ("hubert", "wavlm", "data2vec"):
        backbone = load_backbone(save(make_model(name), tmp_path / name), device="cpu", precision="bfloat16")
        for module in backbone.model.encoder.pos_conv_embed.modules():
            if isinstance(module, torch.nn.Conv1d):
                module.register_forward_hook(lambda conv, _, output: seen.append((conv.weight.dtype, output.dtype)))
        backbone.encode(torch.from_numpy(noise(0, 1)).float()[None])
    assert len(seen) >= 3 and set(seen) == {(torch.float32, torch.float32)}


def on_gpu(monkeypatch, *, capability=(9, 0), wrong=()):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(precision, "product_is_right", lambda dtype, device: dtype not in wrong)
    return torch.device("cuda", 0)


def test_auto_is_float16_on_cuda_and_float32_elsewhere(monkeypatch):
    assert precision.resolved("auto", CPU) == precision.resolved("auto", torch.device("mps")) == "float32"
    assert precision.resolved("auto", on_gpu(monkeypatch)) == "float16"
    assert precision.resolved("bfloat16", on_gpu(monkeypatch)) == "bfloat16", "what is asked for stays"


@pytest.mark.parametrize(
    "gpu, expected",
    [
        (dict(wrong=(torch.float16,)), "bfloat16"),
        (dict(wrong=(torch.float16, torch.bfloat16)), "float32"),
        (dict(capability=(6, 1)), "float32"),
    ],
)
def test_auto_falls_back_where_float16_is_not_right_or_not_fast(monkeypatch, gpu, expected):
    assert precision.resolved("auto", on_gpu(monkeypatch, **gpu)) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_are_right_on_this_machine(dtype):
    assert precision.product_is_right(dtype, CPU)
