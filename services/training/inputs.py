"""What a recipe trains on, and for how long: the same for the command and for every worker."""

from services.training.data.training_data import TrainingData
from services.training.data.training_tokenizer import TrainingTokenizer
from services.training.recipe import Recipe
from services.training.schedule import batch_tokens


def load_data(recipe: Recipe) -> TrainingData:
    """Raises ValueError naming the first problem."""
    data = recipe.data
    tokenizer = TrainingTokenizer.load(recipe.model)
    return TrainingData.load(
        data.files, tokenizer, data.sequence_length, data.format, data.overlong, data.packing, recipe.seed
    )


def count_steps(recipe: Recipe, data: TrainingData) -> int:
    """Steps of a run: as many as the recipe says, or as its epochs take."""
    if recipe.steps is not None:
        return recipe.steps
    assert recipe.epochs is not None
    cursor, steps = 0, 0
    while cursor < recipe.epochs * len(data):
        cursor = data.after(cursor, batch_tokens(recipe.stages, steps))
        steps += 1
    return steps
