"""From files to samples, in streams: read, render, encode in batches, see that each fits the context."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.training.data.formats import find_format, read_records
from services.training.data.problems import KEPT, Problem, ProblemLog, shown
from services.training.data.rendering import NotRendered, Rendered, Tokens, render, tokenise
from services.training.data.samples import SampleSet, SampleSetBuilder
from services.training.data.training_tokenizer import TrainingTokenizer

BATCH = 512  # records that are encoded at once
OVERLONG = ("error", "drop", "truncate", "split")


@dataclass(slots=True)
class Source:
    """A file, its format (None when its first record tells none), and what became of its records.

    Every record that was rendered counts in `overlong` when it is longer than the context; then it is also dropped,
    truncated or split, as was wished. A truncated one with nothing left to learn is dropped.
    """

    path: Path
    format: str | None
    records: int = 0
    overlong: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0


@dataclass(slots=True)
class Read:
    """What the files hold."""

    samples: SampleSet
    sources: tuple[Source, ...]
    problems: ProblemLog


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read. `format` is one of FORMATS, or auto: told from each file's first record.

    `overlong` is what happens to samples longer than `sequence_length` tokens: they are an error; or dropped; or cut;
    or, which only documents can be, split into samples that overlap by one token, so that each token is still
    predicted once. `ignore` are a record's keys that are not looked at.
    """

    sequence_length: int
    format: str = "auto"
    overlong: str = "error"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ValueError(
                f"sequence_length {self.sequence_length} given; expected at least 2, to predict one of another"
            )
        if self.overlong not in OVERLONG:
            raise ValueError(f"overlong {shown(self.overlong)} given; expected one of {', '.join(OVERLONG)}")


def read_samples(
    paths: Sequence[Path], tokenizer: TrainingTokenizer, reading: Reading, most_problems: int = KEPT
) -> Read:
    """Samples of all files in order, and the problems found; raises ValueError where no file can be read at all.

    There are samples or problems: that every sample was dropped is one, too.
    """
    reader = _Reader(tokenizer, reading, ProblemLog(most_problems))
    for index, format_name in _known(paths, reading, reader.sources, reader.problems):
        reader.read(index, format_name)
    samples = reader.builder.build()
    if not len(samples) and not reader.problems.count:
        given = f"all samples are longer than {reading.sequence_length} tokens and were dropped"
        reader.problems.add(Problem(paths[0], 1, "", f"{given}: nothing is left to learn from; lengthen the context"))
    return Read(samples, tuple(reader.sources), reader.problems)


def read_formats(
    paths: Sequence[Path], reading: Reading, most_problems: int = KEPT
) -> tuple[tuple[Source, ...], ProblemLog]:
    """What can be told without a model: files, their records, and what is wrong with these by their format.

    Raises ValueError where no file can be read at all.
    """
    sources: list[Source] = []
    problems = ProblemLog(most_problems)
    for index, format_name in _known(paths, reading, sources, problems):
        for record in read_records(paths[index], format_name, reading.ignore):
            if isinstance(record, Problem):
                problems.add(record)
            else:
                sources[index].records += 1
    return tuple(sources), problems


def _known(
    paths: Sequence[Path], reading: Reading, sources: list[Source], problems: ProblemLog
) -> Iterator[tuple[int, str]]:
    """Each file's place and format, if it has one; a source is there for each, once it is its turn."""
    if not paths:
        raise ValueError("no file given; expected at least one file of training data")
    found = [find_format(path, reading.format, reading.ignore) for path in paths]
    for index, (path, format_) in enumerate(zip(paths, found, strict=True)):
        if isinstance(format_, Problem):
            sources.append(Source(path, None))
            problems.add(format_)
        else:
            sources.append(Source(path, format_))
            yield index, format_


@dataclass(slots=True)
class _Reader:
    tokenizer: TrainingTokenizer
    reading: Reading
    problems: ProblemLog
    builder: SampleSetBuilder = field(default_factory=SampleSetBuilder)
    sources: list[Source] = field(default_factory=list)

    def read(self, index: int, format_name: str) -> None:
        source = self.sources[index]
        for batch in _batches(self._rendered(source, format_name), BATCH):
            rendered = [item for item in batch if isinstance(item, Rendered)]
            tokens = iter(tokenise(rendered, self.tokenizer))
            for item in batch:  # problems and samples in the file's order
                if isinstance(item, Problem):
                    self.problems.add(item)
                else:
                    self._take(item, next(tokens), index)

    def _rendered(self, source: Source, format_name: str) -> Iterator[Rendered | Problem]:
        for record in read_records(source.path, format_name, self.reading.ignore):
            if isinstance(record, Problem):
                yield record
                continue
            source.records += 1
            try:
                yield render(record, self.tokenizer)
            except NotRendered as error:
                yield Problem(source.path, record.line, error.field, error.message)

    def _take(self, item: Rendered, tokens: Tokens | NotRendered, index: int) -> None:
        source = self.sources[index]
        if isinstance(tokens, NotRendered):
            self.problems.add(Problem(source.path, item.line, tokens.field, tokens.message))
            return
        if not tokens.mask_T[1:].any():
            self.problems.add(Problem(source.path, item.line, item.field, "it has no token that could be learned"))
            return
        foreign = self.tokenizer.find_foreign(tokens.ids_T)
        if foreign is not None:
            self.problems.add(Problem(source.path, item.line, item.field, self._foreign(*foreign)))
            return
        limit = self.reading.sequence_length
        if len(tokens.ids_T) <= limit:
            self.builder.add(tokens, item.line, index)
            return
        source.overlong += 1
        if self.reading.overlong == "drop":
            source.dropped += 1
        elif self.reading.overlong == "truncate":
            self._truncate(tokens, item.line, index)
        elif self.reading.overlong == "split" and item.spans is None:
            source.split += 1
            for begin in range(0, len(tokens.ids_T) - 1, limit - 1):
                cut = slice(begin, begin + limit)
                self.builder.add(Tokens(tokens.ids_T[cut], tokens.mask_T[cut]), item.line, index)
        else:
            self.problems.add(Problem(source.path, item.line, item.field, self._too_long(len(tokens.ids_T), item)))

    def _truncate(self, tokens: Tokens, line: int, index: int) -> None:
        limit = self.reading.sequence_length
        cut = Tokens(tokens.ids_T[:limit], tokens.mask_T[:limit])
        if cut.mask_T[1:].any():
            self.sources[index].truncated += 1
            self.builder.add(cut, line, index)
        else:
            self.sources[index].dropped += 1

    def _foreign(self, token: int, name: str) -> str:
        return (
            f"the token {name!r} has id {token}; the model has ids up to {(self.tokenizer.model_ids or 0) - 1} "
            "(vocab_size in its config.json): use the tokenizer that the model came with, or take what is written so "
            "out of the data or the chat template"
        )

    def _too_long(self, length: int, item: Rendered) -> str:
        ways = "drop or truncate" if item.spans is not None else "drop, truncate or split"
        if self.reading.overlong == "split":
            ways = f"{ways}; a conversation is not split"
        return f"{length} tokens; the context is {self.reading.sequence_length}: lengthen it, or say overlong: {ways}"


def _batches(items: Iterable[Rendered | Problem], size: int) -> Iterator[list[Rendered | Problem]]:
    """`itertools.batched`, which Python 3.11 lacks."""
    remaining = iter(items)
    while batch := list(itertools.islice(remaining, size)):
        yield batch
