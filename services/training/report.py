"""What a training run leaves for its reader: figures of every step, TensorBoard's files, and two plots."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.snapshots.errors import SnapshotError
from services.training.event_file import EventFile
from services.training.expert_loads import LOADS, ExpertLoads
from services.training.metrics_file import MetricsFile, read_records
from services.training.records import METRICS, StepRecord
from services.training.run_plots import draw_experts, draw_loss

if TYPE_CHECKING:
    from torch import Tensor

EVENTS = "tensorboard"
LOSS_PLOT, EXPERTS_PLOT = "loss.svg", "experts.svg"


class RunLogError(ValueError):
    """What was given to the log is not the run's next step, or the log cannot be written."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Plots that were written; `note`, one line, says why some were not."""

    files: tuple[Path, ...]
    note: str | None = None


class RunLog:
    """One writer for a run: that of worker 0. A run that resumes opens another on the same directory.

    OUTPUT_DIR/
      metrics.jsonl    a StepRecord a line, of every step that counts
      loads.json       rows of each expert, at the newest checkpoints
      tensorboard/     the same figures
      loss.svg, experts.svg
    """

    def __init__(self, output_dir: Path, resumed_at: int, layers: Sequence[int] = ()) -> None:
        """Records of steps after `resumed_at` are removed, and loads are those of its checkpoint, or of one before it.

        Layers are the numbers of those that have experts, for the plot; without them they are counted from 0.
        Raises ValueError when what lies there is not a run's log, or cannot be written.
        """
        if resumed_at < 0:
            raise RunLogError(f"resumed_at is {resumed_at}; expected the number of steps made, 0 or more")
        self._directory = output_dir
        self._layers = layers
        self._step = resumed_at
        self._drawn: Drawn | None = None
        with self._writing():
            output_dir.mkdir(parents=True, exist_ok=True)
            self._loads = ExpertLoads(output_dir / LOADS, resumed_at)
            self._metrics = MetricsFile(output_dir / METRICS, resumed_at)
            self._events = EventFile(output_dir / EVENTS, resumed_at)

    def append(self, record: StepRecord, rows_LE: "Tensor") -> None:
        """Log the next step; rows_LE: int64 [layers, experts], a copy is taken.

        Raises RunLogError when it is another step or cannot be written, ValueError for rows of other experts.
        """
        if record.step != self._step + 1:
            raise RunLogError(f"step {record.step} is logged after step {self._step}; expected {self._step + 1}")
        if self._layers and len(rows_LE) != len(self._layers):
            raise RunLogError(f"rows are of {len(rows_LE)} layers; expected {len(self._layers)}, those with experts")
        self._loads.add(rows_LE.cpu().numpy())
        self._step = record.step
        with self._writing():
            self._metrics.append(record)
            self._events.append(record)

    def checkpoint(self, step: int) -> None:
        """Put on disk what a run that resumes at `step`, the last one logged, goes on from; before its snapshot counts.

        Raises RunLogError or SnapshotError when it cannot be written.
        """
        if step != self._step:
            raise RunLogError(f"checkpoint of step {step} after step {self._step} was logged; expected them to agree")
        with self._writing():
            self._metrics.sync()
        self._loads.save(step)

    def draw(self) -> Drawn:
        """Write the plots of what is logged so far. What hinders that, matplotlib missing for one, is noted.

        Raises ValueError when somebody wrote something else to metrics.jsonl.
        """
        records = read_records(self._metrics.path)
        if not records:
            return Drawn((), "no plots were drawn: no step was made")
        loss, experts = self._directory / LOSS_PLOT, self._directory / EXPERTS_PLOT
        counted = self._loads.counted
        try:
            draw_loss(records, loss)
            if counted is None or not counted.rows_LE.size:
                return Drawn((loss,))
            draw_experts(counted, self._layers or range(len(counted.rows_LE)), experts)
        except ImportError as error:
            why = f"{error}; `pip install matplotlib`; {METRICS} has the figures"
            return Drawn((), f"{LOSS_PLOT} and {EXPERTS_PLOT} were not drawn: {why}")
        except SnapshotError as error:
            return Drawn((), f"plots were not drawn: {error}")
        return Drawn((loss, experts))

    def close(self) -> Drawn:
        """Close the files and draw the plots; what is logged is kept if that raises. May be repeated."""
        if self._drawn is None:
            with self._writing():
                self._metrics.close()
                self._events.close()
            self._drawn = self.draw()
        return self._drawn

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunLogError(
                f"the log in {self._directory} cannot be written: {error.strerror}; see to it, then resume"
            ) from error
