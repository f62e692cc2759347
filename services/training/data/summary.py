"""What a data set amounts to, in numbers, and what of a sample is learned, in text."""

import itertools
from dataclasses import dataclass

import numpy as np

from services.training.data.packing import first_fit
from services.training.data.reading import Read
from services.training.data.samples import Sample
from services.training.data.training_tokenizer import TrainingTokenizer

PERCENTILES = (0, 50, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts over all files. `lengths` are the tokens of a sample at each of PERCENTILES; empty without samples.

    `rows` are those of sequence_length tokens that the samples fill when all are packed together, and
    `packing_efficiency` is how full they are.
    """

    records: int
    samples: int
    tokens: int
    targets: int
    lengths: dict[int, int]
    overlong: int
    dropped: int
    truncated: int
    split: int
    rows: int
    packing_efficiency: float
    fingerprint: str

    @property
    def targets_share(self) -> float:
        """Of all tokens, those that are learned."""
        return self.targets / self.tokens if self.tokens else 0.0


def summarise(read: Read, sequence_length: int) -> Summary:
    """Of everything that could be read, whatever the problems."""
    samples = read.samples
    length_S = samples.length_S
    rows = len(first_fit([int(length) for length in length_S], sequence_length))
    percentiles = np.percentile(length_S, PERCENTILES, method="higher") if len(samples) else ()
    return Summary(
        records=sum(source.records for source in read.sources),
        samples=len(samples),
        tokens=samples.tokens,
        targets=sum(sample.targets for sample in samples),
        lengths={share: int(length) for share, length in zip(PERCENTILES, percentiles, strict=False)},
        overlong=sum(source.overlong for source in read.sources),
        dropped=sum(source.dropped for source in read.sources),
        truncated=sum(source.truncated for source in read.sources),
        split=sum(source.split for source in read.sources),
        rows=rows,
        packing_efficiency=samples.tokens / (rows * sequence_length) if rows else 0.0,
        fingerprint=samples.fingerprint(),
    )


def runs(sample: Sample, tokenizer: TrainingTokenizer) -> list[tuple[str, bool]]:
    """The sample's text in pieces that are learned throughout or not at all."""
    pieces = []
    pairs = zip(sample.ids.tolist(), sample.mask.tolist(), strict=True)
    for learned, run in itertools.groupby(pairs, key=lambda pair: bool(pair[1])):
        pieces.append((tokenizer.decode([token for token, _ in run], skip_special_tokens=False), learned))
    return pieces
