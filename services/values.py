"""What the values on a command line may be; argparse shows a function's name for what it cannot read."""

import argparse
import math


def count(text: str) -> int:
    """A number of things."""
    given = int(text)
    if given < 1:
        raise argparse.ArgumentTypeError(f"{text} given; expected at least 1")
    return given


def seconds(text: str) -> float:
    """Some time."""
    given = float(text)
    if not 0 < given < math.inf:
        raise argparse.ArgumentTypeError(f"{text} given; expected a number of seconds above 0")
    return given


def number(text: str) -> float:
    """Any number that is one, and finite."""
    given = float(text)
    if not math.isfinite(given):
        raise argparse.ArgumentTypeError(f"{text} given; expected a finite number")
    return given


def utf8(text: str) -> str:
    """Text that can be sent: an argument may be any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} given; expected text in UTF-8") from None
    return text
