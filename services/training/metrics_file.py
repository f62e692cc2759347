"""The file of step records: read, cut back where steps are made again, and appended to."""

import os
from dataclasses import dataclass
from pathlib import Path

from model.snapshots import disk
from services.training.records import StepRecord

BEGINNING = b'{"step": '


@dataclass(frozen=True, slots=True)
class _Line:
    raw: bytes
    record: StepRecord


class MetricsFile:
    """Open for one life of a run; whoever reads beside it sees whole records, but for the last."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        """Records of later steps are removed, all at once: those steps are made again.

        The file is written anew even where nothing is removed: a writer of an earlier life that is still there keeps
        the old one, which nobody reads. Raises ValueError for a line that is no record, and SnapshotError when the
        file cannot be written; it stays as it was then.
        """
        kept = [line.raw + b"\n" for line in _lines(path) if line.record.step <= resumed_at]
        disk.write_file(path, kept, sum(map(len, kept)))
        self.path = path
        self._file = path.open("ab")

    def append(self, record: StepRecord) -> None:
        """Raises OSError when there is no room; the next call completes what was written of the line."""
        self._file.write(record.to_json().encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Everything is on disk when it returns."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[StepRecord]:
    """In the file's order; none where it does not exist. Raises ValueError for a line that is no record."""
    return [line.record for line in _lines(path)]


def _lines(path: Path) -> list[_Line]:
    try:
        *whole, last = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    lines = []
    for number, raw in enumerate([*whole, last], 1):
        if not raw.strip():
            continue
        try:
            lines.append(_Line(raw, StepRecord.from_json(raw)))
        except ValueError as error:
            if number > len(whole) and _is_half(raw):
                continue
            raise ValueError(
                f"{path}, line {number}, is no record of a step ({error}): mend it, or move the file away"
            ) from error
    return lines


def _is_half(raw: bytes) -> bool:
    """Whether it is what a crash leaves of a record; after a power cut, with zeros for what was not written."""
    half = raw.rstrip(b"\0")
    return half[: len(BEGINNING)] == BEGINNING[: len(half)]
