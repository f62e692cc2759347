"""What a run leaves is what was trained: as transformers and peft load it, and as it is served."""

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import peft
import pytest
import torch
from transformers import DeepseekV2ForCausalLM

from attention.training.parameters import DenseParameters
from experts.training.grpc_peer import GrpcPeers
from experts.training.states import encode_state
from experts.training.step_hosts import StepLost
from model.adapters.overlay import merged_tensors, open_with_adapters
from model.checkpoint import Checkpoint, CheckpointError
from model.config import read_raw_config
from model.export import export_checkpoint
from router.holding import Pair
from router.placement import Host, Placement
from services.cli import main
from services.training.method import Method, make_method
from services.training.recipe import Recipe, parse_recipe
from services.training.result import TrainedModel, write_result
from tests.oracle import logits
from tests.serving import greedy, make_engine, run
from tests.training.rig import Doors, Rig, make_rig, plans, samples

STEPS = 3
PROMPT = [5, 6, 7, 300, 9, 10, 11, 200]


@pytest.fixture
def doors(checkpoint: Callable[[str], Path]) -> Iterator[Doors]:
    made = Doors(Checkpoint.open(checkpoint("mini")))
    yield made
    made.close()


def train(
    path: Path, doors: Doors, method_name: str, only: tuple[tuple[int, int], ...] = ()
) -> tuple[Recipe, Method, Rig]:
    raw = {
        "model": str(path),
        "output_dir": "o",
        "data": {"files": ["d"], "sequence_length": 64},
        "steps": STEPS,
        "method": method_name,
    }
    factors = {"lora": {"rank": 3, "alpha": 6, "targets": ["attention", "dense", "shared", "experts"]}}
    recipe = parse_recipe(raw | factors if method_name == "lora" else raw)
    opened = Checkpoint.open(path)
    method = make_method(recipe, opened.config, "run", only)
    rig = make_rig(
        path,
        2,
        training=method.experts,
        doors=doors,
        make_dense=lambda checkpoint: DenseParameters.load(
            checkpoint, method.trains_dense, method.factors, method.scale
        ),
    )
    losses = [rig.step(plans(step, [[samples(512, (30, 20), 1)]], 1e-2))[0].loss for step in range(STEPS)]
    assert losses[-1] < losses[0]
    return recipe, method, rig


def write(out: Path, path: Path, recipe: Recipe, method: Method, rig: Rig, doors: Doors) -> Path:
    model = TrainedModel(rig.denses[0], rig.table.placement, doors.peers, STEPS)
    return write_result(out, recipe, Checkpoint.open(path), read_raw_config(path), method, model)


def next_loss(rig: Rig) -> float:
    """Of the weights as they are now."""
    return rig.step(plans(STEPS, [[samples(512, (30, 20), 1)]], 1e-2))[0].loss


def loss_of(model: object) -> float:
    """The same by transformers."""
    batch = samples(512, (30, 20), 1)
    total = 0.0
    for token_t, target_t in zip(batch.token_T.split(batch.lengths), batch.target_T.split(batch.lengths), strict=True):
        with torch.no_grad():
            out = model(token_t[None]).logits[0]  # type: ignore[operator]
        total += float(torch.nn.functional.cross_entropy(out, target_t, reduction="sum"))
    return total / batch.targets


def load(path: Path) -> DeepseekV2ForCausalLM:
    return DeepseekV2ForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def test_full_training_leaves_a_checkpoint(checkpoint: Callable[[str], Path], tmp_path: Path, doors: Doors) -> None:
    path = checkpoint("mini")
    recipe, method, rig = train(path, doors, "full")
    written = write(tmp_path, path, recipe, method, rig, doors)
    assert written == tmp_path / "model"
    assert (written / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
    assert loss_of(load(written)) == pytest.approx(next_loss(rig), rel=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_leaves_an_adapter_for_peft_that_is_served_and_merged(
    checkpoint: Callable[[str], Path], tmp_path: Path, doors: Doors, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint("mini")
    recipe, method, rig = train(path, doors, "lora")
    written = write(tmp_path, path, recipe, method, rig, doors)
    assert written == tmp_path / "adapter"
    expected = next_loss(rig)
    assert loss_of(peft.PeftModel.from_pretrained(load(path), written)) == pytest.approx(expected, rel=1e-5)
    assert loss_of(load(path)) > expected + 0.1
    merged = tmp_path / "merged"
    assert main(["export", str(path), "--adapter", str(written), "--out", str(merged)]) == 0
    assert "wrote" in capsys.readouterr().out
    assert loss_of(load(merged)) == pytest.approx(expected, rel=1e-5)
    served = open_with_adapters(path, [written])
    for name in ("model.layers.1.mlp.experts.5.up_proj.weight", "model.layers.0.self_attn.kv_b_proj.weight"):
        assert torch.equal(served.tensor(name), Checkpoint.open(merged).tensor(name))
        assert not torch.equal(served.tensor(name), Checkpoint.open(path).tensor(name))


def test_esft_leaves_a_delta_of_the_chosen_experts_alone(
    checkpoint: Callable[[str], Path], tmp_path: Path, doors: Doors
) -> None:
    path = checkpoint("mini")
    only = ((1, 2), (1, 5), (2, 0), (2, 7))
    recipe, method, rig = train(path, doors, "esft", only)
    written = write(tmp_path, path, recipe, method, rig, doors)
    assert written == tmp_path / "delta"
    merged = tmp_path / "merged"
    assert main(["export", str(path), "--adapter", str(written), "--out", str(merged)]) == 0
    assert loss_of(load(merged)) == pytest.approx(next_loss(rig), rel=1e-5)
    base, changed = Checkpoint.open(path), Checkpoint.open(merged)
    differing = {name for name in base.entries if not torch.equal(base.tensor(name), changed.tensor(name))}
    assert {tuple(map(int, (name.split(".")[2], name.split(".")[5]))) for name in differing} == set(only)
    assert not torch.equal(logits(path, PROMPT), logits(merged, PROMPT))


@pytest.mark.parametrize(("method_name", "only"), [("lora", ()), ("esft", ((1, 2), (2, 7)))], ids=["lora", "esft"])
def test_it_is_served_as_its_merged_export_is_and_as_transformers_has_it(
    checkpoint: Callable[[str], Path], tmp_path: Path, doors: Doors, method_name: str, only: tuple[tuple[int, int], ...]
) -> None:
    path = checkpoint("mini")
    written = write(tmp_path, path, *train(path, doors, method_name, only), doors)
    merged = tmp_path / "merged"
    assert main(["export", str(path), "--adapter", str(written), "--out", str(merged)]) == 0
    asked = greedy("a", PROMPT, 8, logprobs=5)
    plain, served, exported = (
        run(engine, [asked])["a"]
        for engine in (make_engine(path), make_engine(path, adapters=[written]), make_engine(merged))
    )
    assert (served.tokens, served.logprobs) == (exported.tokens, exported.logprobs)
    assert served.logprobs != plain.logprobs
    theirs = torch.log_softmax(logits(merged, PROMPT)[-1], dim=-1)
    assert served.logprobs[0].logprob == pytest.approx(float(theirs[served.tokens[0]]), abs=1e-4)


def test_an_export_that_cannot_be_done_says_why(
    checkpoint: Callable[[str], Path], tmp_path: Path, doors: Doors, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint("mini")
    recipe, method, rig = train(path, doors, "esft", ((1, 2),))
    delta = write(tmp_path, path, recipe, method, rig, doors)
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("kept")
    assert main(["export", str(path), "--adapter", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 1
    assert "none is no directory" in capsys.readouterr().err
    assert main(["export", str(path), "--adapter", str(delta), "--out", str(used)]) == 1
    assert "used exists and is not an empty directory" in capsys.readouterr().err
    assert (used / "file").read_text() == "kept"


def test_a_longer_run_leaves_its_shorter_ones_result(
    checkpoint: Callable[[str], Path], tmp_path: Path, doors: Doors
) -> None:
    path = checkpoint("mini")
    recipe, method, rig = train(path, doors, "full")
    first = write(tmp_path, path, recipe, method, rig, doors)
    kept = (first / "model.safetensors").read_bytes()
    second = write(tmp_path, path, recipe, method, rig, doors)
    assert (second, (tmp_path / "model-1" / "model.safetensors").read_bytes()) == (first, kept)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file gets longer than a thousand bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("method_name", "only"), [("full", ()), ("lora", ()), ("esft", ((1, 2),))], ids=["full", "lora", "esft"]
)
def test_on_a_full_disk_the_earlier_result_keeps_its_name(
    checkpoint: Callable[[str], Path], tmp_path: Path, doors: Doors, method_name: str, only: tuple[tuple[int, int], ...]
) -> None:
    path = checkpoint("mini")
    recipe, method, rig = train(path, doors, method_name, only)
    first = write(tmp_path, path, recipe, method, rig, doors)
    kept = {file.name: file.read_bytes() for file in first.iterdir()}
    with full_disk(), pytest.raises(CheckpointError, match=f"{first} cannot be written: .*; the same command tries"):
        write(tmp_path, path, recipe, method, rig, doors)
    assert list(tmp_path.iterdir()) == [first]
    assert {file.name: file.read_bytes() for file in first.iterdir()} == kept
    assert write(tmp_path, path, recipe, method, rig, doors) == first
    assert {file.name for file in tmp_path.iterdir()} == {first.name, f"{first.name}-1"}


@pytest.fixture
def mixed(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """Matrices in fp16, the rest in fp32; config.json names no dtype."""
    source = Checkpoint.open(checkpoint("mini"))
    tensors = ((name, tensor.half() if tensor.ndim == 2 else tensor) for name, tensor in merged_tensors(source))
    raw = {key: value for key, value in read_raw_config(source.directory).items() if "dtype" not in key}
    return export_checkpoint(tmp_path / "mixed", raw, tensors, source.directory)


def dtypes(path: Path) -> dict[str, str]:
    return {name: entry.dtype for name, entry in Checkpoint.open(path).entries.items()}


def test_each_tensor_keeps_its_dtype(mixed: Path, tmp_path: Path) -> None:
    doors = Doors(Checkpoint.open(mixed))
    with contextlib.closing(doors):
        recipe, method, rig = train(mixed, doors, "full")
        assert set(dtypes(mixed).values()) == {"F16", "F32"}
        assert dtypes(write(tmp_path, mixed, recipe, method, rig, doors)) == dtypes(mixed)
        drawn = recipe.model_copy(update={"init": "random"})  # its first weights are all fp32
        assert set(dtypes(write(tmp_path, mixed, drawn, method, rig, doors)).values()) == {"F32"}


@pytest.mark.parametrize("method_name", ["full", "esft"])
def test_a_number_that_its_dtype_cannot_hold_is_refused_and_the_earlier_result_stays(
    mixed: Path, tmp_path: Path, method_name: str
) -> None:
    doors = Doors(Checkpoint.open(mixed))
    out = tmp_path / "out"
    with contextlib.closing(doors):
        recipe, method, rig = train(mixed, doors, method_name, ((1, 2),))
        first = write(out, mixed, recipe, method, rig, doors)
        holder = next(host for host in rig.hosts.values() if (1, 2) in host.host.held)
        holder.expert((1, 2)).down[3, 1] = -7e4
        name = "model.layers.1.mlp.experts.2.down_proj.weight"
        with pytest.raises(
            CheckpointError, match=f"{name} has numbers of up to 70000, and F16 none beyond 65504: begin"
        ):
            write(out, mixed, recipe, method, rig, doors)
        assert list(out.iterdir()) == [first]
        holder.expert((1, 2)).down[3, 1] = -6e4
        write(out, mixed, recipe, method, rig, doors)


class Answers:
    """Peers that answer with these bytes, by host."""

    def __init__(self, **messages: bytes) -> None:
        self._messages = messages

    def peer(self, host: Host) -> "Answers":
        return Answers(only=self._messages[host.id])

    def states(self, pairs: list[Pair]) -> list[bytes]:
        return [self._messages["only"]]


def test_a_damaged_answer_is_as_good_as_none(checkpoint: Callable[[str], Path]) -> None:
    dense = DenseParameters.load(Checkpoint.open(checkpoint("mini")), lambda name: True)
    placement = Placement(1, (Host("a", 1, ""), Host("b", 1, "")), {1: ((0, 1),)})
    good = encode_state((1, 0), STEPS, {"weight": torch.ones(2)})
    damaged = good[:-1] + bytes([good[-1] ^ 1])
    stale = encode_state((1, 0), STEPS - 1, {"weight": torch.zeros(2)})
    for first in (damaged, stale):
        peers = cast(GrpcPeers, Answers(a=first, b=good))
        assert torch.equal(TrainedModel(dense, placement, peers, STEPS).state((1, 0))["weight"], torch.ones(2))
    with pytest.raises(StepLost):
        TrainedModel(dense, placement, cast(GrpcPeers, Answers(a=damaged, b=stale)), STEPS).state((1, 0))
