"""What worker 0 writes of each step."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from model.config import ModelConfig
from router.losses import load_imbalance
from services.training.records import StepRecord
from services.training.report import RunLog, RunLogError
from services.training.run import Made


class RunRecords:
    """Records of a run, in its output directory; it must be told where the run goes on before a step is made.

    `resumed` and `made` raise RunLogError when they cannot be kept there.
    """

    def __init__(self, output_dir: Path, config: ModelConfig, workers: int, tell: Callable[[str], None]) -> None:
        self._output_dir = output_dir
        self._config = config
        self._workers = workers
        self._tell = tell
        self._log: RunLog | None = None

    def resumed(self, steps: int) -> None:
        self.close()
        with _as_log_error():
            self._log = RunLog(self._output_dir, steps, self._config.moe_layers)

    def made(self, made: Made) -> None:
        report = made.report
        loads = [load_imbalance(rows, self._config).expert for rows in report.rows_LE.tolist()]
        assert self._log is not None
        record = StepRecord(
            step=made.steps,
            loss=report.loss,
            balance=report.balance,
            lr=made.learning_rate,
            tokens=made.tokens,
            targets=made.targets,
            grad_norm=report.grad_norm,
            dropped=report.dropped / report.slots if report.slots else 0.0,
            tokens_per_s=made.tokens / made.seconds,
            seconds=made.seconds,
            epoch=made.epoch,
            imbalance=sum(loads) / len(loads) if loads else 1.0,
            hosts_lost=report.hosts_lost,
            workers=self._workers,
            hosts=made.hosts,
        )
        with _as_log_error():
            self._log.append(record, report.rows_LE)

    def keeping(self, steps: int) -> None:
        """A snapshot of this step is begun."""
        assert self._log is not None
        self._log.checkpoint(steps)

    def close(self) -> None:
        """Draw the curves, too."""
        if self._log is not None:
            note = self._log.close().note
            self._log = None
            if note:
                self._tell(note)


@contextlib.contextmanager
def _as_log_error() -> Iterator[None]:
    """What lies there may be another run's: that is no better the next time."""
    try:
        yield
    except RunLogError:
        raise
    except ValueError as error:
        raise RunLogError(str(error)) from error
