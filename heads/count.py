"""What each head costs: parameters and FLOPs for one clip, against the encoder and against AST.

Counted by formula, in the convention of the paper's tables (fvcore's): a multiply-add is one FLOP, a layer norm five
per element; linear maps, convolutions and the two products of attention count, while biases, means, GELU, softmax and
the weighted average over layers do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

from whisper_at_cli.extract.backbones.encoder import POSITIONS_PER_SECOND
from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES, WhisperSize
from whisper_at_cli.extract.cache.schema import FRAMES
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads.forms import POOL_QUERIES, ConcatLinear, head_form, head_name, head_width

AST_FLOPS = 133e9  # as Table 1 prints it, for one 10-second clip; `ast_cost` counts 130.6e9
AST_FRAMES = 1024  # of its spectrogram, for 10 seconds
AUDIOSET_CLASSES = 527
PROJECTIONS = (128, 256, 512, 768)  # Table 2
COUNTED = ("concat-linear", "last-mlp", "wa-mlp", "wa-pool", "wa-tr", "tl-tr")  # in `head_table`
NORM_FLOPS_PER_ELEMENT = 5


@dataclass(frozen=True)
class Cost:
    """Parameters of a piece and the work it does on one clip. Costs of pieces add up."""

    params: int = 0
    multiply_adds: int = 0
    norm_flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params, self.multiply_adds + other.multiply_adds, self.norm_flops + other.norm_flops
        )

    @property
    def flops(self) -> int:
        """A multiply-add counts as one: the paper's convention."""
        return self.multiply_adds + self.norm_flops

    @property
    def flops_two_per_multiply_add(self) -> int:
        return 2 * self.multiply_adds + self.norm_flops


def linear(inputs: int, outputs: int, vectors: int = 1, bias: bool = True) -> Cost:
    return Cost(inputs * outputs + bias * outputs, vectors * inputs * outputs)


def layer_norm(dim: int, vectors: int = 1) -> Cost:
    return Cost(2 * dim, 0, NORM_FLOPS_PER_ELEMENT * dim * vectors)


def transformer(dim: int, length: int, sequences: int = 1) -> Cost:
    """One Transformer block over `sequences` sequences, which share its parameters. How many attention heads it has
    changes neither number."""
    vectors = length * sequences
    biased = linear(dim, dim, vectors)
    projections = biased + biased + biased + linear(dim, dim, vectors, bias=False)
    products = Cost(0, 2 * length * length * dim * sequences)
    mlp = linear(dim, 4 * dim, vectors) + linear(4 * dim, dim, vectors)
    return projections + products + mlp + layer_norm(dim, vectors) + layer_norm(dim, vectors)


def head_cost(
    head: str, *, layers: int, dim: int, classes: int = AUDIOSET_CLASSES, frames: int = FRAMES,
    width: int | None = None, block: bool = True,
) -> Cost:  # fmt: skip
    """Cost of a head on one clip of features (layers, frames, dim). Raises UsageError as `build_head` does.

    Standardisation is not counted: it can be folded into what follows it.
    """
    form = head_form(head, width, block)
    if issubclass(form, ConcatLinear):
        return linear(form.statistics * layers * dim, classes)
    if head == "wa-pool":
        return pool_cost(layers, dim, classes, frames, head_width(head, width) or dim, block)
    inner = width or dim
    classifier = layer_norm(inner) + linear(inner, classes)
    if head in ("last-mlp", "wa-mlp"):
        return Cost(layers if head == "wa-mlp" else 0) + classifier
    if head in ("last-tr", "wa-tr"):
        projection = layer_norm(dim, frames) + linear(dim, inner, frames) if width else Cost()
        return Cost(layers if head == "wa-tr" else 0) + projection + transformer(inner, frames) + classifier
    blocks = transformer(inner, frames, sequences=layers) + transformer(inner, layers)
    if width is None:
        return blocks + classifier
    return layer_norm(dim, layers * frames) + linear(dim, width, layers * frames) + blocks + classifier


def pool_cost(layers: int, dim: int, classes: int, frames: int, width: int, block: bool) -> Cost:
    """Cost of wa-pool with `width` channels inside, on one clip of features (layers, frames, dim)."""
    norms = Cost(2 * layers * dim, 0, NORM_FLOPS_PER_ELEMENT * layers * frames * dim)
    frame_vectors = linear(dim, width, frames) + (transformer(width, frames) if block else Cost())
    pooling = Cost(POOL_QUERIES * width, 2 * POOL_QUERIES * frames * width)
    pooled = (POOL_QUERIES + 2) * width
    classifier = layer_norm(pooled) + linear(pooled, classes)
    return norms + Cost(layers) + frame_vectors + layer_norm(width, frames) + pooling + classifier


def encoder_cost(*, mels: int, layers: int, dim: int, clip_seconds: float) -> Cost:
    """Cost of a whole Whisper encoder (convolutions, blocks, final norm) on one clip trimmed to `clip_seconds`."""
    positions = round(clip_seconds * POSITIONS_PER_SECOND)
    stem = linear(3 * mels, dim, 2 * positions) + linear(3 * dim, dim, positions)  # kernels of 3, the second strides 2
    total = stem + layer_norm(dim, positions)
    for _ in range(layers):
        total += transformer(dim, positions)
    return total


class ASTSizes(Protocol):
    """What of a `transformers.ASTConfig` decides its cost."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    patch_size: int
    frequency_stride: int
    time_stride: int
    max_length: int
    num_mel_bins: int
    num_labels: int
    qkv_bias: bool


def ast_cost(config: ASTSizes | None = None) -> Cost:
    """Cost of AST on one clip of 10 s, from a `transformers.ASTConfig`: by default the paper's AST, with 527 classes.

    Raises UsageError where the `transformers` extra is not installed.
    """
    if config is None:
        try:
            from transformers import ASTConfig
        except ImportError as error:
            raise UsageError("AST's sizes come from transformers; run: pip install 'whisper-at-cli[hf]'") from error
        config = cast("ASTSizes", ASTConfig())
        config.num_labels = AUDIOSET_CLASSES
    dim, patch = config.hidden_size, config.patch_size
    if config.intermediate_size != 4 * dim or not config.qkv_bias:
        raise UsageError("only an AST whose MLP is four times as wide, with biases on query, key and value, is counted")
    patches = (config.num_mel_bins - patch) // config.frequency_stride + 1
    patches *= (config.max_length - patch) // config.time_stride + 1
    tokens = patches + 2  # class and distillation
    total = linear(patch * patch, dim, patches) + Cost(2 * dim + tokens * dim)  # both tokens and the positions
    for _ in range(config.num_hidden_layers):
        total += transformer(dim, tokens) + Cost(dim)  # AST's key has a bias
    return total + layer_norm(dim, tokens) + layer_norm(dim) + linear(dim, config.num_labels)


@dataclass
class PaperAST:
    """The paper's AST, for clips of `max_length` spectrogram frames."""

    max_length: int
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    patch_size: int = 16
    frequency_stride: int = 10
    time_stride: int = 10
    num_mel_bins: int = 128
    num_labels: int = AUDIOSET_CLASSES
    qkv_bias: bool = True


def ast_flops(clip_seconds: float) -> float:
    """FLOPs of AST on one clip: for 10 s as Table 1 prints them, for other lengths in the counted proportion."""
    frames = max(PaperAST.patch_size, round(AST_FRAMES * clip_seconds / 10))
    return AST_FLOPS * ast_cost(PaperAST(frames)).flops / ast_cost(PaperAST(AST_FRAMES)).flops


def end_to_end_cost(model: str, *, classes: int = AUDIOSET_CLASSES, clip_seconds: float = 10.0) -> Cost:
    """Cost of a whole Whisper encoder with a Transformer layer over all its positions (last-tr, nothing pooled before
    it), for one clip. Raises UsageError for an unknown size."""
    size = whisper_size(model)
    encoder = encoder_cost(mels=size.mels, layers=size.layers, dim=size.dim, clip_seconds=clip_seconds)
    positions = round(clip_seconds * POSITIONS_PER_SECOND)
    return encoder + head_cost("last-tr", layers=size.layers, dim=size.dim, classes=classes, frames=positions)


def whisper_size(model: str) -> WhisperSize:
    """Sizes of a Whisper encoder by name. Raises UsageError for a name that is none."""
    if model not in WHISPER_SIZES:
        raise UsageError(f"{model!r} is not a Whisper size; choose from {', '.join(WHISPER_SIZES)}")
    return WHISPER_SIZES[model]


def head_table(model: str, classes: int = AUDIOSET_CLASSES, clip_seconds: float = 10.0) -> list[dict]:
    """One row per head on features of the Whisper size `model`, for one clip; TL-Tr also at the projections of Table 2,
    WA-Pool with and without its block.

    Each row has name, head, dim (channels inside the head), params, flops, flops_two_per_multiply_add, speedup_vs_ast
    (on a clip of the same length) and share_of_encoder (of its FLOPs). Raises UsageError for a name that is no Whisper
    size.
    """
    size = whisper_size(model)
    if classes < 1 or clip_seconds <= 0:
        raise UsageError(f"cannot count heads for {classes} classes and clips of {clip_seconds} seconds")
    encoder = encoder_cost(mels=size.mels, layers=size.layers, dim=size.dim, clip_seconds=clip_seconds)
    ast = ast_flops(clip_seconds)
    heads: list[tuple[str, int | None, bool]] = [(head, None, True) for head in COUNTED]
    heads.insert(COUNTED.index("wa-pool"), ("wa-pool", None, False))
    heads += [("tl-tr", width, True) for width in PROJECTIONS if width < size.dim]
    rows = []
    for head, width, block in heads:
        cost = head_cost(head, layers=size.layers, dim=size.dim, classes=classes, width=width, block=block)
        inner = head_width(head, width)
        rows.append(
            {
                "name": head_name(head, inner, block),
                "head": head,
                "dim": inner or size.dim,
                "params": cost.params,
                "flops": cost.flops,
                "flops_two_per_multiply_add": cost.flops_two_per_multiply_add,
                "speedup_vs_ast": ast / cost.flops,
                "share_of_encoder": cost.flops / encoder.flops,
            }
        )
    return rows
