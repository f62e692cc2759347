"""What a recipe trains on, and for how long: the same for the command and for every worker."""

from pathlib import Path

from services.training.data.samples import SampleSet
from services.training.data.training_data import TrainingData
from services.training.data.training_tokenizer import TrainingTokenizer
from services.training.recipe import Recipe
from services.training.schedule import batch_tokens, check_schedule

SHARED = "samples.safetensors"  # in the output directory while the run lasts


def load_data(recipe: Recipe) -> TrainingData:
    """They end with the recipe's epochs. Raises ValueError naming the first problem."""
    data = recipe.data
    tokenizer = TrainingTokenizer.load(recipe.model)
    return TrainingData.load(
        data.files,
        tokenizer,
        data.sequence_length,
        data.format,
        data.overlong,
        data.packing,
        recipe.seed,
        recipe.epochs,
        data.ignore,
    )


def share_data(output_dir: Path, data: TrainingData) -> Path:
    """Write the encoded samples for `shared_data`, so that no worker reads and encodes the files again."""
    path = output_dir / SHARED
    data.samples.save(path)
    return path


def shared_data(recipe: Recipe) -> TrainingData:
    """What `load_data` gave the run's command; raises OSError where the command has ended and taken it along."""
    samples = SampleSet.open(recipe.output_dir / SHARED)
    return TrainingData(samples, recipe.data.sequence_length, recipe.data.packing, recipe.seed, recipe.epochs)


def count_steps(recipe: Recipe, data: TrainingData) -> int:
    """Steps of a run: as many as the recipe says, or as its epochs take.

    Raises ValueError where they are too few for the recipe's warm-up or for one of its batch stages.
    """
    if recipe.steps is not None:
        return recipe.steps
    assert data.end is not None
    cursor, steps = 0, 0
    while cursor < data.end:
        cursor = data.after(cursor, batch_tokens(recipe.stages, steps))
        steps += 1
    check_schedule(steps, recipe.warmup_steps, recipe.stages)
    return steps
