"""A run on a cluster uses a node that joins, goes on without it when it dies, and keeps its curve throughout."""

import itertools
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from model.snapshots.history import snapshots
from model.snapshots.layout import step_of
from services.training.recipe import parse_recipe
from tests.end_to_end import ray_nodes
from tests.end_to_end.clients import free_port
from tests.end_to_end.ray_nodes import HEAD, RayNode, start_node
from tests.end_to_end.test_training import WAIT_S, curve, records, training
from tests.training.plain_loop import plain_losses
from tests.training.small_run import small_run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

LR = 1e-3
PLAIN = ((0.9, 0.95), 0.1, 1.0)  # betas, weight decay and clipping
LONG = 100_000  # steps; the run is ended when it has been through all of them


class Cluster:
    """A head and nodes that join it, each with room for one worker."""

    def __init__(self, directory: Path) -> None:
        port = free_port()
        self.address = f"{HEAD}:{port}"
        self.variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(24)}
        arguments = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={directory}", "--num-cpus=1"]
        self.nodes = [start_node(HEAD, arguments, self.variables)]

    def join(self) -> RayNode:
        address = f"127.0.0.{next(ray_nodes.NUMBERS)}"
        node = start_node(address, [f"--address={self.address}", "--num-cpus=1"], self.variables)
        self.nodes.append(node)
        return node

    def end(self) -> None:
        for node in self.nodes[::-1]:
            if node.alive:
                node.kill()


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    running = Cluster(tmp_path_factory.mktemp("ray"))
    try:
        yield running
    finally:
        running.end()


def wait_for_snapshot(out: Path, workers: int, after: int, process: "subprocess.Popen[str]") -> int:
    """The newest snapshot's step, once that is later than `after` and so many workers made it."""
    deadline_s = time.monotonic() + WAIT_S
    while True:
        made_by = {int(record["step"]): record["workers"] for record in records(out)}
        newest = next((step_of(path) for path in snapshots(out / "snapshots")), 0)
        if newest > after and made_by.get(newest) == workers:
            return newest
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s, f"no snapshot of {workers} workers after step {newest}"
        time.sleep(0.05)


def test_a_run_grows_onto_a_node_that_joins_and_goes_on_without_it_when_it_dies(
    cluster: Cluster, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = parse_recipe(
        small_run(checkpoint("mini"), tmp_path)
        | {
            "steps": LONG,
            "lr": LR,
            "schedule": "constant",
            "snapshots": {"every_steps": 2},
            "workers": {"least": 1, "most": 2, "threads": 1, "resize_every_s": 2},
            "export": False,
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    with training(path, out, variables=cluster.variables | {"RAY_ADDRESS": cluster.address}) as process:
        alone = wait_for_snapshot(out, 1, 0, process)
        node = cluster.join()
        grown = wait_for_snapshot(out, 2, alone, process)
        node.kill()
        wait_for_snapshot(out, 1, grown, process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 128 + signal.SIGTERM, output
    made = curve(out)
    assert [count for count, _ in itertools.groupby(record["workers"] for record in records(out))] == [1, 2, 1]
    losses = [loss for loss, _, _ in made]
    expected = plain_losses(recipe, [LR] * len(made), [recipe.batch_tokens] * len(made), *PLAIN)
    assert losses == pytest.approx(expected, abs=1e-3)  # none of the samples left out, and none learned twice
