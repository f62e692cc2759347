"""A tokenizer, a scripted backend and its application."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI

from model.tokenizer import Tokenizer
from tests.services.script import Script, make_app

SAID = " the whale swim far — ok"


@pytest.fixture(scope="session")
def bundled(words: Path) -> Path:
    """What stands for the bundled model here."""
    return words


@pytest.fixture(scope="session")
def tokenizer(words: Path) -> Tokenizer:
    return Tokenizer.load(words)


@pytest.fixture
def script(tokenizer: Tokenizer) -> Script:
    """Answers SAID, in which a dash is three tokens of one byte each."""
    return Script(tokenizer, tokenizer.vocab_size, tokenizer.encode(SAID))


@pytest.fixture
def app(script: Script) -> FastAPI:
    return make_app(script)


MakeApp = Callable[..., FastAPI]
