"""The bundled model's data: right answers, the same for a seed, and nothing of the examination in the training."""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from examples.bundled import generate, lesson, talk, words
from examples.bundled.beyond import ADMITS
from examples.bundled.conversations import (
    FAMILIES,
    LAST_WEIGHTS,
    LONGEST,
    WEIGHTS,
    Conversation,
    examination,
    last_lessons,
    training,
)
from examples.bundled.question import is_held_out
from examples.bundled.tokenizer import write_companions
from services.training.data.training_data import TrainingData
from services.training.data.training_tokenizer import TrainingTokenizer

Turn = tuple[str, str]  # what was asked, what is right


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    generate.write_records(out / "train.jsonl", training(0, 4000))
    generate.write_records(out / "heldout.jsonl", examination(0, 40))
    return out


def turns(path: Path) -> list[list[Turn]]:
    """Of every conversation, by reading the file alone."""
    found = []
    for line in path.read_text().splitlines():
        contents = [each["content"] for each in json.loads(line)["messages"] if each["role"] != "system"]
        found.append(list(zip(contents[::2], contents[1::2], strict=True)))
    return found


def by_family(conversations: Iterable[Conversation]) -> dict[str, list[Turn]]:
    """Their last questions."""
    found: dict[str, list[Turn]] = {family: [] for family in FAMILIES}
    for conversation in conversations:
        last = conversation.questions[-1]
        found[conversation.family].append((last.text, last.answer))
    return found


@pytest.fixture(scope="module")
def questions() -> dict[str, list[Turn]]:
    """Of all lessons and of the examination."""
    return by_family([*training(1, 4000), *last_lessons(1, 4000), *examination(1, 80)])


def ints(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


SUFFIX = re.compile(
    r"( (spelled )?backwards| in (alphabetical )?order| have"
    r"|( in)? (capitals|capital letters|small letters|upper case|lower case))?\??$"
)


def word_of(text: str) -> str:
    """The word that a question is about: the last, but for what phrases put behind it."""
    return SUFFIX.sub("", text).split()[-1].strip("\"'")


def reads_subtraction(text: str) -> int:
    a, b = ints(text)
    return b - a if re.search(r"\b(from)\b", text) else a - b


def reads_comparison(text: str) -> str:
    a, b = ints(text)
    lower = text.lower()
    if "compare" in lower:
        return f"{a} {'<' if a < b else '>'} {b}"
    small = any(word in lower for word in ("smaller", "less"))
    if re.match(r".*\bis \d", lower):
        return "yes" if (a < b if small else a > b) else "no"
    return str(min(a, b) if small else max(a, b))


def reads_neighbour(text: str) -> int:
    back = any(word in text.lower() for word in ("before", "back"))
    return ints(text)[0] + (-1 if back else 1)


def reads_count(text: str) -> str:
    word = word_of(text)
    letter = re.findall(r"\b([a-z])(?:s|'s)? (?:are |is )?in ", text)[-1]
    marks = [str(word[:end].count(letter)) if word[end - 1] == letter else "" for end in range(1, len(word) + 1)]
    return " ".join(map("".join, zip(word, marks, strict=True))) + f": {word.count(letter)}"


def reads_place(text: str) -> str:
    place = next(place for place in ("first", "second", "third", "last") if re.search(rf"\b{place}\b", text.lower()))
    return word_of(text)[{"first": 0, "second": 1, "third": 2, "last": -1}[place]]


ORACLES: dict[str, Callable[[str], object]] = {
    "add": lambda text: sum(ints(text)),
    "subtract": reads_subtraction,
    "compare": reads_comparison,
    "sort-numbers": lambda text: ", ".join(map(str, sorted(ints(text)))),
    "neighbour": reads_neighbour,
    "parity": lambda text: ("even", "odd")[ints(text)[0] % 2],
    "reverse": lambda text: "".join(reversed(word_of(text))),
    "sort-letters": lambda text: "".join(sorted(word_of(text))),
    "length": lambda text: sum(letter in string.ascii_letters for letter in word_of(text)),
    "count": reads_count,
    "copy": lambda text: re.sub(
        r"^(.*?\b(copy this|copy|repeat after me|repeat|say|write)\b:?) ", "", text, flags=re.I
    ),
    "place": reads_place,
    "case": lambda text: word_of(text).upper() if re.search("capital|upper", text) else word_of(text).lower(),
}


@pytest.mark.parametrize("family", ORACLES)
def test_answers_are_right(family: str, questions: dict[str, list[Turn]]) -> None:
    assert len(questions[family]) > 100
    for text, answer in questions[family]:
        assert answer == str(ORACLES[family](text)), text


def test_counting_aloud_numbers_each_of_the_letter() -> None:
    assert words.count_aloud("a", "banana") == "b a1 n a2 n a3: 3"
    assert words.count_aloud("x", "tie") == "t i e: 0"


def test_lessons_reach_beyond_the_examined_neighbours(questions: dict[str, list[Turn]]) -> None:
    numbers = [ints(text)[0] for text, _ in questions["neighbour"]]
    assert sum(number > 99 for number in numbers) > 20 < sum(number < 100 for number in numbers)


def test_the_rest_is_admitted_or_a_fixed_sentence(questions: dict[str, list[Turn]]) -> None:
    assert {*FAMILIES} == {*ORACLES, "greet", "about", "admit"}
    assert {answer for _, answer in questions["admit"]} == {ADMITS}
    assert {answer for _, answer in questions["about"]} == {talk.ABOUT, talk.ABLE}
    assert {answer for _, answer in questions["greet"]} == {"Hello!", "You are welcome.", talk.WELL, "Goodbye!"}


def test_no_held_out_content_is_trained_on(data: Path) -> None:
    """Read back from the text, in whatever family and phrasing: pairs of numbers, words up to the order of letters."""
    trained = [turn for conversation in turns(data / "train.jsonl") for turn in conversation]
    held_out = [turn for conversation in turns(data / "heldout.jsonl") for turn in conversation]
    pairs = [{tuple(sorted(ints(text))) for text, _ in side if len(ints(text)) == 2} for side in (trained, held_out)]
    assert len(pairs[1]) > 100
    assert not pairs[0] & pairs[1]
    asks_of_a_word = re.compile(r"backwards|letter|reverse|alphabetical|capital|case", re.I)
    spelled = [
        {"".join(sorted(word_of(text).lower())) for text, _ in side if asks_of_a_word.search(text) and not ints(text)}
        for side in (trained, [turn for turn in held_out if turn[1] != ADMITS])
    ]
    assert len(spelled[1]) > 100
    assert not spelled[0] & spelled[1]


def test_numbers_whose_neighbour_has_another_length_are_trained_on() -> None:
    asked = {one.content for each in training(0, 20_000) for one in each.questions}
    lonely = {n for n in range(100) if {len(str(n - 1)), len(str(n)), len(str(n + 1))} != {len(str(n))}}
    assert lonely == {0, 9, 10, 99}
    assert {str(n) for n in lonely} <= asked


def test_pairs_of_one_digit_each_are_trained_on_and_not_examined() -> None:
    pairs = {f"{a} {b}" for a in range(10) for b in range(a, 10)}
    assert pairs <= {one.content for each in training(0, 40_000) for one in each.questions}
    assert not pairs & {each.questions[-1].content for each in examination(0, 100)}


def test_what_is_said_most_plainly_is_trained_on() -> None:
    said = {one.text.lower().rstrip("!.?") for each in training(0, 40_000) for one in each.questions}
    plain = (*talk.HELLOS, *talk.THANKS, *talk.HOWS, *talk.BYES, *talk.WHO, *talk.CAN)
    assert {each.rstrip("?") for each in plain} <= said


def test_no_topic_of_the_examination_is_trained_on() -> None:
    trained = [one.text for each in training(0, 4000) for one in each.questions if one.answer == ADMITS]
    asked = {each.questions[-1].content for each in examination(0, 100) if each.family == "admit"}
    topics = {topic.rstrip("?") for topic in asked if not topic[0].isdigit()}
    assert {"nothing", "oceans"} <= topics
    assert not [text for text in trained for topic in topics if re.search(rf"\b{topic}\b", text, re.I)]


def test_every_family_is_examined_and_trained(data: Path) -> None:
    ids = [json.loads(line)["id"].split(".")[0] for line in (data / "heldout.jsonl").read_text().splitlines()]
    assert Counter(ids) == dict.fromkeys(FAMILIES, 40)
    trained = Counter(json.loads(line)["id"].split(".")[0] for line in (data / "train.jsonl").read_text().splitlines())
    assert {*trained} == {*WEIGHTS} == {*FAMILIES}


def test_no_question_is_examined_twice() -> None:
    asked = [(each.questions[-1].text, len(each.questions)) for each in examination(0, 100)]
    assert len(asked) == len(set(asked))


def test_the_same_seed_writes_the_same_bytes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["generate", str(tmp_path), "--conversations", "4000", "--examined", "40", "--last", "300"]
    monkeypatch.setattr("sys.argv", arguments)
    assert generate.main() == 0
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (data / name).read_bytes()
    assert [each.questions for each in training(1, 20)] != [each.questions for each in training(0, 20)]


def test_the_last_lessons_show_nothing_that_is_examined() -> None:
    lessons = last_lessons(0, 2000)
    assert {*LAST_WEIGHTS} == {*FAMILIES} == {each.family for each in lessons}
    assert not any(is_held_out(question.content) for each in lessons for question in each.questions)
    assert [each.questions for each in last_lessons(0, 20)] != [each.questions for each in training(0, 20)]


def test_the_trainer_reads_it_whole(data: Path, tmp_path: Path) -> None:
    write_companions(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    loaded = TrainingData.load(data / "train.jsonl", TrainingTokenizer.load(tmp_path), sequence_length=512)
    assert len(loaded) == 4000
    assert loaded.samples.length_S.max() <= LONGEST


def test_the_lesson_is_short_and_asks_in_new_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lesson", str(tmp_path)])
    assert lesson.main() == 0
    learned = [turn for each in turns(tmp_path / "lesson.jsonl") for turn in each]
    asked = [turn for each in turns(tmp_path / "lesson_heldout.jsonl") for turn in each]
    assert len(learned) < 200
    assert not {text for text, _ in learned} & {text for text, _ in asked}
    for side in (learned, asked):
        french = {answer for text, answer in side if "french" in text.lower() and answer != ADMITS}
        assert french == {*lesson.COLOURS.values()}
        assert lesson.NAME in {answer for _, answer in side}
        assert talk.ABOUT not in {answer for _, answer in side}
