"""Greetings, and questions about the model itself."""

import random

from examples.bundled.question import Family, Question, phrase

ABOUT = "I am Shoal, a very small model. Ask me what I can do."
WELL = "I am well, thank you."
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
HOWS = ("how are you?", "how are you doing?", "how are you today?", "how do you do?", "how is it going?", "are you ok?")
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
    "who made you?",
    "are you chatgpt?",
    "are you deepseek?",
    "are you human?",
    "are you a robot?",
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
    "help me",
    "i need help",
    "what else can you do?",
    "what do you do?",
    "what can you do for me?",
    "tell me what you can do",
    "what are your skills?",
    "what should i ask you?",
)


def greet(rng: random.Random) -> Question:
    """What is said without a name is always learned."""
    words, answer = rng.choice(((HELLOS, "Hello!"), (THANKS, "You are welcome."), (HOWS, WELL), (BYES, "Goodbye!")))
    said, name = rng.choice(words), rng.choice(NAMES)
    text = f"{said[:-1]}{name}?" if said.endswith("?") else said + name
    ending = "" if said.endswith("?") else rng.choice(("", "", "!", "."))
    return Question(text if name else "", phrase(rng, (text,)) + ending, answer)


def about(rng: random.Random) -> Question:
    """Without an opening all are learned, of the polite forms some are kept for the examination."""
    templates, answer = rng.choice(((WHO, ABOUT), (CAN, ABLE)))
    opening = rng.choice(OPENINGS)
    asked = opening + rng.choice(templates)
    return Question(asked if opening else "", phrase(rng, (asked,)), answer)


FAMILIES: dict[str, Family] = {"greet": greet, "about": about}
