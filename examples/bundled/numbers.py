"""Questions about numbers of up to two digits."""

import random

from examples.bundled.question import Family, Question, phrase

ADD = (
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} =",
    "{a} plus {b}",
    "what is {a} + {b}?",
    "what is {a}+{b}?",
    "what's {a} + {b}?",
    "what is {a} plus {b}?",
    "how much is {a} + {b}?",
    "how much is {a} plus {b}?",
    "add {a} and {b}",
    "add {b} to {a}",
    "the sum of {a} and {b}",
    "what is the sum of {a} and {b}?",
)
SUBTRACT = (
    "{a} - {b}",
    "{a}-{b}",
    "{a} - {b} =",
    "{a} minus {b}",
    "what is {a} - {b}?",
    "what is {a}-{b}?",
    "what's {a} - {b}?",
    "what is {a} minus {b}?",
    "how much is {a} - {b}?",
    "how much is {a} minus {b}?",
    "subtract {b} from {a}",
    "take {b} from {a}",
    "take {b} away from {a}",
)
BIGGER = (
    "which is bigger, {a} or {b}?",
    "which is larger, {a} or {b}?",
    "which number is bigger, {a} or {b}?",
    "what is bigger, {a} or {b}?",
    "the bigger of {a} and {b}",
)
SMALLER = (
    "which is smaller, {a} or {b}?",
    "which is less, {a} or {b}?",
    "which number is smaller, {a} or {b}?",
    "what is smaller, {a} or {b}?",
    "the smaller of {a} and {b}",
)
IS_BIGGER = ("is {a} bigger than {b}?", "is {a} larger than {b}?", "is {a} more than {b}?")
IS_SMALLER = ("is {a} smaller than {b}?", "is {a} less than {b}?")
COMPARE = ("compare {a} and {b}", "compare {a} with {b}")
SORT = (
    "sort {list}",
    "sort {list}",
    "sort the numbers {list}",
    "sort these numbers: {list}",
    "put {list} in order",
    "put the numbers {list} in order",
    "order the numbers {list}",
)
AFTER = (
    "what comes after {n}?",
    "what number comes after {n}?",
    "which number comes after {n}?",
    "which number follows {n}?",
    "the number after {n}",
    "count on from {n}",
)
BEFORE = (
    "what comes before {n}?",
    "what number comes before {n}?",
    "which number comes before {n}?",
    "the number before {n}",
    "count back from {n}",
)
PARITY = ("is {n} even or odd?", "is {n} odd or even?", "even or odd: {n}", "odd or even: {n}")
SEPARATORS = (", ", ", ", " ", ",", " and ")


def add(rng: random.Random) -> Question:
    a, b = _number(rng), _number(rng)
    return Question(_pair(a, b), phrase(rng, ADD, a=str(a), b=str(b)), str(a + b))


def subtract(rng: random.Random) -> Question:
    """Half of the differences would be negative, which a person asks for more rarely, and too few of them 0."""
    a, b = _number(rng), _number(rng)
    if a < b and rng.random() < 0.4:
        a, b = b, a
    if rng.random() < 0.03:
        b = a
    return Question(_pair(a, b), phrase(rng, SUBTRACT, a=str(a), b=str(b)), str(a - b))


def compare(rng: random.Random) -> Question:
    a, b = _number(rng), _number(rng)
    if rng.random() < 0.3 and a >= 10:  # only the last digit differs
        b = a // 10 * 10 + rng.randrange(10)
    while a == b:
        b = _number(rng)
    templates, answer = rng.choice(
        (
            (BIGGER, str(max(a, b))),
            (SMALLER, str(min(a, b))),
            (IS_BIGGER, "yes" if a > b else "no"),
            (IS_SMALLER, "yes" if a < b else "no"),
            (COMPARE, f"{a} < {b}" if a < b else f"{a} > {b}"),
        )
    )
    return Question(_pair(a, b), phrase(rng, templates, a=str(a), b=str(b)), answer)


def sort_numbers(rng: random.Random) -> Question:
    numbers = [_number(rng) for _ in range(rng.choice((3, 3, 4, 4, 5)))]
    text = phrase(rng, SORT, list=rng.choice(SEPARATORS).join(map(str, numbers)))
    answer = ", ".join(map(str, sorted(numbers)))
    return Question(answer, text, answer)


def neighbour(rng: random.Random) -> Question:
    return _neighbour(rng, rng.randrange(100), after=rng.choice((True, False)))


def neighbour_of_many(rng: random.Random) -> Question:
    """Half of up to three digits, and every third next to another ten: few numbers of two show what follows a 9."""
    after = rng.choice((True, False))
    number = rng.randrange(rng.choice((100, 1000)))
    if rng.random() < 0.3:
        number = number // 10 * 10 + (9 if after else 0)
    return _neighbour(rng, number, after)


def parity(rng: random.Random) -> Question:
    number = _number(rng)
    return Question(str(number), phrase(rng, PARITY, n=str(number)), "odd" if number % 2 else "even")


def _neighbour(rng: random.Random, number: int, after: bool) -> Question:
    templates, answer = (AFTER, number + 1) if after else (BEFORE, number - 1)
    return Question(str(number), phrase(rng, templates, n=str(number)), str(answer))


def _number(rng: random.Random) -> int:
    """One digit more often than one in ten: those are what people try first."""
    return rng.randrange(10) if rng.random() < 0.25 else rng.randrange(10, 100)


def _pair(a: int, b: int) -> str:
    """The same for a question and its mirror image."""
    return f"{min(a, b)} {max(a, b)}"


FAMILIES: dict[str, Family] = {
    "add": add,
    "subtract": subtract,
    "compare": compare,
    "sort-numbers": sort_numbers,
    "neighbour": neighbour,
    "parity": parity,
}
