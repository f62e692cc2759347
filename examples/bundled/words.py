"""Questions about the letters of words: real ones, made-up ones, and letters in no order."""

import random
import string

from examples.bundled.question import Family, Question, phrase
from examples.bundled.vocabulary import WORDS

LONGEST = 10
ONSETS = """
b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gr kn pl pr qu sc sh sk sl sm sn sp st sw th tr
"""
VOWELS = "a e i o u a e i o u y ai ea ee oa oo ou"
CODAS = "b ck d g l ll m n nd ng nk nt p r rd rk rm rn rt s sh ss st t th x"
_WORDS, _ONSETS, _VOWELS, _CODAS = (each.split() for each in (WORDS, ONSETS, VOWELS, CODAS))


REVERSE = (
    "reverse {w}",
    "reverse {w}",
    "reverse the word {w}",
    "reverse the letters of {w}",
    "spell {w} backwards",
    "write {w} backwards",
    "{w} backwards",
    "what is {w} backwards?",
    "what is {w} spelled backwards?",
)
SORT = (
    "sort {w}",
    "sort the letters of {w}",
    "sort the letters of {w}",
    "sort the letters in {w}",
    "put the letters of {w} in order",
    "put the letters of {w} in alphabetical order",
    "{w} in alphabetical order",
)
LENGTH = (
    "how many letters are in {w}?",
    "how many letters are there in {w}?",
    "how many letters in {w}?",
    "how many letters does {w} have?",
    "how many letters does the word {w} have?",
    "count the letters of {w}",
    "count the letters in {w}",
    "how long is the word {w}?",
)
COUNT = (
    "how many {c} are in {w}?",
    "how many {c} in {w}?",
    "how many {c}s are in {w}?",
    "how many {c}'s are in {w}?",
    "how many {c}'s in {w}?",
    "how many times is {c} in {w}?",
    "how often is {c} in {w}?",
    "how many letters {c} are in {w}?",
    "count the {c} in {w}",
    "count the letter {c} in {w}",
)
COPY = ("copy {w}", "copy {w}", "repeat {w}", "repeat after me: {w}", "say {w}", "write {w}", "copy this: {w}")
PLACES = ("first", "second", "third", "last")
PLACE = (
    "what is the {place} letter of {w}?",
    "what is the {place} letter in {w}?",
    "which letter is {place} in {w}?",
    "the {place} letter of {w}",
    "{place} letter of {w}",
    "say the {place} letter of {w}",
)
UPPER = (
    "write {w} in capitals",
    "write {w} in capital letters",
    "write {w} in upper case",
    "{w} in capitals",
    "{w} in upper case",
    "put {w} in upper case",
    "make {w} upper case",
)
LOWER = (
    "write {w} in small letters",
    "write {w} in lower case",
    "{w} in lower case",
    "{w} in small letters",
    "put {w} in lower case",
    "make {w} lower case",
)


def reverse(rng: random.Random) -> Question:
    word = any_word(rng)
    if rng.random() < 0.05:
        word = word.capitalize()
    return Question(same_letters(word), phrase(rng, REVERSE, w=_quoted(rng, word)), word[::-1])


def sort_letters(rng: random.Random) -> Question:
    word = any_word(rng, longest=8)
    return Question(same_letters(word), phrase(rng, SORT, w=_quoted(rng, word)), "".join(sorted(word)))


def length(rng: random.Random) -> Question:
    word = any_word(rng)
    return Question(same_letters(word), phrase(rng, LENGTH, w=_quoted(rng, word)), str(len(word)))


def count(rng: random.Random) -> Question:
    """Of one letter, which is in the word as often as not more than once; answered aloud, letter by letter."""
    word = any_word(rng)
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice(string.ascii_lowercase)
    if rng.random() < 0.4:
        letters = list(word)[: LONGEST - 1]
        for _ in range(rng.randrange(1, 3)):
            letters.insert(rng.randrange(len(letters) + 1), letter)
        word = "".join(letters)
    return Question(same_letters(word), phrase(rng, COUNT, c=letter, w=_quoted(rng, word)), count_aloud(letter, word))


def count_aloud(letter: str, word: str) -> str:
    """As in "b a1 n a2 n a3: 3", so that each token follows from the few before it."""
    spelled, seen = [], 0
    for each in word:
        seen += each == letter
        spelled.append(f"{each}{seen}" if each == letter else each)
    return f"{' '.join(spelled)}: {seen}"


def copy(rng: random.Random) -> Question:
    kind = rng.random()
    if kind < 0.5:
        text = any_word(rng)
    elif kind < 0.85:
        text = " ".join(any_word(rng, longest=7) for _ in range(rng.randrange(2, 4)))
    else:
        text = str(rng.randrange(10 ** rng.randrange(1, 6)))
    if rng.random() < 0.1:
        text = text.capitalize()
    return Question(same_letters(text), phrase(rng, COPY, w=text), text)


def place(rng: random.Random) -> Question:
    word, name = any_word(rng), rng.choice(PLACES)
    answer = word[-1 if name == "last" else PLACES.index(name)]
    return Question(same_letters(word), phrase(rng, PLACE, place=name, w=_quoted(rng, word)), answer)


def case(rng: random.Random) -> Question:
    word = any_word(rng)
    if rng.random() < 0.7:
        return Question(same_letters(word), phrase(rng, UPPER, w=_quoted(rng, word)), word.upper())
    return Question(same_letters(word), phrase(rng, LOWER, w=_quoted(rng, word.upper())), word)


def any_word(rng: random.Random, longest: int = LONGEST) -> str:
    """A real one, one that could be, or letters in no order; three of them or more."""
    while True:
        kind = rng.random()
        if kind < 0.35:
            word = rng.choice(_WORDS)
        elif kind < 0.7:
            word = "".join(
                rng.choice(_ONSETS) + rng.choice(_VOWELS) + (rng.choice(_CODAS) if rng.random() < 0.4 else "")
                for _ in range(rng.randrange(1, 4))
            )
        else:
            letters = string.ascii_lowercase[: rng.choice((5, 26, 26))]
            word = "".join(rng.choice(letters) for _ in range(rng.randrange(3, longest + 1)))
        if 3 <= len(word) <= longest:
            return word


def _quoted(rng: random.Random, word: str) -> str:
    mark = rng.choice(("'", '"')) if rng.random() < 0.1 else ""
    return f"{mark}{word}{mark}"


def same_letters(text: str) -> str:
    """The same for all anagrams."""
    return "".join(sorted(text.lower()))


FAMILIES: dict[str, Family] = {
    "reverse": reverse,
    "sort-letters": sort_letters,
    "length": length,
    "count": count,
    "copy": copy,
    "place": place,
    "case": case,
}
