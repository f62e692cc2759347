"""Recipes: what is wrong is named, what is left out has a value, and each method trains what it says."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from experts.frames import MAX_PAYLOAD_BYTES
from model.adapters.errors import AdapterError
from model.checkpoint import Checkpoint
from model.config import parse_config
from services.data_command import SEQUENCE_LENGTH
from services.training.checks import check_recipe
from services.training.driver import absolute, service_spec
from services.training.forecast import forecast
from services.training.inputs import count_steps, load_data
from services.training.method import make_method
from services.training.recipe import RecipeError, parse_recipe
from services.training.recipe_file import load_recipe
from services.training.recipe_sections import Data
from services.training.result import raw_with_yarn, with_yarn
from services.training.schedule import LearningRate, batch_tokens
from tests.checkpoints import SHAPES

RAW: dict[str, object] = {
    "model": "m",
    "output_dir": "o",
    "data": {"files": ["d.jsonl"], "sequence_length": 64},
    "steps": 10,
    "batch_tokens": 128,
    "micro_batch_tokens": 64,
}
EXAMPLES = sorted(Path("examples").glob("*.yaml"))
CONFIG = parse_config({"architectures": ["DeepseekV2ForCausalLM"], **SHAPES["tiny"]})


def write(directory: Path, **changed: object) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RAW, **changed}))
    return path


def test_overrides_reach_into_sections(tmp_path: Path) -> None:
    lora = ["method=lora", "lora.targets=[experts]"]
    recipe = load_recipe(write(tmp_path), [*lora, "lr=1e-5", "experts.hosts=4", "data.files=[a, b]"])
    assert (recipe.lr, recipe.experts.hosts, recipe.lora.targets) == (1e-5, 4, ("experts",))
    assert recipe.data.files == (Path("a"), Path("b"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("learning_rate=1", "learning_rate is not a field of a recipe; expected one of .*batch_stages.* lr,"),
        ("experts.host=1", "experts.host is not a field of a recipe; expected one of .*hosts"),
        ("lr=fast", "lr: .*valid number.*'fast'"),
        ("lr=nan", "lr: .*nan"),
        ("lr=-1", "lr: .*greater than 0.*-1"),
        ("method=qlora", "method: .*'full', 'lora' or 'esft'.*'qlora'"),
        ("epochs=2", "steps is 10 and epochs 2.0; expected exactly one"),
        ("steps=null", "steps is None and epochs None"),
        ("experts.replicas=3", "experts.replicas is 3; expected at most experts.hosts"),
        ("experts={service: p8000, threads: 2}", "service is 'p8000' and threads=2; expected service alone"),
        ("experts={service: p8000, gpus: 1, resources: {a: 1}}", "service is 'p8000' and gpus=1.0, resources={'a'"),
        (
            "experts={service: p8000, tls: {certificate: a, key: b, root: c}}",
            "service is 'p8000' and tls is given; expected service alone: a run in its hosts is guarded by that",
        ),
        ("experts.tls={certificate: a, key: b}", "experts.tls.root: Field required"),
        (
            "experts.tls={certificate: a, key: b, root: c, ca: d}",
            "experts.tls.ca is not a field of a recipe; expected one of certificate, key, name, root",
        ),
        ("experts.service=not one", "experts.service: .*match"),
        ("workers.most=0", "workers.most: .*greater than or equal to 1"),
        ("workers={most: 2, resize_every_s: 0.5}", "workers.resize_every_s: .*greater than or equal to 1.*0.5"),
        ("workers.resize_every_s=5", "resize_every_s is 5.0 and least and most are 1; expected it left out, or most"),
        ("batch_tokens=32", "a step has 32 tokens; expected at least data.sequence_length \\(64\\)"),
        ("micro_batch_tokens=32", "micro_batch_tokens is 32; expected at least data.sequence_length"),
        ("data.files=[]", r"data.files: the list is empty; expected one entry at least \(given: \[\]\)"),
        ("data.files=a.jsonl", r"data.files: expected a list, such as \[a, b\] \(given: 'a.jsonl'\)"),
        ("seed=-1", "seed: .*greater than or equal to 0"),
        ("batch_stages=[{from_step: 5, tokens: 64}]", "batch_stages begin at steps \\[5\\]"),
        ("init=random", None),
        ("epochs=inf", "epochs: .*inf"),
        ("steps=true", "steps: a truth value where none is expected \\(given: True\\)"),
        ("lr=true", "lr: a truth value"),
        ("batch_stages=[{from_step: false, tokens: 64}]", "batch_stages.0.from_step: a truth value"),
        ("optimizer.eps=inf", "optimizer.eps: .*finite number.*inf"),
        ("optimizer.weight_decay=inf", "optimizer.weight_decay: .*finite number"),
        ("optimizer.beta1=nan", "optimizer.beta1: .*nan"),
        ("lora={alpha: .inf}", "lora.alpha: .*finite number"),
        ("yarn={factor: .inf, original_max_position_embeddings: 64}", "yarn.factor: .*inf"),
        ("yarn={factor: 1.0e+300, original_max_position_embeddings: 64}", "yarn.factor: .*less than or equal to 10000"),
        ("yarn={factor: 2, original_max_position_embeddings: 64, mscale: .nan}", "yarn.mscale: .*nan"),
        (
            "yarn={factor: 2, original_max_position_embeddings: 64, beta_fast: 0.5}",
            "beta_fast is 0.5; expected at leas",
        ),
        (
            "yarn={factor: 2, original_max_position_embeddings: 64, original_max: 64}",
            "yarn.original_max is not a field of a recipe; expected one of .*beta",
        ),
        ("batch_stages=[{from_step: 0, tokens: 64, at: 0}]", "stages.0.at is not a field .* one of from_step, tokens"),
        ("experts.resources={a: -1}", "experts.resources.a: .*greater than or equal to 0.*-1"),
        ("experts.resources={a: .inf}", "experts.resources.a: .*finite number"),
        ("experts.resources={a: true}", "experts.resources.a: a truth value"),
        ("warmup_steps=10", "warmup_steps is 10 and the run has 10 steps; expected less"),
        (
            "batch_stages=[{from_step: 0, tokens: 64}, {from_step: 10, tokens: 128}]",
            "one from step 10 on and the run has",
        ),
        ("lora.rank=8", "lora.rank is 8; expected it left out: method is full, which has no factors"),
        ("esft.share=0.5", "esft.share is 0.5; expected it left out: method is full, which chooses no experts"),
        ("init_std=0.02", "init_std is 0.02; expected it left out: init is checkpoint, which draws no weights"),
        ("batch_stages=[{from_step: 0, tokens: 64}]", "batch_tokens is 128; expected it left out: batch_stages say"),
        ("lr={a: 1, a: 2}", "lr: .*a is given in line 1 and in line 1; expected it once"),
        ("lr=2024-99-99", "lr: '2024-99-99' cannot be read as YAML"),
        ("lr", "'lr' is no override; expected key=value"),
        ("lr.x=1", "lr.x"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, override: str, told: str | None) -> None:
    changed = {"lr": 1e-5} if override == "lr.x=1" else {}
    if told is None:
        assert load_recipe(write(tmp_path, **changed), [override]).init == "random"
        return
    with pytest.raises(RecipeError, match=told):
        load_recipe(write(tmp_path, **changed), [override])


def test_files_that_are_no_recipe_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml", [])
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="holds a list"):
        load_recipe(tmp_path / "list.yaml", [])
    for text, said in (("a: [", "<stream end>.* in line 1$"), ("a\nb: 1", " in line 2$"), ("a: \x00", "not allowed")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(RecipeError, match=f"cannot be read as YAML: .*{said}") as refused:
            load_recipe(tmp_path / "bad.yaml", [])
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["lora.rank", "no.such.key"])
def test_a_key_with_dots_in_the_file_is_named(tmp_path: Path, key: str) -> None:
    section, _, rest = key.partition(".")
    with pytest.raises(RecipeError, match=f"{key} is not a field of a recipe; only the .* {section}: {{{rest}: ...}}"):
        load_recipe(write(tmp_path, **{key: 8}), [])


def test_numbers_and_quoted_words_are_alike_in_the_file_and_beside_it(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace("steps: 10", "steps: 1e3\nlr: 2E-4\noutput_dir: '1e5'"))
    path.write_text(path.read_text().replace("output_dir: o\n", ""))
    assert load_recipe(path, []) == load_recipe(write(tmp_path), ["steps=1e3", "lr=2E-4", 'output_dir="1e5"'])
    assert load_recipe(path, ["experts.service='123'"]).experts.service == "123"


def test_a_key_that_is_given_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text("experts:\n  hosts: 2\n  cpus: 1\n  hosts: 3\nlr: 1.0e-5\n")
    with pytest.raises(RecipeError, match="hosts is given in line 2 and in line 4; expected it once"):
        load_recipe(path, [])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["lr=1e-4", "steps=7", "lr=1e-5"], "lr=1e-4 and lr=1e-5 both give lr; expected it once"),
        (["experts.hosts=2", "experts.hosts=2"], "experts.hosts=2 and experts.hosts=2 both give experts.hosts"),
        (["experts.hosts=4", "experts={replicas: 2}"], "experts.hosts=4 and experts={replicas: 2} both give experts;"),
        (["experts={hosts: 4}", "experts.hosts=2"], "experts={hosts: 4} and experts.hosts=2 both give experts;"),
    ],
)
def test_an_override_that_another_undoes_is_refused(tmp_path: Path, overrides: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(told)):
        load_recipe(write(tmp_path), overrides)
    load_recipe(write(tmp_path), ["lr=1e-5", "lr_decay=0.5", "experts.hosts=2", "experts.replicas=2"])


def test_keys_that_are_merged_may_be_given_again(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + "balance: {<<: {expert: 0.1, device: 0.2}, device: 0.3}\n")
    balance = load_recipe(path, []).balance
    assert (balance.expert, balance.device) == (0.1, 0.3)


@pytest.mark.parametrize("method", ["lora", "esft"])
def test_yarn_is_refused_where_the_result_could_not_tell_of_it(tmp_path: Path, method: str) -> None:
    yarn = "yarn={factor: 2, original_max_position_embeddings: 64}"
    with pytest.raises(
        RecipeError, match=f"yarn is given and method is {method}; expected method full: .* config.json"
    ):
        load_recipe(write(tmp_path), [yarn, f"method={method}"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lora", "lora.rank=4"],
        ["method=esft", "esft.share=0.3"],
        ["init=random", "init_std=0.02"],
        ["yarn={factor: 2, original_max_position_embeddings: 64}"],
        ["batch_tokens=4096", "batch_stages=[{from_step: 0, tokens: 64}, {from_step: 5, tokens: 256}]"],
        ["experts.tls={certificate: /a, key: /b, root: /c}", "experts.transport=grpc"],
        ["experts.resources={a: 0.5}", "snapshots.at_end=false", "warmup_steps=9"],
    ],
)
def test_a_recipe_that_is_written_out_is_read_again(tmp_path: Path, overrides: list[str]) -> None:
    """As the workers get it, and as whoever kept what `--dry-run` printed reads it."""
    recipe = load_recipe(write(tmp_path), overrides)
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    printed = tmp_path / "printed.yaml"
    printed.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    assert load_recipe(printed, []) == recipe


def test_hosts_of_a_service_go_through_plain_data(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path), ["experts.service=p8000", "experts.transport=grpc"])
    assert recipe.experts.service == "p8000"
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe  # as the workers get it


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_recipes(path: Path) -> None:
    recipe = load_recipe(path, [])
    assert all(file.exists() for file in recipe.data.files)
    make_method(recipe, CONFIG, "run")
    assert forecast(recipe, CONFIG).trained_experts > 0


def test_hosts_keep_activations_unless_they_are_computed_again(tmp_path: Path) -> None:
    """Nor where rows that come forward are dropped, and do not come back."""

    def kept(*overrides: str) -> int:
        recipe = load_recipe(write(tmp_path), list(overrides))
        needs = forecast(recipe, CONFIG).host_activation_bytes
        assert make_method(recipe, CONFIG, "run").experts.keeps is (needs > 0)
        return needs

    slots = CONFIG.num_experts_per_tok * len(CONFIG.moe_layers)
    row = 4 * (CONFIG.hidden_size + 2 * CONFIG.moe_intermediate_size)
    assert kept("experts.hosts=1") == 64 * slots * row
    assert kept("experts.hosts=2", "workers.least=2") == 64 * slots * row
    assert kept("checkpointing=true") == kept("drop_tokens=true") == 0


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_learn_from_their_data(path: Path) -> None:
    """At full rate for most of their steps, and from each sample at most once a step."""
    recipe = load_recipe(path, ["model=models/bundled"])
    data = load_data(recipe)
    steps = count_steps(recipe, data)
    assert steps >= 15
    assert recipe.warmup_steps <= steps / 5
    samples = data.batch(0, batch_tokens=recipe.stages[-1].tokens).samples
    assert len(set(samples)) == len(samples)


def test_the_learning_rate_has_the_papers_shape() -> None:
    rate = LearningRate(peak=1.0, warmup_steps=10)
    assert [rate.at(step, 100) for step in (0, 4, 9, 10, 59)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert [rate.at(step, 100) for step in (60, 89)] == pytest.approx([0.316, 0.316])
    assert rate.at(90, 100) == pytest.approx(0.316**2)
    uneven = LearningRate(peak=1.0, decays_at=(0.07, 0.55), decay=0.5)  # 7.000000000000001 and 55.00000000000001 of 100
    assert [uneven.at(step, 100) for step in (6, 7, 54, 55)] == [1.0, 0.5, 0.5, 0.25]
    cosine = LearningRate(peak=2.0, schedule="cosine", lowest=0.1)
    assert [cosine.at(step, 100) for step in (0, 50, 100)] == pytest.approx([2.0, 1.1, 0.2])
    warm = LearningRate(peak=2.0, schedule="cosine", lowest=0.1, warmup_steps=20)
    assert [warm.at(step, 100) for step in (19, 20, 60, 100)] == pytest.approx([2.0, 2.0, 1.1, 0.2])
    constant = LearningRate(peak=2.0, schedule="constant", warmup_steps=2)
    assert [constant.at(step, 100) for step in (0, 1, 2, 99)] == [1.0, 2.0, 2.0, 2.0]


def test_a_recipe_shapes_its_learning_rate(tmp_path: Path) -> None:
    path = write(tmp_path)
    steps = load_recipe(path, ["lr=1.0", "schedule=steps", "lr_decays_at=[0.25, 0.5, 0.75]", "lr_decay=0.5"])
    assert [steps.learning_rate.at(step, 100) for step in (24, 25, 50, 99)] == [1.0, 0.5, 0.25, 0.125]
    cosine = load_recipe(path, ["lr=1.0", "schedule=cosine", "lr_lowest=0.0"]).learning_rate
    assert [cosine.at(step, 100) for step in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule=cosine", "lr_decay=0.5"], "lr_decay is 0.5; expected it left out: schedule is cosine"),
        (["schedule=steps", "lr_lowest=0.5"], "lr_lowest is 0.5; expected it left out: schedule is steps"),
        (["schedule=steps", "lr_decays_at=[0.9, 0.6]"], "expected rising shares of the steps"),
        (["schedule=steps", "lr_decays_at=[0.5, 0.5]"], "expected rising shares of the steps"),
        (["schedule=steps", "lr_decays_at=[0.5, 1.0]"], "between 0 and 1"),
        (["schedule=steps", "lr_decays_at=[0.0, 0.5]"], "between 0 and 1"),
    ],
)
def test_a_learning_rate_of_no_shape_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(write(tmp_path), overrides)


def test_the_batch_grows_by_stages(tmp_path: Path) -> None:
    stages = "batch_stages=[{from_step: 0, tokens: 64}, {from_step: 5, tokens: 256}]"
    recipe = load_recipe(write(tmp_path), ["batch_tokens=4096", stages])
    assert [batch_tokens(recipe.stages, step) for step in (0, 4, 5, 9)] == [64, 64, 256, 256]


def test_each_method_trains_what_it_says(tmp_path: Path) -> None:
    full = make_method(load_recipe(write(tmp_path), []), CONFIG, "run")
    assert (full.experts.only, full.experts.lora, full.factors) == (None, None, {})
    assert full.trains_dense("lm_head.weight")
    lora = make_method(load_recipe(write(tmp_path, method="lora"), ["lora.rank=4", "lora.alpha=8"]), CONFIG, "run")
    assert lora.experts.lora is not None
    assert lora.experts.lora.scale == lora.scale == 2.0
    assert "model.layers.0.self_attn.q_b_proj.lora_A" in lora.factors
    assert all(not factor.any() for name, factor in lora.factors.items() if name.endswith("lora_B"))
    first = lora.factors["model.layers.0.self_attn.q_b_proj.lora_A"]
    assert 0.9 * 128**-0.5 < first.abs().max() < 128**-0.5
    assert math.isclose(float(first.std()), 128**-0.5 / math.sqrt(3), rel_tol=0.1)
    dense = make_method(load_recipe(write(tmp_path, method="lora"), ["lora.targets=[attention]"]), CONFIG, "run")
    assert (dense.experts.only, dense.experts.lora) == ((), None)
    esft = make_method(load_recipe(write(tmp_path, method="esft"), []), CONFIG, "run", ((1, 2),))
    assert (esft.experts.only, esft.trains_dense("lm_head.weight")) == (((1, 2),), False)
    with pytest.raises(AdapterError, match="LoRA targets v_proj"):
        make_method(load_recipe(write(tmp_path, method="lora"), ["lora.targets=[v_proj]"]), CONFIG, "run")


def test_yarn_is_read_back_from_what_is_written(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path), ["yarn={factor: 8, original_max_position_embeddings: 64}"])
    raw = {"architectures": ["DeepseekV2ForCausalLM"], **SHAPES["tiny"]}
    written = parse_config(raw_with_yarn(raw, recipe.yarn))
    assert written == with_yarn(CONFIG, recipe.yarn)
    assert written.max_position_embeddings == 512


@pytest.mark.parametrize(
    ("raw", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 5000.0}, 5000.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}}, 7000.0),
        ({"rope_theta": 5000.0, "rope_scaling": {"type": "yarn"}}, 5000.0),
    ],
)
def test_a_longer_context_keeps_the_base_of_the_rotation(tmp_path: Path, raw: dict[str, object], theta: float) -> None:
    yarn = load_recipe(write(tmp_path), ["yarn={factor: 8, original_max_position_embeddings: 64}"]).yarn
    written = raw_with_yarn(raw | {"hidden_size": 256}, yarn)
    assert (written["rope_theta"], written["hidden_size"], written["max_position_embeddings"]) == (theta, 256, 512)
    assert written["rope_scaling"]["factor"] == 8
    assert "rope_parameters" not in written
    assert raw_with_yarn(raw, None) == raw


def test_what_a_job_writes_outlives_its_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write(tmp_path), [])
    monkeypatch.chdir(tmp_path)
    assert absolute(recipe).output_dir == tmp_path / "o"
    uploaded = tmp_path / "working_dir_files" / "_ray_pkg_1"
    uploaded.mkdir(parents=True)
    monkeypatch.chdir(uploaded)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert absolute(recipe).output_dir == tmp_path / "home" / "o"
    assert absolute(recipe).data.files == (uploaded / "d.jsonl",)


@pytest.mark.parametrize("working_directory", [".", "working_dir_files"])
def test_a_tilde_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, working_directory: str) -> None:
    recipe = load_recipe(write(tmp_path, model="~/m", output_dir="~/o"), ["data.files=[~/d.jsonl, ~nobody-known/d]"])
    (tmp_path / working_directory).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / working_directory)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    placed = absolute(recipe)
    assert (placed.model, placed.output_dir) == (tmp_path / "home" / "m", tmp_path / "home" / "o")
    assert placed.data.files == (tmp_path / "home" / "d.jsonl", Path.cwd() / "~nobody-known" / "d")


def test_runs_that_write_elsewhere_share_no_hosts(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    model = Checkpoint.open(checkpoint("tiny"))
    recipes = [absolute(load_recipe(write(tmp_path, output_dir=str(tmp_path / name / "out")), [])) for name in "aba"]
    first, other, again = (service_spec(recipe, model).namespace for recipe in recipes)
    assert first != other
    assert first == again  # the same run, begun again, finds its hosts
    wants_more = absolute(load_recipe(write(tmp_path, output_dir=str(tmp_path / "a" / "out")), ["experts.hosts=3"]))
    assert service_spec(wants_more, model).namespace != first  # and not those of another number, or of another model


def test_data_are_checked_against_a_recipes_default_context() -> None:
    assert Data.model_fields["sequence_length"].default == SEQUENCE_LENGTH


def test_a_batch_that_no_frame_holds_is_refused_beforehand(tmp_path: Path) -> None:
    most = MAX_PAYLOAD_BYTES // (4 * CONFIG.hidden_size * CONFIG.num_experts_per_tok)
    for hosts in (1, 2):
        fits = load_recipe(write(tmp_path), [f"micro_batch_tokens={hosts * most}", f"experts.hosts={hosts}"])
        check_recipe(fits, CONFIG)
        over = load_recipe(write(tmp_path), [f"micro_batch_tokens={hosts * (most + 1)}", f"experts.hosts={hosts}"])
        with pytest.raises(ValueError, match=f"of {hosts} hosts one would answer with"):
            check_recipe(over, CONFIG)
