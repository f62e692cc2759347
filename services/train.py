"""`python -m services.train RECIPE [key=value …]`: what a Ray job runs."""

import sys
from pathlib import Path

from services.commands import CommandError
from services.train_command import train_here
from services.training.recipe import RecipeError
from services.training.recipe_file import load_recipe


def main(arguments: list[str]) -> int:
    """Exit status: 0, 1 for what went wrong, 2 for a wrong command line."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m services.train RECIPE [key=value ...]", file=sys.stderr)
        return 2
    try:
        return train_here(load_recipe(Path(arguments[0]), arguments[1:]))
    except (RecipeError, CommandError) as error:
        print(f"services.train: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
