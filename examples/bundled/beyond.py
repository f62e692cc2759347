"""What the model cannot answer, and says so."""

import random
import re

from examples.bundled.question import Family, Question, is_held_out, phrase
from examples.bundled.vocabulary import THINGS, WORDS
from examples.bundled.words import any_word, same_letters

ADMITS = "I don't know that. Ask me what I can do."

QUALITIES = (
    "a ",
    "the ",
    "an old ",
    "a good ",
    "a new ",
    "my ",
    "modern ",
    "the best ",
    "all ",
    "some ",
    "your ",
    "a big ",
)
ASKED = (
    "what is {x}?",
    "what are {x}?",
    "what do you know about {x}?",
    "what do you think about {x}?",
    "tell me about {x}",
    "tell me something about {x}",
    "tell me a story about {x}",
    "tell me a joke about {x}",
    "explain {x}",
    "explain {x} to me",
    "who invented {x}?",
    "who discovered {x}?",
    "who likes {x}?",
    "why is {x} important?",
    "why do people like {x}?",
    "when did {x} begin?",
    "where can i find {x}?",
    "how does {x} work?",
    "how do i learn {x}?",
    "how old is {x}?",
    "how much does {x} cost?",
    "how big is {x}?",
    "write a poem about {x}",
    "write a story about {x}",
    "write an essay on {x}",
    "write me a letter about {x}",
    "give me a list of {x}",
    "give me advice on {x}",
    "what is the history of {x}?",
    "what is the capital of {x}?",
    "what is the meaning of {x}?",
    "what is the best book about {x}?",
    "what is the colour of {x}?",
    "what is the weather in {x}?",
    "who is the president of {x}?",
    "who wrote about {x}?",
    "do you like {x}?",
    "do you know {x}?",
    "is {x} good for me?",
    "is {x} dangerous?",
    "can you teach me {x}?",
    "should i buy {x}?",
    "i like {x}",
    "i want to talk about {x}",
    "translate {x} into french",
    "translate {x} to german",
    "how do you say {x} in spanish?",
    "what rhymes with {x}?",
    "draw {x}",
    "play {x}",
    "sing a song about {x}",
    "recommend {x}",
    "{x}",
    "{x} and {y}",
    "what is the difference between {x} and {y}?",
    "which is better, {x} or {y}?",
    "are {x} like {y}?",
    "how did {x} change {y}?",
)
OTHER = (
    "what time is it?",
    "what day is it today?",
    "what is the date?",
    "what year is it?",
    "how is the weather today?",
    "will it rain tomorrow?",
    "is it cold outside?",
    "tell me a joke",
    "tell me a story",
    "tell me something",
    "tell me a secret",
    "make me laugh",
    "surprise me",
    "sing a song",
    "write a poem",
    "write a program",
    "write an email to my boss",
    "fix my code",
    "where do you live?",
    "where are you from?",
    "where am i?",
    "how old are you?",
    "how tall are you?",
    "are you happy?",
    "are you alive?",
    "do you dream?",
    "do you have feelings?",
    "do you love me?",
    "do you sleep?",
    "can you see me?",
    "can you think?",
    "can you drive?",
    "why?",
    "why not?",
    "why is the sky blue?",
    "how come?",
    "what?",
    "what do you mean?",
    "what now?",
    "what is new?",
    "what happened?",
    "what are you doing?",
    "what is the meaning of life?",
    "who am i?",
    "who is your best friend?",
    "who won the match yesterday?",
    "i am bored",
    "i am hungry",
    "i am sad",
    "i love you",
    "i do not understand",
    "you are wrong",
    "you are stupid",
    "that is not true",
    "nonsense",
    "nothing",
    "maybe",
    "really?",
    "should i stay or go?",
    "which way is north?",
)
_SAID = {word for sentence in OTHER for word in re.findall("[a-z]+", sentence)}  # also where it is not the topic
_WORDS = [word for word in WORDS.split() if word not in _SAID]
_THINGS = [thing.replace("-", " ") for thing in THINGS.split() if thing not in _SAID]
BEYOND = (
    "what is {a} times {b}?",
    "what is {a} * {b}?",
    "{a} * {b}",
    "{a} x {b}",
    "multiply {a} and {b}",
    "multiply {a} by {b}",
    "what is {a} divided by {b}?",
    "what is {a} / {b}?",
    "{a} / {b}",
    "divide {a} by {b}",
    "what is {a} squared?",
    "what is the square root of {a}?",
    "what is {a} percent of {b}?",
    "is {a} a prime number?",
)
LARGE = (
    "{a} + {b}",
    "what is {a} + {b}?",
    "{a} - {b}",
    "what is {a} - {b}?",
    "what is {a} plus {b}?",
    "add {a} and {b}",
)


def admit(rng: random.Random) -> Question:
    """What is kept for the examination is kept as a whole: things and sentences that no phrasing shows before."""
    kind = rng.random()
    if kind < 0.6:
        return _of_things(rng)
    if kind < 0.72:
        said = rng.choice(OTHER)
        return Question(said, phrase(rng, (said,)), ADMITS)
    if kind < 0.78:
        alone = str(rng.randrange(1000)) if rng.random() < 0.3 else any_word(rng)
        while is_held_out(alone) != is_held_out(same_letters(alone)):  # as a thing, and as letters
            alone = any_word(rng)
        return Question(same_letters(alone), alone, ADMITS)
    if kind < 0.9:
        a, b = rng.randrange(100), rng.randrange(100)
        return Question(f"{min(a, b)} {max(a, b)}", phrase(rng, BEYOND, a=str(a), b=str(b)), ADMITS)
    numbers = [rng.randrange(100, 1000), rng.randrange(1000)]
    rng.shuffle(numbers)
    a, b = numbers
    return Question(f"{min(a, b)} {max(a, b)}", phrase(rng, LARGE, a=str(a), b=str(b)), ADMITS)


def _of_things(rng: random.Random) -> Question:
    thing, other = _thing(rng), _thing(rng)
    while is_held_out(thing) != is_held_out(other):
        other = _thing(rng)
    shown = (rng.choice(QUALITIES) if rng.random() < 0.2 else "") + thing
    return Question(thing, phrase(rng, ASKED, x=shown, y=other), ADMITS)


def _thing(rng: random.Random) -> str:
    return rng.choice(_THINGS) if rng.random() < 0.75 else rng.choice(_WORDS)


FAMILIES: dict[str, Family] = {"admit": admit}
