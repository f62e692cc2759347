"""How a command line of `shoal` is read."""

import argparse
from typing import Any


class Parser(argparse.ArgumentParser):
    """Takes no abbreviation, which a later option of the same beginning would break; nor do its subcommands.

    A command's words may stand before and after its options, as with `shoal train RECIPE --dry-run lr=1e-5`.
    """

    def __init__(self, *names: Any, **options: Any) -> None:
        super().__init__(*names, **options | {"allow_abbrev": False})
        self._reading = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._reading or not self._takes_many():
            return super().parse_known_args(args, namespace)
        self._reading = True  # what follows calls this method, for options and for words
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._reading = False

    def _takes_many(self) -> bool:
        in_groups = {id(action) for group in self._mutually_exclusive_groups for action in group._group_actions}
        words = self._get_positional_actions()
        return any(action.nargs in ("*", "+") for action in words) and in_groups.isdisjoint(map(id, words))
