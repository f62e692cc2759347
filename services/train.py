"""`python -m services.train RECIPE [key=value …]`: what a Ray job runs."""

import atexit
import gc
import signal
import sys
from pathlib import Path

from services.commands import CommandError
from services.train_command import STATUSES, train_here
from services.training.recipe import RecipeError
from services.training.recipe_file import load_recipe


def main(arguments: list[str]) -> int:
    """The exit status: see `STATUSES`."""
    atexit.register(gc.freeze)  # else an interpreter that ends looks at all of torch and Ray once more, for a second
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: python -m services.train RECIPE [key=value ...]\n\n{STATUSES}", file=sys.stderr)
        return 2
    try:
        return train_here(load_recipe(Path(arguments[0]), arguments[1:]))
    except RecipeError as error:
        print(f"services.train: {error}", file=sys.stderr)
        return 1
    except CommandError as error:
        print(f"services.train: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:  # before there was anything to end
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
