"""Heads compute what their equations say, one clip at a time or in a batch."""

import subprocess
import sys

import pytest
import torch
from whisper.model import ResidualAttentionBlock

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads.forms import FORMS, Block, build_head

FORMS_AND_WIDTHS = [
    *((head, None) for head in FORMS),
    ("tl-tr", 16),
    ("wa-tr", 16),
    ("wa-pool", 16),
]
L, T, D, C = 3, 25, 32, 7


@pytest.fixture(params=FORMS_AND_WIDTHS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def head(request):
    """Every head, its weights moved off their starting values so that each of them matters."""
    torch.manual_seed(0)
    module = build_head(request.param[0], layers=L, dim=D, classes=C, width=request.param[1])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer in module.buffers():
            buffer.add_(torch.rand_like(buffer))
    return request.param[0], module.eval()


@pytest.fixture
def features():
    return torch.randn(4, L, T, D, generator=torch.Generator().manual_seed(1))


def slow_logits(name, module, clip_LTD):
    """One clip through the paper's equations with plain loops; a block is trusted here and tested on its own."""
    if name == "last-mlp":
        return module.mlp_layer(sum(clip_LTD[-1]) / T)
    if name == "last-tr":
        return module.mlp_layer(sum(module.time_tr(clip_LTD[-1:])[0]) / T)
    if name in ("wa-mlp", "wa-tr"):
        weights = module.layer_weight / sum(module.layer_weight)
        mixed_TD = sum(weight * layer for weight, layer in zip(weights, clip_LTD, strict=True))
        frames = mixed_TD
        if name == "wa-tr":
            frames = module.time_tr(torch.stack([module.down_layer(frame) for frame in mixed_TD])[None])[0]
        return module.mlp_layer(sum(frames) / T)
    if name.startswith("concat-linear"):
        inputs = [sum(layer) / T for layer in clip_LTD]
        if name.endswith("stats"):
            inputs += [layer.std(dim=0, correction=0) for layer in clip_LTD]
            inputs += [layer.max(dim=0).values for layer in clip_LTD]
        return module.linear((torch.cat(inputs) - module.center) / module.scale)
    if name == "wa-pool":
        return module.mlp_layer(torch.cat(pooled(module, clip_LTD)))
    layers = []
    for layer_TD in clip_LTD:
        frames = module.time_tr(torch.stack([module.down_layer(frame) for frame in layer_TD])[None])[0]
        layers.append(sum(frames) / T)
    return module.mlp_layer(sum(module.layer_tr(torch.stack(layers)[None])[0]) / L)


def pooled(module, clip_LTD):
    """What wa-pool gathers over time: the mean of the frames under each query, their maximum, and their mean."""
    share = torch.exp(module.layer_weight) / sum(torch.exp(module.layer_weight))
    normed = [
        [(x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * weight + bias for x in layer]
        for layer, weight, bias in zip(clip_LTD, module.norm_weight, module.norm_bias, strict=True)
    ]
    mixed = [sum(share[at] * layer[t] for at, layer in enumerate(normed)) for t in range(T)]
    frames = module.frame_norm(module.block(torch.stack([module.project(x) for x in mixed])[None])[0])
    found = []
    for query in module.query:
        score = torch.exp(torch.stack([query @ z for z in frames]) / frames.shape[1] ** 0.5)
        found.append(sum(s * z for s, z in zip(score / sum(score), frames, strict=True)))
    return [*found, torch.stack([max(column) for column in frames.T]), sum(frames) / T]


@torch.no_grad()
def test_heads_equal_their_equations_in_plain_loops(head, features):
    name, module = head
    fast = module(features)
    assert fast.shape == (4, C)
    for clip, logits in zip(features, fast, strict=True):
        difference = (logits - slow_logits(name, module, clip)).abs()
        assert difference.max() < 1e-5, f"{name}: largest {difference.max():.2e}, mean {difference.mean():.2e}"


@torch.no_grad()
def test_a_clip_has_the_same_logits_alone_and_in_a_batch(head, features):
    _, module = head
    alone = torch.cat([module(clip[None]) for clip in features])
    torch.testing.assert_close(module(features), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention_heads", [1, 8])
def test_a_block_is_whispers_own_and_takes_its_weights_by_name(attention_heads):
    torch.manual_seed(2)
    theirs, ours = ResidualAttentionBlock(64, attention_heads).eval(), Block(64, attention_heads)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 10, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_frames_of_a_tl_tr_layer_have_no_order(features):
    module = build_head("tl-tr", layers=L, dim=D, classes=C).eval()
    torch.testing.assert_close(module(features.flip(2)), module(features), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_mlp_heads_give_the_same_logits_from_the_mean_as_from_all_frames(features):
    for name in ("last-mlp", "wa-mlp"):
        module = build_head(name, layers=L, dim=D, classes=C)
        mean = features.mean(dim=2, keepdim=True)
        torch.testing.assert_close(module(mean), module(features), rtol=1e-5, atol=1e-5)


def test_layer_weights_start_equal():
    for name in ("wa-mlp", "wa-tr"):
        torch.testing.assert_close(build_head(name, layers=5, dim=16, classes=2).layer_weight, torch.full((5,), 0.2))


def test_parameters_have_the_names_of_the_original_project():
    names = set(build_head("tl-tr", layers=L, dim=D, classes=C, width=16).state_dict())
    block = {"attn.query.weight", "attn.query.bias", "attn.key.weight", "attn.value.weight", "attn.value.bias"}
    block |= {"attn.out.weight", "attn.out.bias", "attn_ln.weight", "attn_ln.bias", "mlp.0.weight", "mlp.0.bias"}
    block |= {"mlp.2.weight", "mlp.2.bias", "mlp_ln.weight", "mlp_ln.bias"}
    ends = {f"{layer}.{place}.{kind}" for layer in ("down_layer", "mlp_layer") for place in "01" for kind in KINDS}
    assert names == {f"{tr}.{name}" for tr in ("time_tr", "layer_tr") for name in block} | ends
    names = set(build_head("wa-tr", layers=L, dim=D, classes=C).state_dict())
    assert names == {"layer_weight", *(f"time_tr.{name}" for name in block), *(n for n in ends if n[0] == "m")}


KINDS = ("weight", "bias")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head": "tltr"}, "'tltr' is not known; choose from last-mlp, wa-mlp, last-tr, wa-tr, tl-tr"),
        ({"head": "wa-mlp", "width": 128}, "wa-mlp has no projection"),
        ({"head": "tl-tr", "width": 100}, "cannot project to 100 channels; choose a multiple of 8"),
        ({"head": "tl-tr", "width": 0}, "cannot project to 0 channels"),
        ({"head": "tl-tr", "dim": 36}, "36 channels cannot be shared by 8 attention heads"),
        ({"head": "wa-tr", "classes": 0}, "needs layers, channels and classes"),
    ],
)
def test_a_head_that_cannot_be_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        build_head(**({"layers": L, "dim": D, "classes": C} | options))


def test_the_package_offers_its_names_without_importing_torch():
    code = (
        "import sys, whisper_at_cli.heads as heads; assert 'train_head' in dir(heads); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_form_says_what_it_reads():
    assert {name: form.reads for name, form in FORMS.items()} == {
        "last-mlp": "last mean",
        "wa-mlp": "mean",
        "last-tr": "features",
        "wa-tr": "features",
        "tl-tr": "features",
        "wa-pool": "features",
        "concat-linear": "mean",
        "concat-linear-stats": "features",
    }


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FORMS if not name.startswith("concat")])
def test_a_standardised_head_takes_mean_and_deviation_from_each_layer_and_channel(name, features):
    torch.manual_seed(3)
    module = build_head(name, layers=L, dim=D, classes=C, standardised=True).eval()
    torch.testing.assert_close(module(features), module.logits(features))  # nothing, before there are statistics
    layers = 1 if module.last_layer else L
    mean, deviation = torch.randn(layers, D), torch.rand(layers, D) + 0.5
    module.standardise(mean, deviation)
    by_hand = (features - mean[:, None]) / deviation[:, None]
    torch.testing.assert_close(module(features), module.logits(by_hand))
    assert {"standard_mean", "standard_deviation"} <= module.state_dict().keys()


@torch.no_grad()
def test_wa_pools_frames_share_the_attention_of_its_queries(features):
    module = build_head("wa-pool", layers=L, dim=D, classes=C, width=16).eval()
    share = module.frame_attention(features)
    assert share.shape == (4, T)
    torch.testing.assert_close(share.sum(dim=1), torch.ones(4))
    loud = features.clone()
    loud[:, :, 5] = 0  # a frame like no other is looked at more or less than before
    assert (module.frame_attention(loud)[:, 5] != share[:, 5]).all()


@torch.no_grad()
def test_without_its_block_wa_pool_sees_frames_in_no_order(features):
    module = build_head("wa-pool", layers=L, dim=D, classes=C, block=False).eval()
    torch.testing.assert_close(module(features.flip(2)), module(features), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="--no-block is for wa-pool"):
        build_head("tl-tr", layers=L, dim=D, classes=C, block=False)
