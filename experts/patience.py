"""Whether to look for a message before sleeping until somebody rings.

Being woken costs both sides far more than a short wait, but looking takes a core from whoever computes the answer, and
where both share one core nothing comes while one looks. So one looks while that finds something, and where it found
nothing, again only after some waits, twice as many each time.
"""

LOOK_S = 300e-6  # about what sleeping and waking costs the two sides of a round trip in a virtual machine
BRIEF_S = 5e-6
MAX_SKIPPED = 64  # waits between two looks in vain


class Patience:
    """Follows the waits of one place; one thread at a time uses it."""

    def __init__(self) -> None:
        self._skip = 0
        self._next_skip = 1

    @property
    def look_s(self) -> float:
        """How long to look before sleeping, this time."""
        return BRIEF_S if self._skip else LOOK_S

    def waited(self, slept: bool) -> None:
        """A message came: while looking, or after sleeping."""
        if self._skip:
            self._skip -= 1
        elif slept:
            self._skip = self._next_skip
            self._next_skip = min(2 * self._next_skip, MAX_SKIPPED)
        else:
            self._next_skip = 1
