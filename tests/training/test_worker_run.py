"""A Ray Train worker's whole run, on hosts of this process: what the recipe says is what is trained and written."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DeepseekV2ForCausalLM

from attention.training.decoder import ForwardOptions, TrainingDecoder
from attention.training.ranks import OneRank
from attention.training.worker import StepPlan, StepReport, TrainingWorker
from model.adapters.overlay import merged_tensors, open_with_adapters
from model.checkpoint import Checkpoint
from model.config import read_raw_config
from model.export import export_checkpoint
from router.losses import BalanceCoefficients
from services.training import ray_loop
from services.training.driver import first_weights, preview, service_spec
from services.training.inputs import load_data, share_data
from services.training.recipe import Recipe, parse_recipe
from services.training.recipe_sections import Yarn
from services.training.result import raw_with_yarn
from tests.training.plain_loop import plain_losses
from tests.training.rig import Doors, Rig, make_rig
from tests.training.small_run import small_run

YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
BUNDLED = Path(__file__).parents[2] / "models" / "bundled"  # knows something, so that a change of its model is seen


@pytest.fixture
def small(checkpoint: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    return small_run(checkpoint("mini"), tmp_path) | {"lr": 1e-2, "schedule": "constant", "workers": {"threads": 1}}


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Recipe], ray_loop._WorkerRun]]:
    """A run of one worker, whose hosts are not asked for of Ray."""
    opened: list[Doors] = []

    def begin(recipe: Recipe) -> ray_loop._WorkerRun:
        _, _, steps = preview(recipe)
        first = first_weights(recipe)
        opened.append(Doors(first))

        def here(*_: object) -> SimpleNamespace:
            rig = make_rig(first.directory, 2, doors=opened[-1])
            return hosts_of(rig, opened[-1])

        monkeypatch.setattr(ray_loop, "TrainingHosts", here)
        recipe.output_dir.mkdir(exist_ok=True)
        share_data(recipe.output_dir, load_data(recipe))
        return ray_loop._WorkerRun(recipe, service_spec(recipe, first), steps, OneRank())

    yield begin
    for doors in opened:
        doors.close()


def hosts_of(rig: Rig, doors: Doors) -> SimpleNamespace:
    table = rig.table
    return SimpleNamespace(
        client=rig.clients[0], peers=doors.peers, newest=table.newest, used=table.used, close=lambda: None
    )


def records(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.output_dir / "metrics.jsonl").read_text().splitlines()]


def first_loss(recipe: Recipe, model: Path) -> float:
    """Of the first step's samples, by transformers."""
    oracle = DeepseekV2ForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    data = load_data(recipe)
    batch = data.batch(0, batch_tokens=recipe.batch_tokens)
    total = 0.0
    for index in batch.samples:
        token_T = torch.tensor(data.samples[index].ids.tolist())
        with torch.no_grad():
            out = oracle(token_T[None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(out, token_T[1:], reduction="sum"))
    return total / batch.targets


def merged(base: Path, adapter: Path, out: Path) -> Path:
    source = open_with_adapters(base, [adapter])
    return export_checkpoint(out, read_raw_config(base), merged_tensors(source), base)


def test_rate_batch_and_optimizer_are_the_recipes(
    small: dict[str, Any], begin: Callable[[Recipe], ray_loop._WorkerRun]
) -> None:
    del small["batch_tokens"]
    given = {
        "steps": 10,
        "lr": 1e-3,
        "warmup_steps": 2,
        "schedule": "steps",
        "batch_stages": [{"from_step": 0, "tokens": 64}, {"from_step": 4, "tokens": 128}],
        "optimizer": {"beta1": 0.8, "beta2": 0.9, "weight_decay": 0.2, "clip": 4.0},
    }
    recipe = parse_recipe(small | given)
    begin(recipe).run()
    made = records(recipe)
    rates = [1e-3 * times for times in (0.5, 1, 1, 1, 1, 1, 0.316, 0.316, 0.316, 0.316**2)]
    assert [record["lr"] for record in made] == pytest.approx(rates)
    norms = [record["grad_norm"] for record in made]
    assert min(norms) < 4.0 < max(norms)  # AdamW would not see that all of them are scaled alike
    expected = plain_losses(recipe, rates, [64] * 4 + [128] * 6, (0.8, 0.9), 0.2, 4.0)
    assert [record["loss"] for record in made] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("method", "name"), [("full", "model"), ("lora", "adapter"), ("esft", "delta")])
def test_what_is_written_has_learned(
    small: dict[str, Any], begin: Callable[[Recipe], ray_loop._WorkerRun], tmp_path: Path, method: str, name: str
) -> None:
    recipe = parse_recipe(small | {"method": method})
    begin(recipe).run()
    made = records(recipe)
    assert [record["step"] for record in made] == [1, 2, 3, 4]
    before = first_loss(recipe, recipe.model)
    assert made[0]["loss"] == pytest.approx(before, rel=1e-5)
    written = recipe.output_dir / name
    model = written if method == "full" else merged(recipe.model, written, tmp_path / "merged")
    assert first_loss(recipe, model) < 0.99 * before


def test_the_share_and_the_way_of_counting_choose_the_experts(
    small: dict[str, Any], begin: Callable[[Recipe], ray_loop._WorkerRun], tmp_path: Path
) -> None:
    chosen: dict[tuple[str, float], set[tuple[int, int]]] = {}
    for number, (by, share) in enumerate((("gate", 0.3), ("token", 0.3), ("gate", 0.6))):
        esft = {"by": by, "share": share, "samples": 9}
        given = {"model": str(BUNDLED), "output_dir": str(tmp_path / f"{number}"), "method": "esft", "esft": esft}
        recipe = parse_recipe(small | given | {"steps": 1})
        begin(recipe).run()
        pairs = json.loads((recipe.output_dir / "experts.json").read_text())["pairs"]
        chosen[by, share] = {(layer, expert) for layer, expert in pairs}
        result = open_with_adapters(recipe.model, [recipe.output_dir / "delta"])
        base = Checkpoint.open(recipe.model)
        differing = {key for key in base.entries if not torch.equal(base.tensor(key), result.tensor(key))}
        assert {(int(key.split(".")[2]), int(key.split(".")[5])) for key in differing} == chosen[by, share]
    assert chosen["gate", 0.3] < chosen["gate", 0.6]
    assert chosen["gate", 0.3] != chosen["token", 0.3]


def test_a_longer_context_is_trained_and_written(
    small: dict[str, Any], begin: Callable[[Recipe], ray_loop._WorkerRun], tmp_path: Path
) -> None:
    recipe = parse_recipe(small | {"model": str(BUNDLED), "yarn": YARN, "steps": 1})
    begin(recipe).run()
    raw = raw_with_yarn(read_raw_config(recipe.model), Yarn.model_validate(YARN))
    longer = export_checkpoint(tmp_path / "longer", raw, merged_tensors(Checkpoint.open(recipe.model)), recipe.model)
    expected = first_loss(recipe, longer)
    assert expected != pytest.approx(first_loss(recipe, recipe.model), rel=1e-3)
    assert records(recipe)[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert read_raw_config(recipe.output_dir / "model") == read_raw_config(longer)
    assert first_loss(recipe, recipe.output_dir / "model") != expected


def test_random_weights_are_trained_with_balance_and_dropping(
    small: dict[str, Any], begin: Callable[[Recipe], ray_loop._WorkerRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    balance = {"expert": 0.003, "device": 0.05, "communication": 0.02}
    recipe = parse_recipe(
        small | {"init": "random", "balance": balance, "drop_tokens": True, "checkpointing": True, "steps": 2}
    )
    options: list[ForwardOptions] = []
    protected: list[bool] = []  # of each micro-batch, whether it is known what is kept whole
    make, step = TrainingDecoder.__init__, TrainingWorker.step

    def note_options(decoder: TrainingDecoder, *given: Any) -> None:
        make(decoder, *given)
        options.append(decoder._options)

    def note_plan(worker: TrainingWorker, plan: StepPlan) -> StepReport:
        protected.extend(one is not None for one in plan.protected)
        return step(worker, plan)

    monkeypatch.setattr(TrainingDecoder, "__init__", note_options)
    monkeypatch.setattr(TrainingWorker, "step", note_plan)
    begin(recipe).run()
    whole = ForwardOptions(BalanceCoefficients(0.003, 0.05, 0.02), drop=True, checkpointing=True)
    assert whole in options
    assert protected
    assert all(protected)
    made = records(recipe)
    assert all(record["balance"] > 0.02 for record in made)
    assert all(record["dropped"] > 0 for record in made)
    assert made[0]["loss"] == pytest.approx(math.log(512), rel=0.02)  # knows nothing
