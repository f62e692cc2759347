"""What a recipe asks of a model that this model cannot do: known before anything is started, read or written."""

from experts.frames import MAX_PAIRS, MAX_PAYLOAD_BYTES
from model.adapters.spec import lora_modules
from model.config import ModelConfig
from router.losses import BalanceCoefficients
from services.training.initial import INITIAL
from services.training.method import lora_spec, make_method
from services.training.recipe import Recipe


def check_recipe(recipe: Recipe, config: ModelConfig) -> None:
    """`config` is the trained model's, with YaRN where the recipe has it.

    Raises ValueError naming the first thing that is wrong; AdapterError, which is one, for a LoRA target that the model
    lacks.
    """
    if not config.moe_layers:
        raise ValueError(f"{recipe.model} has no routed experts; expected a mixture-of-experts model")
    if recipe.experts.hosts > config.n_routed_experts:
        raise ValueError(
            f"experts.hosts is {recipe.experts.hosts}; expected at most {config.n_routed_experts}, the experts that a "
            "layer of this model has"
        )
    if recipe.data.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length is {recipe.data.sequence_length}; the model's context has "
            f"{config.max_position_embeddings} tokens: use less, or yarn"
        )
    balance = recipe.balance
    BalanceCoefficients(balance.expert, balance.device, balance.communication).check(config)
    if recipe.drop_tokens and config.n_group == 1:
        raise ValueError(
            "drop_tokens is true, but the model routes all its experts as one group (n_group is 1), whose load is the "
            "average: nothing would ever be dropped; leave drop_tokens out"
        )
    if recipe.method == "lora":
        _check_rank(recipe, config)
    _check_place(recipe)
    _check_frames(recipe, config)
    make_method(recipe, config, "checked")


def _check_rank(recipe: Recipe, config: ModelConfig) -> None:
    """A product of factors wider than the matrix itself can be no more than the matrix, and takes more memory."""
    for module, sides in lora_modules(config, lora_spec(recipe, config)).items():
        if recipe.lora.rank > min(sides):
            raise ValueError(
                f"lora.rank is {recipe.lora.rank}; expected at most {min(sides)}, the shorter side of {module}"
            )


def _check_place(recipe: Recipe) -> None:
    """What the run writes must not take the place of the model that it reads."""
    written = {"its first weights": INITIAL} if recipe.init == "random" else {}
    if recipe.method == "full" and recipe.export:
        written["its result"] = "model"
    for what, name in written.items():
        if recipe.model.is_relative_to(recipe.output_dir / name):
            raise ValueError(
                f"model is {recipe.model}, and the run would write {what} to {recipe.output_dir / name}; expected them "
                "apart: give another output_dir"
            )


def _check_frames(recipe: Recipe, config: ModelConfig) -> None:
    """Some host answers for its share of the slots at least, a row of fp32 each."""
    slots = recipe.micro_batch_tokens * config.num_experts_per_tok // recipe.experts.hosts
    if 4 * slots * config.hidden_size > MAX_PAYLOAD_BYTES or slots > MAX_PAIRS:
        raise ValueError(
            f"micro_batch_tokens is {recipe.micro_batch_tokens}: of {recipe.experts.hosts} hosts one would answer with "
            f"{slots} rows of {4 * config.hidden_size} bytes at once, where {MAX_PAYLOAD_BYTES} bytes and {MAX_PAIRS} "
            "rows pass; use less, or more experts.hosts"
        )
