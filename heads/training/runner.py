"""Trains what a run consists of, keeps what is done, and goes on with a run that was stopped."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.heads.training.board import Board
from whisper_at_cli.heads.training.curve import draw_curve
from whisper_at_cli.heads.training.data import Clips, load_clips
from whisper_at_cli.heads.training.distill import with_teachers
from whisper_at_cli.heads.training.loop import Trained, Training, Workplace, solve_group, train_group
from whisper_at_cli.heads.training.plan import Job
from whisper_at_cli.heads.training.ranks import Ranks
from whisper_at_cli.heads.training.records import RunFolder
from whisper_at_cli.heads.training.result import TrainResult


class Runner:
    """Trains what a run consists of, group by group, and keeps what is done; clips are read when first needed."""

    def __init__(self, ranks: Ranks, folder: RunFolder | None, board: Board | None, progress: Progress | None):
        self.ranks, self.folder, self.board, self.progress = ranks, folder, board, progress
        self.finished = ranks.from_lead(folder.finished if folder else {})
        self.epochs_done = self.epochs = self.groups = 0
        self._clips: Clips | None = None
        if folder:
            folder.keep_metrics([line for record in self.finished.values() for line in record["history"]])

    def expect(self, trainings: list[Training], also: int = 0) -> None:
        """How much there is to do, for the progress."""
        self.epochs += sum(training.recipe.epochs for training in trainings) + also * trainings[0].recipe.epochs

    def train(
        self,
        trainings: list[tuple[Job, Training]],
        together: str,
        save: Callable[[Job, Trained], None] | None = None,
        *,
        keep_scores: bool = False,
    ) -> list[Trained]:
        """All these trainings, those of one job in groups side by side where that is faster; what an earlier call
        finished is not done again. The first process saves each by `save`, and with `keep_scores` what it says of
        held-out clips."""
        done: dict[int, Trained] = {}
        for job in dict.fromkeys(job for job, _ in trainings):
            places = [place for place, (own, _) in enumerate(trainings) if own is job]
            size = job.heads_side_by_side(together)
            for start in range(0, len(places), size):
                some = places[start : start + size]
                group = self._train_group(job, [trainings[place][1] for place in some], save, keep_scores)
                done |= zip(some, group, strict=True)
        return [done[place] for place in range(len(trainings))]

    def _train_group(
        self, job: Job, group: list[Training], save: Callable[[Job, Trained], None] | None, keep_scores: bool
    ) -> list[Trained]:
        self.groups += 1
        if all(training.name in self.finished for training in group):
            self._after_epoch(sum(training.recipe.epochs for training in group), math.nan)
            return [self._finished(training) for training in group]
        name, place = f"group-{self.groups}", self._place(job)
        if job.teachers:
            place = self._taught(place, job, *group)
        if job.solved:
            trained = solve_group(group, place, job.new_module)
        else:
            trained = train_group(group, place, job.new_module, name)
        if self.folder:
            for each in trained:
                if save:
                    save(job, each)
                if keep_scores and each.scores is not None:
                    self.folder.save_scores(each.training.name, each.scores)
            self.folder.finish({each.training.name: each.record for each in trained}, name)
        return trained

    def _finished(self, training: Training) -> Trained:
        """A training that an earlier call finished."""
        scores = self.folder.load_scores(training.name) if self.folder else None
        return Trained(training, self.finished[training.name], scores=self.ranks.from_lead(scores))

    def finish(self, result: TrainResult, done: list[Trained]) -> None:
        """The run is over: its curve and its result."""
        if self.folder is None:
            return
        lines = [line for each in done for line in each.record["history"]]
        finals = {each.training.name: each.value(result.metric) for each in done if each.metrics}
        if result.curve:
            draw_curve(lines, finals, result.metric, self.folder.path / "curve.png", title=result.head)
        if result.search:
            self.folder.write("search.json", (json.dumps(result.search, indent=1) + "\n").encode())
        self.folder.finish_all(dataclasses.asdict(result))

    def _place(self, job: Job) -> Workplace:
        """Where trainings of this job happen; its clips are read now, and kept for jobs that read the same."""
        if self._clips is None:
            processes = self.ranks.here
            self._clips = load_clips(
                job.cache, job.rows, job.reads, job.device, job.tier, processes=processes, labels=job.labels
            )
        return Workplace(
            self._clips, job.labels, job.metric, job.cache, self.ranks, self.folder, self.board, self._after_epoch
        )

    def _taught(self, place: Workplace, job: Job, training: Training) -> Workplace:
        """A place whose clips have the targets that a job's teachers give for one training."""
        assert job.teachers, "asked only where there are"
        clips = with_teachers(
            place.clips, place.labels, job.teachers, training.number, training.train, training.test, cache=job.cache,
            loss=training.recipe.loss,
        )  # fmt: skip
        return dataclasses.replace(place, clips=clips)

    def _after_epoch(self, heads: int, loss: float) -> None:
        self.epochs_done += heads
        if self.progress and self.ranks.lead:
            self.progress(self.epochs_done, self.epochs, "" if math.isnan(loss) else f"loss {loss:.4f}")


@contextmanager
def open_run(
    job: Job, ranks: Ranks, out: str | Path | None, more: dict, *, restart: bool, tensorboard: bool,
    progress: Progress | None,
) -> Iterator[Runner]:  # fmt: skip
    """A runner with a hold on the folder `out`, if one is given and this is the first process."""
    folder = board = None
    try:
        if out and ranks.lead:
            folder = RunFolder(out, job.command() | more, restart=restart)
            board = Board(folder.path / "tensorboard") if tensorboard else None
        yield Runner(ranks, folder, board, progress)
    finally:
        for opened in (board, folder):
            if opened:
                opened.close()
