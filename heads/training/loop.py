"""The epochs of heads that train side by side: draw, step, average, validate, record, and continue after a kill.

The loop is the paper's: Adam on mixed and masked batches, then the average of the weights at the ends of the last
epochs. It departs from the original code in dropping no clip, neither in training nor in validation. All that is drawn
in an epoch comes from the seed, the training's number and the epoch, so a run that continues needs no other memory of
its random numbers.

M heads side by side.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.devices import one_thread_per_operation, random_numbers
from whisper_at_cli.extract.errors import WhisperATError
from whisper_at_cli.extract.evaluation.metrics import Metrics, evaluate_scores
from whisper_at_cli.heads.evaluate import BATCH_BYTES, predict
from whisper_at_cli.heads.forms import ConcatLinear, Head, TLTr
from whisper_at_cli.heads.layers import attention_sums, layer_weights
from whisper_at_cli.heads.training.batches import Draw, balancing_weights, draw_epoch
from whisper_at_cli.heads.training.board import Board
from whisper_at_cli.heads.training.data import Clips
from whisper_at_cli.heads.training.fleet import Fleet
from whisper_at_cli.heads.training.linear import fit
from whisper_at_cli.heads.training.loader import Epochs
from whisper_at_cli.heads.training.ranks import Ranks
from whisper_at_cli.heads.training.recipe import Recipe
from whisper_at_cli.heads.training.records import RunFolder
from whisper_at_cli.heads.training.standardise import layer_statistics

FINITE_CLIPS = 64  # looked at together
SMALL_BATCH = 1 << 18  # numbers in a batch


@dataclass(frozen=True, eq=False)
class Training:
    """One head to be trained. `name` is its own within a run; `number` sets its random numbers apart from others'."""

    name: str
    number: int  # of the fold that is held out; 0: none is
    recipe: Recipe
    train: np.ndarray  # positions in Clips
    test: np.ndarray  # positions in Clips, none where all clips train
    watched: np.ndarray = field(default_factory=lambda: np.arange(0))  # positions that stop it early, with patience
    inner: tuple[tuple[np.ndarray, np.ndarray], ...] = ()  # positions (train, test) that choose a strength


@dataclass(eq=False)
class Trained:
    """How a training ended. Without a `module` where an earlier call finished it."""

    training: Training
    record: dict  # epochs, samples, seconds, waiting_seconds, metrics (or None), history
    module: nn.Module | None = None
    scores: np.ndarray | None = None  # (n, C) of the final weights on the test clips

    @property
    def metrics(self) -> dict | None:
        """Of the final weights on the test clips, if there are any."""
        return self.record["metrics"]

    def value(self, metric: str) -> float:
        assert self.metrics is not None, f"{self.training.name} has no test clips"
        value = self.metrics[metric]
        return math.nan if value is None else value


@dataclass(frozen=True, eq=False)
class Workplace:
    """What all trainings of a run share."""

    clips: Clips
    labels: np.ndarray  # (n, C), by position
    metric: str
    cache: FeatureCache
    ranks: Ranks = field(default_factory=Ranks)
    folder: RunFolder | None = None
    board: Board | None = None
    after_epoch: Callable[[int, float], None] | None = None  # told how many heads had an epoch, and their loss

    def scores(self, module: nn.Module, training: Training, positions: np.ndarray) -> np.ndarray:
        """(n, C) of every one of these clips. Raises WhisperATError where a score is not finite."""
        scores = predict(module, self.clips, positions)
        if not np.isfinite(scores).all():
            raise self.not_finite(training, "scores of validation clips are not finite")
        return scores

    def evaluate(self, module: nn.Module, training: Training, positions: np.ndarray) -> Metrics:
        """Metrics over every one of these clips."""
        return evaluate_scores(self.scores(module, training, positions), self.labels[positions])

    @torch.no_grad()
    def attention(self, module: nn.Module, positions: np.ndarray) -> dict | None:
        """`attention_sums` of a TL-Tr on these clips; None of another head, or without clips."""
        if not isinstance(module, TLTr) or not len(positions):
            return None
        size = max(1, BATCH_BYTES // (4 * self.clips.features[0].numel()))
        batches = torch.from_numpy(positions).split(size)
        found = torch.cat([module.layer_attention(self.clips.batch(batch)).cpu() for batch in batches])
        return attention_sums(found, self.labels[positions])

    def not_finite(self, training: Training, what: str) -> WhisperATError:
        """The error for a training with numbers that are not finite, which either came with the features or from it."""
        positions = torch.from_numpy(np.concatenate([training.train, training.test]))
        for some in positions.split(FINITE_CLIPS):
            finite = self.clips.batch(some).isfinite().flatten(1).all(dim=1).cpu()
            if not finite.all():
                clip = self.cache.ids[self.clips.rows[some[finite.int().argmin()]]]
                return WhisperATError(
                    f"the features of clip {str(clip)!r} in {self.cache.path} are not finite; see which others are "
                    f"damaged with: whisper-at-cli verify {self.cache.path}"
                )
        return WhisperATError(f"{what}: the training diverged; lower --lr, which is {training.recipe.lr:g}")


def train_group(
    trainings: list[Training], place: Workplace, new_module: Callable[[], Head], group: str
) -> list[Trained]:
    """Train heads of one form side by side, from the last epoch that `group` saved in the run's folder.

    Their recipes may differ in learning rate and seed. Raises WhisperATError on a loss that is not finite.
    """
    course = _Course(trainings, place, new_module, group)
    recipe = trainings[0].recipe
    small = recipe.batch_size * len(trainings) * place.clips.features[0].numel() <= SMALL_BATCH
    with one_thread_per_operation(small and place.clips.device.type == "cpu"):
        while course.epoch < recipe.epochs and not course.stopped.all():
            course.next_epoch()
    return course.trained()


class _Course:
    """Trainings of one group on their way."""

    def __init__(self, trainings: list[Training], place: Workplace, new_module: Callable[[], Head], group: str):
        self.trainings, self.place, self.group = trainings, place, group
        modules = [_new_module(training, new_module) for training in trainings]
        if trainings[0].recipe.standardise:
            for module, training in zip(modules, trainings, strict=True):
                module.standardise(*layer_statistics(place.clips, training.train, last_layer=module.last_layer))
        self.fleet = Fleet(modules, trainings[0].recipe, place.clips.device)
        self.epoch = 0  # that is done
        self.stopped = np.zeros(len(trainings), dtype=bool)
        self.best: list[tuple[float, int]] = [(-math.inf, 0)] * len(trainings)  # validation metric, and its epoch
        self.history: list[list[dict]] = [[] for _ in trainings]
        self.weights = [self._weights(training) for training in trainings]
        self.steps = [training.recipe.steps(len(training.train)) for training in trainings]  # of the whole run
        hidden = self.fleet.module.standard_mean if len(modules) == 1 else None
        self.epochs = Epochs(place.clips, trainings[0].recipe, place.ranks, hidden=hidden)
        self._resume()

    def _weights(self, training: Training) -> np.ndarray | None:
        return balancing_weights(self.place.labels[training.train]) if training.recipe.class_balanced else None

    def next_epoch(self) -> None:
        """Train for one epoch and do all that follows its end."""
        self.epoch += 1
        before = self.stopped.copy()
        recipe = self.trainings[0].recipe
        seed = drawn_seed(*self._seed(self.epoch), self.place.ranks.rank)  # of dropout, in each process another
        with random_numbers(seed, self.fleet.device):
            lines = self._train()
        if recipe.averages(self.epoch):
            self.fleet.take_into_average(~before)
        if recipe.validate_every and self.epoch % recipe.validate_every == 0:
            self._validate(lines, before)
        shown = [line for line, out in zip(lines, before, strict=True) if not out]
        for history, line, out in zip(self.history, lines, before, strict=True):
            history.extend([line] * (not out))
        self._record(shown)
        self._tell(float(np.mean([line["loss"] for line in shown])))

    def _train(self) -> list[dict]:
        """All steps of an epoch. Gives each head's line for the records."""
        place, fleet, started, waited = self.place, self.fleet, time.monotonic(), 0.0
        recipe = self.trainings[0].recipe
        draws = self._draws(self.epoch)
        losses: list[Tensor] = []
        rates = np.zeros(len(fleet))
        taken = [max(1, -(-len(draw) // recipe.batch_size)) if draw else 1 for draw in draws]
        for batch in self.epochs.batches(draws, self._seed(self.epoch)):
            waited += batch.waited
            if len(losses) == max(taken) // 2 and self.epoch < recipe.epochs:
                self.epochs.read_ahead(self._draws(self.epoch + 1), self._seed(self.epoch + 1))
            rates = self._rates()
            losses.append(fleet.step(batch, rates, place.ranks))
        loss = (place.ranks.sum_(torch.stack(losses).sum(dim=0)).cpu().numpy() / taken).tolist()
        seconds = time.monotonic() - started
        for training, value in zip(self.trainings, loss, strict=True):
            if not math.isfinite(value):
                raise place.not_finite(training, f"the loss became {value} in epoch {self.epoch}")
        return [
            {
                "training": training.name, "seed": training.recipe.seed, "fold": training.number, "epoch": self.epoch,
                "lr": rates[m], "loss": loss[m], "samples": len(draw) if draw else 0,
                "seconds": seconds / len(fleet), "waiting_seconds": waited / len(fleet),
            }
            for m, (training, draw) in enumerate(zip(self.trainings, draws, strict=True))
        ]  # fmt: skip

    def _rates(self) -> np.ndarray:
        """(M,) learning rates of the step to come."""
        steps = self.fleet.steps.tolist()
        return np.array(
            [
                training.recipe.learning_rate(self.epoch, taken, in_all)
                for training, taken, in_all in zip(self.trainings, steps, self.steps, strict=True)
            ]
        )

    def _seed(self, epoch: int) -> tuple[int, ...]:
        return (self.trainings[0].recipe.seed, self.trainings[0].number, epoch)

    def _draws(self, epoch: int) -> list[Draw | None]:
        return [
            None if stopped else self._draw(training, weights, epoch)
            for training, weights, stopped in zip(self.trainings, self.weights, self.stopped, strict=True)
        ]

    def _draw(self, training: Training, weights: np.ndarray | None, epoch: int) -> Draw:
        rng = np.random.default_rng([training.recipe.seed, training.number, epoch])
        clips = self.place.clips
        return draw_epoch(
            training.train, training.recipe, rng, frames=clips.frames, layers=clips.layers, weights=weights
        )

    def _validate(self, lines: list[dict], before: np.ndarray) -> None:
        """Each head as it is now, on its test clips for the curve, or with patience on the clips that it watches; heads
        that have not improved on these for long stop."""
        patience, better = self.trainings[0].recipe.patience, np.zeros(len(lines), dtype=bool)
        for m, training in enumerate(self.trainings):
            seen = training.watched if patience else training.test
            if before[m] or not len(seen):
                continue
            metrics = self.place.evaluate(self.fleet.head(m, final=False), training, seen)
            value = getattr(metrics, self.place.metric)
            lines[m] |= {} if math.isnan(value) else {self.place.metric: value}
            if value > self.best[m][0]:
                self.best[m], better[m] = (value, self.epoch), True
            elif patience and self.epoch - self.best[m][1] >= patience:
                self.stopped[m] = True
        if patience:
            self.fleet.keep_as_best(better)

    def _record(self, lines: list[dict]) -> None:
        place = self.place
        if place.folder is None:
            return
        place.folder.append_metrics(lines)
        if place.board:
            for line in lines:
                place.board.add(line)
        place.folder.save_state(
            self.group, self.fleet.state,
            {
                "names": [training.name for training in self.trainings], "epoch": self.epoch,
                "stopped": self.stopped.tolist(), "best": self.best, "history": self.history,
            },
        )  # fmt: skip

    def _resume(self) -> None:
        """Go on from where an earlier call stopped; the first process reads, all continue."""
        ranks, folder = self.place.ranks, self.place.folder
        found = ranks.from_lead(folder.load_state(self.group) if folder else None)
        if found is None or found[1]["names"] != [training.name for training in self.trainings]:
            return
        tensors, record = found
        self.fleet.load_state(tensors)
        self.epoch, self.history = record["epoch"], record["history"]
        self.stopped = np.array(record["stopped"], dtype=bool)
        self.best = [tuple(best) for best in record["best"]]
        if folder:
            lines = [line for history in self.history for line in history]
            folder.append_metrics(sorted(lines, key=lambda line: line["epoch"]))
        for _ in range(self.epoch):
            self._tell(math.nan)

    def _tell(self, loss: float) -> None:
        if self.place.after_epoch:
            self.place.after_epoch(len(self.fleet), loss)

    def trained(self) -> list[Trained]:
        """The heads with their final weights, validated."""
        done = []
        for m, training in enumerate(self.trainings):
            history = self.history[m]
            record = {
                "epochs": len(history), "history": history,
                **{name: sum(line[name] for line in history) for name in ("samples", "seconds", "waiting_seconds")},
            }  # fmt: skip
            done.append(validated(training, record, self.fleet.head(m), self.place))
        return done


def solve_group(trainings: list[Training], place: Workplace, new_module: Callable[[], Head]) -> list[Trained]:
    """Heads that are solved, one after another."""
    done = []
    for training in trainings:
        module = new_module()
        assert isinstance(module, ConcatLinear), "there is no other solved head"
        fitted = fit(
            module, place.clips, place.labels, training.train, list(training.inner), training.recipe.loss,
            standardise=training.recipe.standardise,
        )  # fmt: skip
        record = {"epochs": 0, "history": [], "samples": len(training.train), "waiting_seconds": 0.0, **fitted}
        done.append(validated(training, record, module.to(place.clips.device), place))
        if place.after_epoch:
            place.after_epoch(1, math.nan)
    return done


def validated(training: Training, record: dict, module: Head, place: Workplace) -> Trained:
    """A head that is done, with what it says of its test clips and which layers it looks at."""
    scores = place.scores(module, training, training.test) if len(training.test) else None
    metrics = None if scores is None else evaluate_scores(scores, place.labels[training.test])
    record |= {
        "metrics": _plain(metrics),
        "layer_weights": layer_weights(module),
        "class_attention": place.attention(module, training.test),
    }
    return Trained(training, record, module, scores)


def _new_module(training: Training, new_module: Callable[[], Head]) -> Head:
    """A head whose first weights the training's seed and number decide; the caller's random numbers are left alone."""
    with random_numbers(drawn_seed(training.recipe.seed, training.number)):
        return new_module()


def drawn_seed(*numbers: int) -> int:
    """A seed for torch that these numbers decide."""
    return int(np.random.default_rng(numbers).integers(2**62))


def _plain(metrics: Metrics | None) -> dict | None:
    """The numbers of an evaluation that stand in a fold's line of the result."""
    if metrics is None:
        return None
    found = asdict(metrics)
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in found.items()
        if isinstance(value, float | int)
    }
