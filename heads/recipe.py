"""How a head is trained: every setting in one place, with the paper's values by name.

`as20k`, `as2m` and `esc50` are the paper's (Gong et al. 2023, and the code behind it). What it does not give was chosen
here, and a comment says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads.forms import head_form


@dataclass(frozen=True)
class Recipe:
    """All settings of one training run. Epochs count from 1. Raises UsageError for a value that makes no sense."""

    batch_size: int = 48
    lr: float = 2e-4
    epochs: int = 30
    epoch_share: float = 1.0  # of the training clips that one epoch draws
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = 5e-7
    loss: str = "bce"  # "ce": softmax cross-entropy, for clips with exactly one label
    label_smoothing: float = 0.1
    mixup_rate: float = 0.5  # share of clips that are mixed with another
    mixup_alpha: float = 10.0  # lambda ~ Beta(alpha, alpha)
    time_mask_frames: int = 10  # a run of 0 to this many frames is zeroed, the same in all layers of a clip
    lr_decay: float = 1.0
    lr_decay_from_epoch: int = 10  # the last epoch at the full rate
    lr_decay_every: int = 5
    warmup_steps: int = 0
    average_from_epoch: int | None = 16  # weights at the ends of this epoch and all later ones are averaged; None: last
    class_balanced: bool = False  # draw clips with replacement, rare labels more often
    precision: str = "auto"  # of matrix products in training; auto: bfloat16 where that is faster, else float32
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.betas, list):  # as JSON has it
            object.__setattr__(self, "betas", tuple(self.betas))
        for name, (holds, rule) in _RULES.items():
            if not holds(getattr(self, name)):
                raise UsageError(f"recipe: {name} is {getattr(self, name)!r} and must be {rule}")
        first = self.average_from_epoch
        if first is not None and first > self.epochs:
            raise UsageError(f"recipe: average_from_epoch is {first} and must be None or at most {self.epochs}")

    def with_changes(self, **changes) -> Recipe:
        """A copy with some settings replaced. Raises UsageError for a name that is no setting.

        Fewer epochs move the start of weight averaging with them, unless that is given too.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise UsageError(f"a recipe has no setting {name!r}; its settings are {', '.join(known)}")
        epochs = changes.get("epochs", self.epochs)
        if isinstance(epochs, int) and "average_from_epoch" not in changes and self.average_from_epoch is not None:
            changes["average_from_epoch"] = max(1, round(epochs * self.average_from_epoch / self.epochs))
        return dataclasses.replace(self, **changes)

    def learning_rate(self, epoch: int, step: int) -> float:
        """Learning rate of a step (counted from 0 over the whole run) in an epoch (counted from 1)."""
        late = epoch - 1 - self.lr_decay_from_epoch
        decays = late // self.lr_decay_every + 1 if late >= 0 else 0
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.lr * self.lr_decay**decays * warmup


Rule = tuple[Callable[[object], bool], str]  # whether a value is right, and what it must be


def _whole(least: int) -> Rule:
    return lambda value: isinstance(value, int) and value >= least, f"a whole number from {least} on"


def _number(holds: Callable[[float], bool], where: str) -> Rule:
    return lambda value: isinstance(value, int | float) and holds(value), f"a number {where}"


def _one_of(*names: str) -> Rule:
    return lambda value: value in names, f"one of {', '.join(names)}"


_RULES = {
    "batch_size": _whole(1),
    "lr": _number(lambda value: 0 < value < math.inf, "above 0"),
    "epochs": _whole(1),
    "epoch_share": _number(lambda value: 0 < value <= 1, "above 0 and up to 1"),
    "betas": (
        lambda value: (
            isinstance(value, tuple) and len(value) == 2 and all(isinstance(b, float) and 0 <= b < 1 for b in value)
        ),
        "two numbers from 0 to below 1",
    ),
    "weight_decay": _number(lambda value: 0 <= value < math.inf, "from 0 on"),
    "loss": _one_of("bce", "ce"),
    "label_smoothing": _number(lambda value: 0 <= value < 1, "from 0 to below 1"),
    "mixup_rate": _number(lambda value: 0 <= value <= 1, "from 0 to 1"),
    "mixup_alpha": _number(lambda value: 0 < value < math.inf, "above 0"),
    "time_mask_frames": _whole(0),
    "lr_decay": _number(lambda value: 0 < value <= 1, "above 0 and up to 1"),
    "lr_decay_from_epoch": _whole(1),
    "lr_decay_every": _whole(1),
    "warmup_steps": _whole(0),
    "average_from_epoch": (lambda value: value is None or isinstance(value, int) and value >= 1, "None or an epoch"),
    "class_balanced": (lambda value: isinstance(value, bool), "True or False"),
    "precision": _one_of("auto", "float32", "bfloat16"),
    "seed": _whole(0),
}


NAMED = {
    "as20k": Recipe(),
    "as2m": Recipe(  # thirty short epochs of a tenth of the data each: three passes, as the original project ran it
        epoch_share=0.1, lr_decay=0.75, lr_decay_from_epoch=15, lr_decay_every=5, class_balanced=True
    ),
    "esc50": Recipe(loss="ce"),
}  # fmt: skip


def named_recipe(name: str, head: str, *, dim: int, width: int | None = None) -> Recipe:
    """The recipe `name` for a head on features of `dim` channels: as20k, as2m or esc50. Raises UsageError.

    The MLP heads train from the time mean of each layer, which no time mask can act on: theirs is 0.
    """
    if name not in NAMED:
        raise UsageError(f"recipe {name!r} is not known; choose from {', '.join(NAMED)}")
    recipe = NAMED[name].with_changes(lr=_learning_rate(name, head, width or dim))
    return recipe if head_form(head).reads == "features" else recipe.with_changes(time_mask_frames=0)


def _learning_rate(name: str, head: str, inner_dim: int) -> float:
    """The paper's for heads with Transformer blocks; for the MLP heads it gives none."""
    if head_form(head).reads == "features":
        return {"as20k": 2e-4, "as2m": 5e-5 if inner_dim >= 1024 else 1e-4, "esc50": 5e-4}[name]
    # ESC has few steps. Adam moves a logit by about lr times channels a step; 4 / channels was chosen on ESC-10.
    return 4 / inner_dim if name == "esc50" else 1e-3


def default_recipe_name(*, single_label: bool, clips: int) -> str:
    """esc50 for clips with one label each, else by size: as2m from 200,000 clips on, as20k below."""
    if single_label:
        return "esc50"
    return "as2m" if clips >= 200_000 else "as20k"
