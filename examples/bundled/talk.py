"""Greetings, questions about the model itself, and all that it cannot answer and says so."""

import random

from examples.bundled.question import Family, Question, is_held_out, phrase
from examples.bundled.vocabulary import THINGS, WORDS

_WORDS, _THINGS = WORDS.split(), [thing.replace("-", " ") for thing in THINGS.split()]
ADMITS = "I don't know that. Ask me what I can do."
ABOUT = "I am Shoal, a very small model. Ask me what I can do."
ABLE = "I add, subtract, compare and sort numbers. I reverse, sort, count, copy and capitalise words."

HELLOS = (
    "hello",
    "hi",
    "hey",
    "hi there",
    "hello there",
    "hey there",
    "good morning",
    "good evening",
    "good day",
    "greetings",
)
THANKS = ("thanks", "thank you", "thank you very much", "thanks a lot", "many thanks", "great, thanks", "ok, thanks")
BYES = ("bye", "goodbye", "good bye", "bye bye", "see you", "see you later", "good night", "farewell")
NAMES = ("", "", "", "", " shoal", " friend", " model", " my friend", " you", " little one", " buddy", " dear")
OPENINGS = ("", "", "hi, ", "hello, ", "so, ", "please, ", "ok, ", "and ", "now, ", "hey, ")
WHO = (
    "who are you?",
    "what are you?",
    "what is your name?",
    "what's your name?",
    "tell me your name",
    "tell me about yourself",
    "introduce yourself",
    "are you a model?",
    "are you an ai?",
    "who am i talking to?",
    "what model are you?",
    "do you have a name?",
    "what should i call you?",
)
CAN = (
    "what can you do?",
    "what can i ask you?",
    "what can i ask?",
    "what do you know?",
    "what are you able to do?",
    "how can you help me?",
    "what are you good at?",
    "can you help me?",
    "help",
    "what else can you do?",
    "tell me what you can do",
    "what are your skills?",
)
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


def greet(rng: random.Random) -> Question:
    words, answer = rng.choice(((HELLOS, "Hello!"), (THANKS, "You are welcome."), (BYES, "Goodbye!")))
    said = rng.choice(words) + rng.choice(NAMES)
    return Question(said, phrase(rng, (said,)) + rng.choice(("", "", "!", ".")), answer)


def about(rng: random.Random) -> Question:
    """Few phrasings: the polite forms of some are kept for the examination."""
    templates, answer = rng.choice(((WHO, ABOUT), (CAN, ABLE)))
    asked = rng.choice(("", "", "hi, ", "hello, ", "so, ", "please, ", "ok, ", "and ", "now, ", "hey, ")) + rng.choice(
        templates
    )
    return Question(asked, phrase(rng, (asked,)), answer)


def admit(rng: random.Random) -> Question:
    """About things that are kept for the examination as wholes: neither phrasing nor neighbour shows them before."""
    kind = rng.random()
    if kind < 0.75:
        thing = _thing(rng)
        other = _thing(rng)
        while is_held_out(thing) != is_held_out(other):
            other = _thing(rng)
        shown = (rng.choice(QUALITIES) if rng.random() < 0.2 else "") + thing
        return Question(thing, phrase(rng, ASKED, x=shown, y=other), ADMITS)
    if kind < 0.9:
        a, b = rng.randrange(100), rng.randrange(100)
        return Question(f"{min(a, b)} {max(a, b)}", phrase(rng, BEYOND, a=str(a), b=str(b)), ADMITS)
    numbers = [rng.randrange(100, 1000), rng.randrange(1000)]
    rng.shuffle(numbers)
    a, b = numbers
    return Question(f"{min(a, b)} {max(a, b)}", phrase(rng, LARGE, a=str(a), b=str(b)), ADMITS)


def _thing(rng: random.Random) -> str:
    return rng.choice(_THINGS) if rng.random() < 0.75 else rng.choice(_WORDS)


FAMILIES: dict[str, Family] = {"greet": greet, "about": about, "admit": admit}
