"""All samples of a data set, back to back in memory: five bytes a token."""

import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from services.training.data.rendering import Tokens

RENDERING = b"shoal samples 1\n"  # renamed when the same files shall count as other data
ARRAYS = ("ids", "mask", "ends", "lines", "sources")  # as a file has them


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Token ids, int32; whether each is learned; the line it came from, and the index of that line's file."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    line: int
    source: int

    @property
    def targets(self) -> int:
        """Learned tokens that something precedes: the first has nothing to be predicted from."""
        return int(np.count_nonzero(self.mask[1:]))


class SampleSet:
    """Immutable; `length_S` are the samples' lengths, int64."""

    def __init__(
        self,
        ids_T: NDArray[np.int32],
        mask_T: NDArray[np.bool_],
        end_S: NDArray[np.int64],
        line_S: NDArray[np.int64],
        source_S: NDArray[np.int64],
    ) -> None:
        """All tokens back to back, whether each is learned, and for each sample where it ends and came from."""
        self._ids, self._mask, self._ends, self._lines, self._sources = ids_T, mask_T, end_S, line_S, source_S
        self.length_S: NDArray[np.int64] = np.diff(self._ends, prepend=np.int64(0))
        for values in (self._ids, self._mask, self._ends, self.length_S):
            values.flags.writeable = False

    @classmethod
    def open(cls, path: Path) -> "SampleSet":
        """What `save` wrote, mapped: a node's processes share the memory. Raises OSError where it cannot be read."""
        try:
            with safe_open(path, framework="pt") as file:
                return cls(*(file.get_tensor(name).numpy() for name in ARRAYS))
        except SafetensorError as error:
            raise OSError(f"{path} cannot be read: {error}") from error

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; raises OSError where it cannot be written."""
        arrays = (self._ids, self._mask, self._ends, self._lines, self._sources)
        partial = path.with_name(f"{path.name}.partial")
        try:
            save_file(dict(zip(ARRAYS, arrays, strict=True)), partial)
        except SafetensorError as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"{path} cannot be written: {error}") from error
        os.replace(partial, path)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Sample:
        """Views, not copies; raises IndexError outside 0 to len - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        end = int(self._ends[index])
        cut = slice(end - int(self.length_S[index]), end)
        return Sample(self._ids[cut], self._mask[cut], int(self._lines[index]), int(self._sources[index]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    @property
    def tokens(self) -> int:
        return len(self._ids)

    def fingerprint(self) -> str:
        """SHA-256 over every token and mask: of the data's content, and of how it was rendered, encoded and cut."""
        digest = hashlib.sha256(RENDERING)
        for values in (self._ends.astype("<i8"), self._ids.astype("<i4"), self._mask):
            digest.update(values.data)
        return digest.hexdigest()


class SampleSetBuilder:
    """Takes samples one by one; memory grows by an eighth at a time."""

    def __init__(self) -> None:
        self.ids = array("i")
        self.mask = bytearray()
        self.ends = array("q")
        self.lines = array("q")
        self.sources = array("q")

    def add(self, tokens: Tokens, line: int, source: int) -> None:
        self.ids.frombytes(tokens.ids_T.tobytes())
        self.mask += tokens.mask_T.tobytes()
        self.ends.append(len(self.ids))
        self.lines.append(line)
        self.sources.append(source)

    def build(self) -> SampleSet:
        """The set, in the builder's own memory: nothing can be added afterwards."""
        return SampleSet(
            np.frombuffer(self.ids, dtype=np.int32),
            np.frombuffer(self.mask, dtype=np.bool_),
            np.array(self.ends, dtype=np.int64),
            np.array(self.lines, dtype=np.int64),
            np.array(self.sources, dtype=np.int64),
        )
