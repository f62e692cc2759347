"""`shoal train`: run a recipe here, or send it to a Ray cluster as a job."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from services.commands import CommandError, Interrupted
from services.on_cluster import on_cluster

if TYPE_CHECKING:  # loading them takes longer than any other subcommand needs
    from services.training.recipe import Recipe

STOP_S = 300  # that a job has to end its step and keep a snapshot, once it is told to stop
STATUSES = """\
exit status:
  0      all steps were made
  1      the run failed, or what it needs has ended; the message says whether the same command goes on
  2      the command line is wrong
  130    Ctrl-C (SIGINT) ended it; a snapshot is kept, and the same command goes on
  143    SIGTERM ended it, likewise
"""
SUBMITTED = """\
With --submit it is that of `ray job submit`: 1 where the job failed, and 0 also where it was stopped.
"""


def add_parser(commands_: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `train` to the command line."""
    text = "Fine-tune a model as a recipe says, with its experts in Ray actors; SIGTERM and Ctrl-C keep a snapshot."
    command = commands_.add_parser(
        "train",
        help="Fine-tune a model as a recipe says.",
        description=text,
        epilog=STATUSES + SUBMITTED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file, such as examples/sft.yaml")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="such as lr=1e-5 or experts.hosts=4"
    )
    command.add_argument("--dry-run", action="store_true", help="print the whole recipe and what it needs, and stop")
    command.add_argument("--submit", action="store_true", help="as a job of the Ray cluster at --address")
    command.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
        metavar="URL",
        help="of the cluster's dashboard, for --submit ($RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train here, or submit; 0 when all steps were made."""
    from services.training.recipe import RecipeError
    from services.training.recipe_file import load_recipe

    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except RecipeError as error:
        raise CommandError(str(error)) from error
    if options.dry_run:
        return _show(recipe)
    if options.submit:
        return _submit(options)
    return train_here(recipe)


def train_here(recipe: "Recipe") -> int:
    """Run to the end in this process and its Ray; raises Interrupted where a signal ended it, else CommandError."""
    if recipe.experts.service is not None and not on_cluster():
        # `shoal serve` has Ray ask for a token, which joining by address does not imply; Ray looks when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from services.training.driver import train
    from services.training.trainer import TrainingFailed, TrainingStopped

    try:
        train(recipe, Console())
    except TrainingStopped as stopped:
        raise Interrupted(str(stopped), stopped.number) from stopped
    except (ValueError, OSError, TrainingFailed) as error:
        raise CommandError(str(error)) from error
    return 0


def job_command(options: argparse.Namespace) -> list[str]:
    """What `ray job submit` is told, with the directory that holds the code and the recipe."""
    entry = ["python", "-m", "services.train", *map(_through_ray, (str(options.recipe), *options.overrides))]
    # Ray's supervisor of the job, which has the job's environment, kills it 3 s after `ray job stop` without this
    environment = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}})
    where = ["--address", options.address, "--working-dir", ".", "--runtime-env-json", environment]
    return ["ray", "job", "submit", *where, "--", *entry]


def _through_ray(word: str) -> str:
    """A word that arrives as it is given: `ray job submit` puts it in double quotes where it has a space and escapes
    double quotes in it, with the backslashes before them, as Windows has it; on the other side a shell reads it."""
    spaced = " " in word or "\t" in word
    special = r"\\(?!\\*(?:\"|$))|[$`]" if spaced else r"\\(?!\\*\")|[^\w@%+=:,./\"\\-]"
    return re.sub(special, r"\\\g<0>", word)


def _submit(options: argparse.Namespace) -> int:
    if "://" not in options.address:
        raise CommandError(f"--address {options.address}: expected a URL, such as http://127.0.0.1:8265")
    command = job_command(options)
    added = {} if "RAY_AUTH_MODE" in os.environ else {"RAY_AUTH_MODE": "token"}
    print(shlex.join([*(f"{name}={value}" for name, value in added.items()), *command]), flush=True)
    ray = Path(sys.executable).with_name("ray")
    return subprocess.run([str(ray), *command[1:]], check=False, env=os.environ | added).returncode


def _show(recipe: "Recipe") -> int:
    """Print the recipe and what it needs; refuses what the run would of recipe, model and data before it starts."""
    import yaml

    from services.training.driver import absolute, preview
    from services.training.forecast import forecast

    placed = absolute(recipe)
    try:
        config, data, steps = preview(placed)
        found = forecast(placed, config)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")
    total = found.dense + found.experts
    at_most = "at most " if recipe.method == "esft" else ""
    trained = found.trained_dense + found.trained_experts
    hosts, service = recipe.experts.hosts, recipe.experts.service
    place = f" in hosts of {service}" if service is not None else ""
    console = Console(highlight=False)
    lines = [
        f"# parameters        {total:,}: {found.dense:,} dense, {found.experts:,} in routed experts",
        f"# trained           {at_most}{trained:,}: {found.trained_dense:,} dense, {found.trained_experts:,} in hosts",
        f"# each expert host  {_size(found.host_bytes)} for weights, gradients and optimizer, of {hosts}{place},"
        f" and some {_size(found.host_activation_bytes)} of activations",
        f"# each worker       {_size(found.worker_bytes)} and some {_size(found.activation_bytes)} of activations",
        f"# data              {len(data):,} samples, {data.samples.tokens:,} tokens",
        f"# steps             {steps:,}",
    ]
    for stage in found.stages:
        name = "a step" if len(found.stages) == 1 else f"from step {stage.from_step}"
        lines.append(f"# {name:16}  {stage.tokens:,} tokens, {stage.micro_batches} micro-batches a worker")
    for line in lines:
        console.print(line, soft_wrap=True)
    return 0


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
