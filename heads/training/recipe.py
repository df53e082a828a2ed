"""How a head is trained: every setting in one place, with the paper's values by name.

`as20k`, `as2m` and `esc50` are the paper's (Gong et al. 2023, and the code behind it). What it does not give was chosen
here, and a comment says so; so was `modern`, on scenes of ESC-10's clips (`benchmarks/scenes.py`). A setting's
declaration holds its default, what it must be, and its help for users.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from whisper_at_cli.extract.errors import UsageError

Value = TypeVar("Value")
Rule = tuple[Callable[[Any], bool], str]  # whether a value is right, and what it must be


def _setting(default: Value, rule: Rule, help: str) -> Value:
    return field(default=default, metadata={"rule": rule, "help": help})


def _pair(value: object) -> object:
    """A tuple also of what JSON has a list for."""
    return tuple(value) if isinstance(value, list) else value


def _whole(least: int) -> Rule:
    return lambda value: type(value) is int and value >= least, f"a whole number from {least} on"


def _whole_or_none(least: int) -> Rule:
    return (
        lambda value: value is None or (type(value) is int and value >= least),
        f"None or a whole number from {least} on",
    )


def _number(holds: Callable[[float], bool], where: str) -> Rule:
    return lambda value: type(value) in (int, float) and holds(value), f"a number {where}"


def _one_of(*names: str) -> Rule:
    return lambda value: value in names, f"one of {', '.join(names)}"


YES_OR_NO: Rule = (lambda value: isinstance(value, bool), "True or False")


def _share(value: float) -> bool:
    return 0 <= value <= 1


BETAS: Rule = (
    lambda value: (
        isinstance(value, tuple) and len(value) == 2 and all(isinstance(b, float) and 0 <= b < 1 for b in value)
    ),
    "two numbers from 0 to below 1",
)


def whole_batches(count: int, size: int) -> int:
    """How many of `count` clips fill batches of `size`; all where they fill none."""
    return count // size * size or count


@dataclass(frozen=True)
class Recipe:
    """All settings of one training run. Epochs count from 1. Raises UsageError for a value that makes no sense."""

    batch_size: int = _setting(48, _whole(1), "Clips of one step, over all processes together.")
    lr: float = _setting(2e-4, _number(lambda value: 0 < value < math.inf, "above 0"), "Learning rate of Adam.")
    optimizer: str = _setting(
        "adam", _one_of("adam", "adamw"), "adam: the penalty is in the gradient; adamw: weights decay beside it."
    )
    epochs: int = _setting(30, _whole(1), "Epochs.")
    epoch_share: float = _setting(
        1.0, _number(lambda value: 0 < value <= 1, "above 0 and up to 1"),
        "Share of the training clips that one epoch draws; as2m's epoch is a tenth of the data.",
    )  # fmt: skip
    betas: tuple[float, float] = _setting((0.95, 0.999), BETAS, "Decay rates of Adam's two running means.")
    weight_decay: float = _setting(
        5e-7, _number(lambda value: 0 <= value < math.inf, "from 0 on"), "L2 penalty of adam, decay rate of adamw."
    )
    loss: str = _setting(
        "bce", _one_of("bce", "ce", "asymmetric"),
        "bce: a sigmoid per class; ce: softmax, for clips with exactly one label; asymmetric: bce in which clear "
        "negatives hardly count (Ridnik et al. 2021).",
    )  # fmt: skip
    dropout: float = _setting(
        0.0, _number(lambda value: 0 <= value < 1, "from 0 to below 1"), "Dropout before the last linear map."
    )
    standardise: bool = _setting(
        False, YES_OR_NO,
        "Subtract from each layer and channel its mean over the training clips, and divide by its deviation.",
    )  # fmt: skip
    label_smoothing: float = _setting(
        0.1, _number(lambda value: 0 <= value < 1, "from 0 to below 1"), "Targets are y (1 - s) + s / classes."
    )
    label_smoothing_form: str = _setting(
        "standard", _one_of("standard", "original"),
        "original: a positive of an unmixed clip is 1 - s, without the s / classes.",
    )  # fmt: skip
    mixup_rate: float = _setting(0.5, _number(_share, "from 0 to 1"), "Share of clips that are mixed with another.")
    mixup_alpha: float = _setting(
        10.0, _number(lambda value: 0 < value < math.inf, "above 0"), "A mixed clip's share is drawn from Beta(a, a)."
    )
    mixup_partner: str = _setting(
        "batch", _one_of("batch", "uniform"),
        "batch: its neighbour in the batch, so drawn as clips are; uniform: any training clip, as originally.",
    )  # fmt: skip
    time_mask_frames: int = _setting(10, _whole(0), "A run of 0 to this many frames of a clip is zeroed.")
    time_mask_layers: str = _setting(
        "each", _one_of("each", "same"),
        "each: every layer's run is drawn by itself; same: one for all layers of a clip, as originally.",
    )  # fmt: skip
    lr_schedule: str = _setting(
        "steps", _one_of("steps", "cosine"),
        "How the learning rate falls. steps: as --lr-decay says; cosine: to 0 at the end, along half a cosine.",
    )  # fmt: skip
    lr_decay: float = _setting(
        1.0, _number(lambda value: 0 < value <= 1, "above 0 and up to 1"), "The learning rate is multiplied by this ..."
    )
    lr_decay_from_epoch: int = _setting(10, _whole(1), "... after this epoch, the last at the full rate ...")
    lr_decay_every: int = _setting(5, _whole(1), "... and again after each so many epochs.")
    warmup_steps: int = _setting(0, _whole(0), "The learning rate rises linearly over the first so many steps ...")
    warmup_share: float = _setting(
        0.0, _number(_share, "from 0 to 1"), "... or over this share of all, if that is more."
    )
    average_from_epoch: int | None = _setting(
        16, _whole_or_none(1), "Average the weights at the ends of the epochs from this one; none: keep the last ones."
    )
    average_to_epoch: int | None = _setting(None, _whole_or_none(1), "... up to this one; none: the last epoch.")
    class_balanced: bool = _setting(False, YES_OR_NO, "Draw clips with replacement, those with rare labels more often.")
    patience: int | None = _setting(
        None, _whole_or_none(1),
        "Stop when the metric has not risen for so many epochs on split valid, or a fifth of the training clips.",
    )  # fmt: skip
    drop_last: bool = _setting(
        False, YES_OR_NO, "Leave out the last incomplete batch, in training and in validation, as originally."
    )
    validate_every: int = _setting(
        1, _whole(0), "Validate after each so many epochs for the curve; 0: only at the end."
    )
    precision: str = _setting(
        "auto", _one_of("auto", "float32", "bfloat16"),
        "Of matrix products in training; auto: bfloat16 where that is faster, else float32.",
    )  # fmt: skip
    seed: int = _setting(0, _whole(0), "For whatever is drawn at random.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", _pair(self.betas))
        for setting in dataclasses.fields(self):
            (holds, rule), value = setting.metadata["rule"], getattr(self, setting.name)
            if not holds(value):
                raise UsageError(f"recipe: {setting.name} is {value!r} and must be {rule}")
        first, last = self.average_from_epoch, self.average_to_epoch
        if first is not None and first > self.epochs:
            raise UsageError(f"recipe: average_from_epoch is {first} and must be None or at most {self.epochs}")
        if last is not None and not (first is not None and first <= last):
            raise UsageError(
                f"recipe: average_to_epoch is {last} and must be None or at least average_from_epoch, {first}"
            )
        if self.lr_schedule == "cosine" and self.lr_decay != 1:
            raise UsageError(
                f"recipe: lr_decay is {self.lr_decay} and must be 1 with the schedule cosine, which lowers the rate by "
                "itself"
            )
        if self.patience and not self.validate_every:
            raise UsageError(
                "recipe: validate_every is 0 and must be 1 or more for patience, which asks for validation"
            )

    def with_changes(self, **changes: Any) -> Recipe:
        """A copy with some settings replaced. Raises UsageError for a name that is no setting.

        Fewer epochs move the start of weight averaging with them, unless that is given too.
        """
        known = [setting.name for setting in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise UsageError(f"a recipe has no setting {name!r}; its settings are {', '.join(known)}")
        epochs = changes.get("epochs", self.epochs)
        if isinstance(epochs, int) and "average_from_epoch" not in changes and self.average_from_epoch is not None:
            changes["average_from_epoch"] = max(1, round(epochs * self.average_from_epoch / self.epochs))
        return dataclasses.replace(self, **changes)

    def epoch_clips(self, clips: int) -> int:
        """How many of so many training clips an epoch draws."""
        count = max(1, round(self.epoch_share * clips))
        return whole_batches(count, self.batch_size) if self.drop_last else count

    def steps(self, clips: int) -> int:
        """Steps of the whole run over so many training clips."""
        return self.epochs * math.ceil(self.epoch_clips(clips) / self.batch_size)

    def learning_rate(self, epoch: int, step: int, steps: int) -> float:
        """Learning rate of a step (counted from 0, of `steps` in the whole run) in an epoch (counted from 1)."""
        warmup_steps = max(self.warmup_steps, round(self.warmup_share * steps))
        warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        if self.lr_schedule == "cosine":
            done = max(0, step - warmup_steps) / max(1, steps - warmup_steps)
            return self.lr * warmup * (1 + math.cos(math.pi * min(1.0, done))) / 2
        late = epoch - 1 - self.lr_decay_from_epoch
        decays = late // self.lr_decay_every + 1 if late >= 0 else 0
        return self.lr * self.lr_decay**decays * warmup

    def averages(self, epoch: int) -> bool:
        """Whether the weights at the end of this epoch count in the average."""
        first, last = self.average_from_epoch, self.average_to_epoch
        return first is not None and first <= epoch <= (last or self.epochs)


NAMED = {
    "as20k": Recipe(),
    "as2m": Recipe(  # thirty short epochs of a tenth of the data each: three passes, as the original project ran it
        epoch_share=0.1, lr_decay=0.75, lr_decay_from_epoch=15, lr_decay_every=5, class_balanced=True
    ),
    "esc50": Recipe(loss="ce"),
    "modern": Recipe(
        lr=1e-3, optimizer="adamw", betas=(0.9, 0.999), weight_decay=0.01, dropout=0.3, label_smoothing=0.0,
        mixup_rate=0.0, time_mask_frames=0, lr_schedule="cosine", warmup_share=0.1, average_from_epoch=None,
    ),
}  # fmt: skip
STANDARDISED = ("wa-pool", "concat-linear", "concat-linear-stats")  # heads that are by default

FAITHFUL = {  # as the original code does it
    "mixup_partner": "uniform", "time_mask_layers": "same", "label_smoothing_form": "original", "drop_last": True,
}  # fmt: skip
FAITHFUL_MASK = 9  # frames, for heads that read frames: the original draws a length from 0 to below 10


def faithful_changes(head: str) -> dict[str, Any]:
    """The settings with which a head is trained as the original code does it."""
    return FAITHFUL | ({"time_mask_frames": FAITHFUL_MASK} if _reads_frames(head) else {})


def named_recipe(name: str, head: str, *, dim: int, width: int | None = None) -> Recipe:
    """The recipe `name` for a head on features of `dim` channels: as20k, as2m, esc50 or modern. Raises UsageError.

    The MLP heads train from the time mean of each layer, which no time mask can act on: theirs is 0.
    """
    if name not in NAMED:
        raise UsageError(f"recipe {name!r} is not known; choose from {', '.join(NAMED)}")
    recipe = NAMED[name].with_changes(lr=_learning_rate(name, head, width or dim), standardise=head in STANDARDISED)
    return recipe if _reads_frames(head) else recipe.with_changes(time_mask_frames=0)


def _reads_frames(head: str) -> bool:
    from whisper_at_cli.heads.forms import head_form  # here, since commands ask this file for their options

    return head_form(head).reads == "features"


def _learning_rate(name: str, head: str, inner_dim: int) -> float:
    """The paper's for heads with Transformer blocks; for the MLP heads it gives none."""
    if name == "modern" and head == "wa-pool":
        return 3e-3  # of 1e-3 and 3e-3 the better on inner scenes, for every fold
    if _reads_frames(head):
        return {"as20k": 2e-4, "as2m": 5e-5 if inner_dim >= 1024 else 1e-4, "esc50": 5e-4, "modern": 1e-3}[name]
    # ESC has few steps. Adam moves a logit by about lr times channels a step; 4 / channels was chosen on ESC-10.
    return 4 / inner_dim if name in ("esc50", "modern") else 1e-3


def default_recipe_name(head: str, *, single_label: bool, clips: int) -> str:
    """modern for wa-pool. For others esc50 where clips have one label each, else by size: as2m from 200,000 clips on,
    as20k below."""
    if head == "wa-pool":
        return "modern"
    if single_label:
        return "esc50"
    return "as2m" if clips >= 200_000 else "as20k"
