"""The training loop of one worker, without Ray: steps, snapshots, going back, and what is written of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from attention.training.ranks import Ranks
from attention.training.worker import NotFinite, Placements, StepPlan, StepReport, TrainingWorker
from experts.errors import ExpertError
from experts.training.client import TrainingClient
from experts.training.coordinator import Coordinator
from experts.training.step_hosts import StepLost
from model.snapshots.errors import SnapshotError
from model.snapshots.snapshot import Snapshot
from services.training.data.training_data import GlobalBatch, TrainingData
from services.training.keeper import Keeper
from services.training.plans import plan_step
from services.training.recipe import Recipe
from services.training.schedule import batch_tokens

MAX_SETBACKS = 8  # steps lost, without one made that was not made before


@dataclass(frozen=True, slots=True)
class Made:
    """A step that was made, for whoever keeps records."""

    steps: int  # made so far
    report: StepReport
    learning_rate: float
    tokens: int
    targets: int
    seconds: float
    epoch: float
    hosts: int


class Records(Protocol):
    """What is written of a run, by worker 0."""

    def made(self, made: Made) -> None: ...

    def resumed(self, steps: int) -> None:
        """Steps after this one are made again."""

    def keeping(self, steps: int) -> None:
        """A snapshot of this step is begun. Raises ValueError where it could not be resumed from."""


class TooManySetbacks(RuntimeError):
    """A run went back again and again, and never got beyond where it had been."""


class Run:
    """One worker's; all workers of a run go through it in step."""

    def __init__(
        self,
        recipe: Recipe,
        steps: int,
        data: TrainingData,
        ranks: Ranks,
        worker: TrainingWorker,
        client: TrainingClient,
        keeper: Keeper,
        placements: Placements,
        coordinator: Coordinator | None,
        reset: Callable[[], None],
        records: Records | None,
        should_stop: Callable[[], bool],
        tell: Callable[[str], None],
        device: str = "cpu",
    ) -> None:
        """`reset` puts the dense side back to the run's beginning; worker 0 asks `should_stop` after each step."""
        self._recipe = recipe
        self._steps = steps
        self._data = data
        self._ranks = ranks
        self._worker = worker
        self._client = client
        self._keeper = keeper
        self._placements = placements
        self._coordinator = coordinator
        self._reset = reset
        self._records = records
        self._should_stop = should_stop
        self._tell = tell
        self._device = device

    def train(self) -> int:
        """Train from the newest snapshot, or the beginning, to the end or until told to stop; steps made.

        Raises NotFinite, SnapshotError, and TooManySetbacks.
        """
        step, cursor = self.restore()
        setbacks, furthest = 0, step
        while step < self._steps:
            batch = self._data.batch(cursor, batch_tokens=batch_tokens(self._recipe.stages, step))
            started_s = time.monotonic()
            try:
                report = self._worker.step(self._plan(step, batch))
            except NotFinite:
                self._finish_snapshot()  # of an earlier step, which was sound
                raise
            except StepLost as lost:
                setbacks += 1
                self._keeper.finish()  # of an earlier step, and may be whole all the same
                if setbacks > MAX_SETBACKS:
                    raise TooManySetbacks(
                        f"step {furthest} was not made in {setbacks} tries, the last of which lost step {step}: {lost}"
                    ) from lost
                self._tell(f"step {step} is lost ({lost}); going back to the last snapshot")
                step, cursor = self.restore()
                continue
            self._keeper.finish()  # of an earlier step: this one waited until it was written
            step, cursor = step + 1, batch.cursor_after
            if step > furthest:
                setbacks, furthest = 0, step
            self._record(step, report, batch, time.monotonic() - started_s)
            stopping = self._agree_to_stop()
            kept = self._recipe.snapshots
            if stopping or step % kept.every_steps == 0 or (step == self._steps and kept.at_end):
                self._keeper.start(self._client.hosts, step, cursor, {"epoch": batch.epoch}, self._keep_records(step))
            if stopping:
                break
        self._finish_snapshot()
        return step

    def _finish_snapshot(self) -> None:
        self._keeper.settle()
        self._keeper.finish()

    def _keep_records(self, step: int) -> str:
        """Why a run that resumes at this step could not go on with its records; nothing where it can."""
        try:
            if self._records is not None:
                self._records.keeping(step)
        except ValueError as error:  # a full disk, say, which costs the snapshot and no more
            return str(error)
        return ""

    def restore(self) -> tuple[int, int]:
        """Go to the newest snapshot, or the beginning, on the hosts and here; steps made and the data's cursor."""
        snapshot = self._keeper.newest()
        lost = ""
        if self._coordinator is not None:
            try:
                self._restore_hosts(self._coordinator, snapshot)
            except ExpertError as error:
                lost = str(error)
        lost = self._ranks.gather(lost)[0]
        if lost:
            raise TooManySetbacks(f"the expert hosts cannot be brought back: {lost}")
        step, cursor = 0, 0
        if snapshot is None:
            self._reset()
        else:
            self._keeper.restore_dense(snapshot)
            step, cursor = snapshot.manifest.step, _cursor(snapshot)
            self._check_place(snapshot, step, cursor)
        if self._records is not None:
            self._records.resumed(step)
        return step, cursor

    def _check_place(self, snapshot: Snapshot, step: int, cursor: int) -> None:
        """A run by epochs ends where its batches say, so it can only go on from where they lead."""
        if step > self._steps:
            raise SnapshotError(
                f"{snapshot.directory} is of step {step} and the recipe has {self._steps} steps: raise them, or give "
                "another output_dir"
            )
        if self._recipe.epochs is None:
            return
        leads = 0
        for made in range(step):
            leads = self._data.after(leads, batch_tokens(self._recipe.stages, made))
        if leads != cursor:
            raise SnapshotError(
                f"{snapshot.directory} has seen {cursor} samples in {step} steps, where this recipe has seen {leads}: "
                "with epochs, the batches and a fraction of an epoch stay as they were; give steps instead, or another "
                "output_dir"
            )

    def _restore_hosts(self, coordinator: Coordinator, snapshot: Snapshot | None) -> None:
        placement = self._placements.newest(wait=False)
        while True:
            try:
                if snapshot is None:
                    coordinator.restart(placement)
                else:
                    coordinator.load(placement, snapshot.directory)
            except Coordinator.LOST as error:
                self._tell(f"waiting for the expert hosts: {error}")
                placement = self._placements.newest(wait=True)
            else:
                return

    def _plan(self, step: int, batch: GlobalBatch) -> StepPlan:
        recipe = self._recipe
        return plan_step(
            step,
            batch,
            self._ranks.rank,
            self._ranks.world,
            recipe.micro_batch_tokens,
            recipe.learning_rate.at(step, self._steps),
            recipe.seed if recipe.drop_tokens else None,
            self._device,
        )

    def _record(self, step: int, report: StepReport, batch: GlobalBatch, seconds: float) -> None:
        if self._records is not None:
            rate = self._recipe.learning_rate.at(step - 1, self._steps)
            tokens = sum(len(row.token_T) for row in batch.rows)
            hosts = len(self._client.hosts.alive())
            self._records.made(Made(step, report, rate, tokens, batch.targets, seconds, batch.epoch, hosts))

    def _agree_to_stop(self) -> bool:
        wanted = "stop" if self._ranks.rank == 0 and self._should_stop() else ""
        return self._ranks.gather(wanted)[0] == "stop"


def _cursor(snapshot: Snapshot) -> int:
    cursor = snapshot.manifest.position["cursor"]
    assert isinstance(cursor, int)
    return cursor
