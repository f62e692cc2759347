"""TensorBoard's event files: a new one for each life of a run."""

import struct
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboardX.record_writer import masked_crc32c  # type: ignore[import-untyped]

from services.training.records import StepRecord

PREFIX = "events.out.tfevents."
TAGS = {
    "train/loss": "loss",
    "train/learning_rate": "lr",
    "train/gradient_norm": "grad_norm",
    "train/epoch": "epoch",
    "train/tokens": "tokens",
    "train/tokens_per_s": "tokens_per_s",
    "experts/balance_loss": "balance",
    "experts/imbalance": "imbalance",
    "experts/dropped": "dropped",
    "cluster/hosts": "hosts",
    "cluster/workers": "workers",
}


class EventFile:
    """Written at once, in the caller's thread: nothing waits in a queue when the process dies or the disk is full."""

    def __init__(self, directory: Path, resumed_at: int) -> None:
        """TensorBoard is told to forget what earlier files have of later steps.

        It reads the files in the order of their names, so they are numbered: clocks of different machines differ.
        """
        directory.mkdir(parents=True, exist_ok=True)
        last_parts = [path.name.rpartition(".")[2] for path in directory.glob(f"{PREFIX}*")]
        number = 1 + max((int(part) for part in last_parts if part.isdecimal()), default=0)
        self._file = (directory / f"{PREFIX}{number:010d}").open("xb")
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=resumed_at + 1, session_log=SessionLog(status=SessionLog.START)))

    def append(self, record: StepRecord) -> None:
        """Raises OSError when there is no room."""
        values = [Summary.Value(tag=tag, simple_value=getattr(record, name)) for tag, name in TAGS.items()]
        self._write(Event(step=record.step, summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        """As TFRecord frames it: length, its checksum, data, their checksum."""
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(length + _checksum(length) + data + _checksum(data))
        self._file.flush()


def _checksum(part: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(part))
