"""From files to samples: what happens beyond the context, what is counted, and when data count as changed."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from services.training.data import reading
from services.training.data.problems import KEPT, DataError
from services.training.data.reading import Read, Reading, read_samples
from services.training.data.samples import Sample, SampleSet
from services.training.data.training_data import TrainingData
from services.training.data.training_tokenizer import TrainingTokenizer
from tests.conftest import MakeCheckpoint

LIMIT = 24
SHORT = ("Hi", "Hello")
LONG = ("Hi", " ".join(["Hello"] * 40))
NO_ROOM = (" ".join(["Hi"] * 40), "Hello")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: MakeCheckpoint) -> TrainingTokenizer:
    return TrainingTokenizer.load(checkpoint("tiny"))


def chat(path: Path, *turns: tuple[str, str]) -> Path:
    records = (
        {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}
        for user, answer in turns
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(tokenizer: TrainingTokenizer, *paths: Path, length: int = LIMIT, **options: str) -> Read:
    return read_samples(paths, tokenizer, Reading(length, **options))


def same(one: Sample, other: Sample) -> bool:
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.mask, other.mask)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return chat(tmp_path / "mixed.jsonl", SHORT, LONG, SHORT, NO_ROOM)


def test_overlong_samples_are_problems_that_name_both_lengths(tokenizer: TrainingTokenizer, mixed: Path) -> None:
    full = read(tokenizer, mixed, length=4096)
    assert not full.problems.count
    found = read(tokenizer, mixed)
    assert [problem.line for problem in found.problems.first] == [2, 4]
    for problem in found.problems.first:
        assert f"{len(full.samples[problem.line - 1].ids)} tokens; the context is {LIMIT}" in problem.message
    with pytest.raises(DataError, match=r"mixed\.jsonl:2: messages: "):
        TrainingData.load(mixed, tokenizer, LIMIT)


def test_overlong_samples_may_be_dropped(tokenizer: TrainingTokenizer, mixed: Path) -> None:
    found = read(tokenizer, mixed, overlong="drop")
    assert [sample.line for sample in found.samples] == [1, 3]
    [source] = found.sources
    assert (source.records, source.overlong, source.dropped, source.truncated) == (4, 2, 2, 0)
    assert not found.problems.count


def test_overlong_samples_may_be_truncated_unless_nothing_is_left_to_learn(
    tokenizer: TrainingTokenizer, mixed: Path
) -> None:
    full = read(tokenizer, mixed, length=4096).samples
    found = read(tokenizer, mixed, overlong="truncate")
    assert [sample.line for sample in found.samples] == [1, 2, 3]
    assert found.samples[1].ids.tolist() == full[1].ids[:LIMIT].tolist()
    assert found.samples[1].mask.tolist() == full[1].mask[:LIMIT].tolist()
    [source] = found.sources
    assert (source.overlong, source.dropped, source.truncated) == (2, 1, 1)


@pytest.mark.parametrize("length", [2, 3, 7, 60])
def test_split_document_predicts_every_token_once(tokenizer: TrainingTokenizer, tmp_path: Path, length: int) -> None:
    path = tmp_path / "sea.txt"
    path.write_text("The sea is wide and the sky is far; " * 5)
    whole = read(tokenizer, path, length=4096).samples[0].ids
    data = TrainingData.load(path, tokenizer, length, overlong="split")
    assert max(data.samples.length_S) <= length
    rows = data.batch(0, batch_samples=len(data)).rows
    predicted = {}
    for index in range(len(data)):
        [row] = [row for row in rows if index in row.samples]
        end = row.segment_ends[row.samples.index(index)]
        target_T = row.target_T[end - int(data.samples.length_S[index]) : end]
        predicted[index] = target_T[target_T >= 0].tolist()
    assert [token for index in sorted(predicted) for token in predicted[index]] == whole[1:].tolist()
    [source] = read(tokenizer, path, length=length, overlong="split").sources
    assert (source.overlong, source.split) == ((1, 1) if len(whole) > length else (0, 0))


def test_conversations_are_not_split(tokenizer: TrainingTokenizer, mixed: Path) -> None:
    found = read(tokenizer, mixed, overlong="split")
    assert [problem.line for problem in found.problems.first] == [2, 4]
    assert "a conversation is not split" in found.problems.first[0].message


@pytest.mark.parametrize("longer", [0, 1])
def test_a_sample_as_long_as_the_context_fits(tokenizer: TrainingTokenizer, tmp_path: Path, longer: int) -> None:
    path = chat(tmp_path / "one.jsonl", LONG)
    length = len(read(tokenizer, path, length=4096).samples[0].ids)
    assert read(tokenizer, path, length=length - longer).problems.count == longer


def test_nothing_left_is_an_error(tokenizer: TrainingTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"all samples are longer than {LIMIT}"):
        TrainingData.load(chat(tmp_path / "long.jsonl", LONG), tokenizer, LIMIT, overlong="drop")


def test_samples_of_several_files_know_their_lines(tokenizer: TrainingTokenizer, tmp_path: Path) -> None:
    one = chat(tmp_path / "one.jsonl", SHORT, ("A", "B"))
    (tmp_path / "two.txt").write_text("Sea")
    found = read(tokenizer, one, tmp_path / "two.txt", one, length=64)
    assert [(sample.source, sample.line) for sample in found.samples] == [(0, 1), (0, 2), (1, 1), (2, 1), (2, 2)]
    assert [source.format for source in found.sources] == ["messages", "text", "messages"]
    assert same(found.samples[0], found.samples[3])
    assert found.samples[0].ids.dtype == np.int32
    with pytest.raises(IndexError):
        found.samples[5]


def test_problems_keep_the_order_of_the_lines_across_batches(
    tokenizer: TrainingTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are known when a line is read, others only once its batch was encoded."""
    monkeypatch.setattr(reading, "BATCH", 3)
    path = chat(tmp_path / "a.jsonl", *[SHORT, LONG, ("Hi<eos>", "x")] * 5)
    path.write_text(path.read_text() + "{\n")
    found = read(tokenizer, path)
    assert [problem.line for problem in found.problems.first] == [2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 16]
    assert [sample.line for sample in found.samples] == [1, 4, 7, 10, 13]


def test_problems_beyond_the_first_are_only_counted(tokenizer: TrainingTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": []}\n' * (KEPT + 7))
    problems = read(tokenizer, path).problems
    assert (len(problems.first), problems.count) == (KEPT, KEPT + 7)


@pytest.mark.parametrize(
    ("length", "overlong", "words"), [(1, "error", "at least 2"), (8, "cut", "one of error, drop, truncate, split")]
)
def test_wrong_options_are_refused(length: int, overlong: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Reading(length, overlong=overlong)


def test_no_file_is_refused(tokenizer: TrainingTokenizer) -> None:
    with pytest.raises(ValueError, match="no file given"):
        TrainingData.load([], tokenizer, 8)


def test_fingerprint_is_of_what_is_learned(tokenizer: TrainingTokenizer, tmp_path: Path) -> None:
    def fingerprint(*turns: tuple[str, str], seed: int = 0, packing: bool = True) -> str:
        path = chat(tmp_path / "a.jsonl", *turns)
        return TrainingData.load(str(path), tokenizer, 64, seed=seed, packing=packing).fingerprint()

    once = fingerprint(SHORT, ("A", "B"))
    assert once == fingerprint(SHORT, ("A", "B"), seed=1, packing=False)
    others = {fingerprint(SHORT), fingerprint(("A", "B"), SHORT), fingerprint(SHORT, ("A", "C"))}
    assert len(others | {once}) == 4


def test_fingerprint_sees_the_mask_and_the_borders(tokenizer: TrainingTokenizer, tmp_path: Path) -> None:
    """The same tokens, learned otherwise, are other data."""
    path = chat(tmp_path / "a.jsonl", SHORT)
    sample = TrainingData.load(path, tokenizer, 64).samples[0]
    text = tokenizer.decode(sample.ids.tolist(), skip_special_tokens=False)
    (tmp_path / "a.txt").write_text(text)
    document = TrainingData.load(tmp_path / "a.txt", tokenizer, 64)
    assert document.samples[0].ids.tolist() == sample.ids.tolist()
    assert document.fingerprint() != TrainingData.load(path, tokenizer, 64).fingerprint()


def test_fingerprint_sees_where_samples_end() -> None:
    """The same tokens, cut otherwise, are other samples for the cursor and for attention."""

    def cut(*ends: int) -> str:
        samples = np.zeros(len(ends), np.int64)
        tokens, learned = np.arange(6, dtype=np.int32), np.ones(6, np.bool_)
        return SampleSet(tokens, learned, np.array(ends), samples, samples).fingerprint()

    assert len({cut(6), cut(2, 6), cut(3, 6), cut(2, 4, 6)}) == 4


def test_error_passes_between_processes(tokenizer: TrainingTokenizer, mixed: Path) -> None:
    with pytest.raises(DataError) as caught:
        TrainingData.load(mixed, tokenizer, LIMIT)
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (str(copy), copy.count) == (str(caught.value), 2)
