"""The file of step records, read while another process writes it, and cuts it back where it resumes."""

from dataclasses import dataclass
from pathlib import Path

from services.training.records import StepRecord


@dataclass(frozen=True, slots=True)
class News:
    """Records that are new. Where earlier ones were removed, `back_to` is the last step that still counts."""

    new: tuple[StepRecord, ...]
    back_to: int | None = None
    kept: tuple[StepRecord, ...] = ()  # with back_to: records up to there


class Tail:
    """Reads on from where it was. Nothing is kept open: a file may be replaced by one of the same name at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0  # of the first line that was not seen
        self._last = b""  # line seen before it
        self._seen: list[int] = []  # hashes of all lines seen

    def read(self) -> News:
        """What is new since the last call; nothing where the file cannot be read just now.

        A file is the one seen before when it has the last line seen in its place: lines hold times, so that of a step
        that was made again differs.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset - len(self._last))
                raw = file.read()
                grown = raw.startswith(self._last)
                if not grown:
                    file.seek(0)
                    raw = file.read()
        except OSError:
            return News(())
        if grown:
            return News(_records(self._take(raw.removeprefix(self._last))))
        return self._replaced(raw)

    def _replaced(self, raw: bytes) -> News:
        seen = self._seen
        self._offset, self._last, self._seen = 0, b"", []
        lines = self._take(raw)
        pairs = zip(seen, self._seen, strict=False)
        same = next((at for at, (before, now) in enumerate(pairs) if before != now), min(len(seen), len(lines)))
        kept, new = _records(lines[:same]), _records(lines[same:])
        return News(new, back_to=kept[-1].step if kept else 0, kept=kept)

    def _take(self, raw: bytes) -> list[bytes]:
        """Whole lines; one that is being written waits."""
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = [line + b"\n" for line in whole.split(b"\n")[:-1]]
        if lines:
            self._offset += len(whole)
            self._last = lines[-1]
            self._seen.extend(map(hash, lines))
        return lines


def _records(lines: list[bytes]) -> tuple[StepRecord, ...]:
    """A line that is none is left to the writer, who refuses it when the run resumes."""
    records = []
    for line in lines:
        try:
            records.append(StepRecord.from_json(line))
        except ValueError:
            continue
    return tuple(records)
