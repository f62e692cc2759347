"""Which API keys and admin tokens can be sent."""

import re

SENDABLE = re.compile(r"[!-~](?:[ -~]*[!-~])?")  # by any HTTP client, and as it is


def check_key(key: str) -> str:
    """The key itself; raises ValueError, without it, for one that no HTTP header carries unchanged."""
    if SENDABLE.fullmatch(key) is None:
        raise ValueError(
            "has characters that HTTP does not carry: use ASCII letters, digits and signs, "
            "with no space or line end before or after them"
        )
    return key
