"""A data set as a training run sees it: from a cursor to the rows of one step.

A step's global batch is decided by the cursor alone, and by the end of the data where they have one. Its rows are
packed before they are dealt to the workers, so how many workers there are, and whether that changes between steps,
changes neither the batch nor its loss.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from services.training.data.order import SampleOrder
from services.training.data.packing import PackedRow, first_fit, lay
from services.training.data.problems import DataError
from services.training.data.reading import Reading, read_samples
from services.training.data.samples import SampleSet
from services.training.data.training_tokenizer import TrainingTokenizer


@dataclass(frozen=True, slots=True, eq=False)
class GlobalBatch:
    """What one step learns from. `samples` are indices in the order taken; `targets` counts learned positions.

    `cursor_after` is where the next step begins, and `epoch` how many epochs have been taken by then.
    """

    rows: tuple[PackedRow, ...]
    samples: tuple[int, ...]
    targets: int
    cursor_after: int
    epoch: float

    def dealt(self, rank: int, world: int) -> range:
        """Numbers of the rows of one of `world` workers, in turn; none where there are fewer rows than workers.

        Raises ValueError for a rank outside 0 to world - 1.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} workers given; expected 0 to {world - 1}")
        return range(rank, len(self.rows), world)


class TrainingData:
    """Samples, their order, and how they are laid into rows of at most `sequence_length` tokens.

    With `epochs` they end: `end` is the cursor after so many epochs, rounded up to a sample. Then no batch goes beyond
    it, and none lies in two epochs, so none has a sample twice. Without, one epoch follows another within a batch.
    """

    def __init__(
        self,
        samples: SampleSet,
        sequence_length: int,
        packing: bool,
        seed: int,
        epochs: float | None = None,
    ) -> None:
        self.samples = samples
        self.sequence_length = sequence_length
        self.packing = packing
        self.order = SampleOrder(seed, len(samples))
        # as it is written: 1.1 epochs of 10 samples are 11, and not one more for the float's last bit
        self.end = None if epochs is None else math.ceil(Fraction(str(epochs)) * len(samples))

    @classmethod
    def load(
        cls,
        paths: Path | str | Sequence[Path | str],
        tokenizer: TrainingTokenizer,
        sequence_length: int,
        format: str = "auto",
        overlong: str = "error",
        packing: bool = True,
        seed: int = 0,
        epochs: float | None = None,
        ignore: Sequence[str] = (),
    ) -> "TrainingData":
        """Read and encode all files; `format`, `overlong` and `ignore` are explained at `Reading`.

        Raises DataError, which names the first problem and their number, when anything is wrong with the data, and
        ValueError for an option or path that is wrong by itself.
        """
        files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        read = read_samples(files, tokenizer, Reading(sequence_length, format, overlong, tuple(ignore)))
        if read.problems.count:
            raise DataError(read.problems.first[0], read.problems.count, sequence_length)
        return cls(read.samples, sequence_length, packing, seed, epochs)

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, cursor: int, *, batch_samples: int | None = None, batch_tokens: int | None = None) -> GlobalBatch:
        """The global batch that begins at the cursor: so many samples, or as many as fit so many tokens, in order.

        Where the data end, fewer at the borders of epochs. A cursor at the end or beyond goes on all the same, with the
        epoch that it is in: a run that was resumed with smaller batches has more steps than are left of its data.

        Raises ValueError unless exactly one of the two is given, for a count below 1, and for a token budget that
        might not hold one sample.
        """
        taken = self._taken(cursor, batch_samples, batch_tokens)
        rows = self._rows(taken)
        after = cursor + len(taken)
        return GlobalBatch(rows, tuple(taken), sum(row.targets for row in rows), after, after / len(self))

    def fingerprint(self) -> str:
        """Hex digest of what is learned, for snapshots: of the data's content and of how it was rendered and encoded.

        Seed, packing and sequence_length are not in it; they are the recipe's.
        """
        return self.samples.fingerprint()

    def _rows(self, taken: Sequence[int]) -> tuple[PackedRow, ...]:
        lengths = [int(self.samples.length_S[index]) for index in taken]
        groups = first_fit(lengths, self.sequence_length) if self.packing else [[place] for place in range(len(taken))]
        return tuple(
            lay([self.samples[taken[place]] for place in group], [taken[place] for place in group]) for group in groups
        )

    def after(self, cursor: int, batch_tokens: int) -> int:
        """The cursor after the batch that begins there, which is not laid out for it; raises what `batch` raises."""
        return cursor + len(self._taken(cursor, None, batch_tokens))

    def _left(self, cursor: int) -> int | None:
        """Samples that a batch can have from there."""
        if self.end is None:
            return None
        border = (cursor // len(self) + 1) * len(self)
        return (min(border, self.end) if cursor < self.end else border) - cursor

    def _taken(self, cursor: int, batch_samples: int | None, batch_tokens: int | None) -> list[int]:
        if (batch_samples is None) == (batch_tokens is None):
            raise ValueError("expected exactly one of batch_samples and batch_tokens")
        following = itertools.islice(self.order.following(cursor), self._left(cursor))
        if batch_samples is not None:
            if batch_samples < 1:
                raise ValueError(f"batch_samples {batch_samples} given; expected at least 1")
            taken = list(itertools.islice(following, batch_samples))
        else:
            assert batch_tokens is not None
            if batch_tokens < self.sequence_length:
                raise ValueError(
                    f"batch_tokens {batch_tokens} given; expected at least sequence_length ({self.sequence_length})"
                )
            taken = []
            for index in following:
                batch_tokens -= int(self.samples.length_S[index])
                if batch_tokens < 0:
                    break
                taken.append(index)
        return taken
