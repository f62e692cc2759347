"""Full fine-tuning beside transformers: each in processes of its own, begun anew for each repeat."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from pydantic import TypeAdapter

from bench.errors import BenchError
from bench.options import Options
from bench.prompts import draw_prompts
from bench.results import BASELINE, PARALLEL
from bench.summary import Collected
from bench.timing import Prompts
from bench.waiting import WAITING, Waiting, waiting_environment
from bench.worker import WorkerProcess
from model.tokenizer import Tokenizer

Say = Callable[[str], None]
SEQUENCE_TOKENS = 512
SEQUENCES = 4  # a step
STEPS = 4  # of which the first is not counted
QUICK_STEPS = 2
EXPERTS = ("grouped_mm", "eager")  # transformers' implementations
Way = tuple[Waiting, str]
TIMEOUT_S = 1800.0


def measure_training(options: Options, vocabulary: int, collected: Collected, say: Say) -> None:
    """Add the rates of transformers, if it takes part, and of a run with one worker and two expert actors."""
    collected.training_tokens = SEQUENCE_TOKENS * SEQUENCES
    steps = QUICK_STEPS if options.quick else STEPS
    way = _fastest(options, vocabulary) if BASELINE in options.contenders else None
    for repeat in range(options.repeats):
        if way is not None:
            rate = _transformers(options, way, vocabulary, repeat, steps)
            collected.training.setdefault(BASELINE, {})[repeat] = rate
            say(f"repeat {repeat + 1}/{options.repeats}  training  {BASELINE}  {rate:.0f} tokens/s")
        rate = _shoal(options, vocabulary, repeat, steps)
        collected.training.setdefault(PARALLEL, {})[repeat] = rate
        say(f"repeat {repeat + 1}/{options.repeats}  training  {PARALLEL}  {rate:.0f} tokens/s")


def _batch(options: Options, vocabulary: int, repeat: int, step: int, tokens: int = SEQUENCE_TOKENS) -> Prompts:
    return draw_prompts(f"{options.seed}-training-{repeat}-{step}", SEQUENCES, tokens, vocabulary)


def text_of(tokenizer: Tokenizer, ids: Sequence[int], tokens: int) -> str:
    """A beginning of what random ids say, its ASCII alone, that is so many tokens when it is read again.

    Raises BenchError where all of it is less.
    """
    text = "".join(filter(str.isascii, tokenizer.decode(ids)))
    least, most = 0, len(text)
    while least < most:  # a character more is a token more at most
        middle = (least + most) // 2
        if len(tokenizer.encode(text[:middle], add_special_tokens=False)) < tokens:
            least = middle + 1
        else:
            most = middle
    found = len(tokenizer.encode(text[:least], add_special_tokens=False))
    if found != tokens:
        raise BenchError(f"a text of {len(ids)} random tokens has {found} to train on; expected {tokens}")
    return text[:least]


def _fastest(options: Options, vocabulary: int) -> Way:
    """The way in which transformers takes less time for a second step."""
    batch = _batch(options, vocabulary, 0, 0)
    tried = {
        (wait, experts): _steps(options, (wait, experts), [batch, batch])[1] for wait in WAITING for experts in EXPERTS
    }
    return min(tried, key=lambda way: tried[way])


def _transformers(options: Options, way: Way, vocabulary: int, repeat: int, steps: int) -> float:
    """Tokens a second."""
    batches = [_batch(options, vocabulary, repeat, step) for step in range(steps)]
    return SEQUENCES * SEQUENCE_TOKENS / statistics.median(_steps(options, way, batches)[1:])


def _steps(options: Options, way: Way, batches: Sequence[Prompts]) -> list[float]:
    wait, experts = way
    arguments = [str(options.checkpoint), str(options.threads), experts]
    worker = WorkerProcess("bench.training_worker", arguments, waiting_environment(wait, options.threads))
    try:
        return [worker.ask("step", batch, TypeAdapter(float)) for batch in batches]
    finally:
        worker.stop()


def _shoal(options: Options, vocabulary: int, repeat: int, steps: int) -> float:
    """Tokens a second of `python -m services.train`, by its own records."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        directory = Path(scratch)
        tokenizer = Tokenizer.load(options.checkpoint)
        text = directory / "text.jsonl"
        with text.open("w", encoding="utf-8") as file:
            for step in range(steps):
                for sequence in _batch(options, vocabulary, repeat, step, 2 * SEQUENCE_TOKENS):
                    written = text_of(tokenizer, sequence, SEQUENCE_TOKENS - 1)  # and the token that ends a document
                    file.write(json.dumps({"text": written}) + "\n")
        recipe = {
            "model": str(options.checkpoint.resolve()),
            "output_dir": str(directory / "run"),
            "data": {"files": [str(text)], "sequence_length": SEQUENCE_TOKENS, "overlong": "split"},
            "steps": steps,
            "batch_tokens": SEQUENCES * SEQUENCE_TOKENS,
            "micro_batch_tokens": SEQUENCES * SEQUENCE_TOKENS,
            "lr": 1e-6,
            "snapshots": {"every_steps": 1000, "at_end": False},
            "export": False,
            "experts": {"hosts": 2},
        }
        path = directory / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-m", "services.train", str(path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines()
            raise BenchError(f"training did not end well: {lines[-1] if lines else 'no output'}")
        records = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([float(record["tokens_per_s"]) for record in records[1:]])
