"""A disk as a power cut may leave it: told of every change, it knows what was synced and what was not."""

import itertools
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class File:
    content: bytes = b""
    synced: bytes = b""


@dataclass
class Directory:
    entries: dict[str, "File | Directory"] = field(default_factory=dict)
    synced: dict[str, "File | Directory"] = field(default_factory=dict)

    def write(self, at: Path, root_synced: bool, inner_synced: bool, depth: int = 0) -> None:
        """Make it at `at`, of synced contents, and of synced names where it is said so."""
        at.mkdir()
        entries = self.synced if (inner_synced if depth else root_synced) else self.entries
        for name, entry in entries.items():
            if isinstance(entry, Directory):
                entry.write(at / name, root_synced, inner_synced, depth + 1)
            else:
                (at / name).write_bytes(entry.synced)


@dataclass(frozen=True)
class Image:
    """What a cut may leave."""

    root: Directory
    root_synced: bool
    inner_synced: bool

    def write(self, at: Path) -> None:
        self.root.write(at, self.root_synced, self.inner_synced)


class SimulatedDisk:
    """Begins as `root` is, all of it synced."""

    def __init__(self, root: Path) -> None:
        self._at = root
        self._root = _load(root)
        self._states = [deepcopy(self._root)]

    def images(self) -> Iterator[tuple[int, Image]]:
        """After each number of changes, with none, some or all of the names lost that were not synced."""
        for change, state in enumerate(self._states):
            for root_synced, inner_synced in itertools.product((False, True), repeat=2):
                yield change, Image(state, root_synced, inner_synced)

    def before(self, _: int, call: str, *arguments: object) -> None:
        match call, arguments:
            case "open", (path, *_):
                self._parent(path).entries[Path(str(path)).name] = File()
            case "mkdir", (path, *_):
                self._parent(path).entries[Path(str(path)).name] = Directory()
            case "unlink" | "rmdir", (path,):
                del self._parent(path).entries[Path(str(path)).name]
            case "rename", (path, target):
                moved = self._parent(path).entries.pop(Path(str(path)).name)
                self._parent(target).entries[Path(str(target)).name] = moved
            case "write", (int(handle), bytes() | memoryview() as chunk):
                file = self._find(_path(handle))
                assert isinstance(file, File)
                file.content += bytes(chunk)
            case "fsync", (int(handle),):
                match self._find(_path(handle)):
                    case File() as file:
                        file.synced = file.content
                    case Directory() as directory:
                        directory.synced = dict(directory.entries)
            case unknown:
                raise AssertionError(unknown)
        self._states.append(deepcopy(self._root))

    def _parent(self, path: object) -> Directory:
        parent = self._find(Path(str(path)).parent)
        assert isinstance(parent, Directory)
        return parent

    def _find(self, path: Path) -> File | Directory:
        found: File | Directory = self._root
        for name in path.relative_to(self._at).parts:
            assert isinstance(found, Directory)
            found = found.entries[name]
        return found


def _path(handle: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{handle}"))


def _load(path: Path) -> Directory:
    entries: dict[str, File | Directory] = {}
    for entry in path.iterdir():
        entries[entry.name] = _load(entry) if entry.is_dir() else File(entry.read_bytes(), entry.read_bytes())
    return Directory(entries, dict(entries))
