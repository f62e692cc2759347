"""How a run ended is told whole, lastingly, or not at all."""

import os
import stat
from pathlib import Path

import pytest

from services.training.outcome import DONE, Outcome, begin_outcome, read_outcome, write_outcome


def test_an_outcome_is_read_as_it_was_written_until_it_is_forgotten(tmp_path: Path) -> None:
    for outcome in (Outcome(4, "model", identity={"data": "d"}), Outcome(failed="no room")):
        write_outcome(tmp_path, outcome)
        assert read_outcome(tmp_path) == outcome
    begin_outcome(tmp_path)
    assert read_outcome(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("raw", [b"", b'{"steps": 4, "resu', b"[]", b"null", b'{"steps": "four"}', b"\xff\xfe"])
def test_what_a_crash_left_of_an_outcome_is_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / DONE).write_bytes(raw)
    assert read_outcome(tmp_path) is None
    write_outcome(tmp_path, Outcome(3))
    assert read_outcome(tmp_path) == Outcome(3)


def test_an_outcome_is_on_disk_before_it_has_its_name_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def note_sync(handle: int) -> None:
        done.append("directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    def note_rename(source: Path, target: Path) -> None:
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    write_outcome(tmp_path, Outcome(3))
    assert done == ["file", "rename", "directory"]
