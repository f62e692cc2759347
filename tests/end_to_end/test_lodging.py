"""A run on a serving service's hosts has the curve that it has on hosts of its own, and changes no served token."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.spec import namespace_of
from tests.certificates import make_certificate
from tests.end_to_end.clients import wait_until
from tests.end_to_end.deployment import NAME, Deployment
from tests.end_to_end.prompts import mixed_bodies
from tests.end_to_end.streams import run_streams
from tests.end_to_end.test_training import curve, descendants, finish, training, wait_for_step, write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

STREAMS = 16
TOKENS = 32
STEPS = 16


@pytest.fixture(scope="module")
def service(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Over TLS, which a run on its hosts has as well."""
    arguments = {
        "experts": {"hosts": 2, "threads": 1},
        "attention": {"replicas": 1, "threads": 1},
        "tls": asdict(make_certificate(tmp_path_factory.mktemp("tls"))),
    }
    with Deployment(checkpoint("tiny"), **arguments) as running:
        yield running


def there() -> dict[str, str]:
    """Variables with which a command uses the service's Ray."""
    import ray

    return {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def expert_processes() -> list[int]:
    """Of this very Ray: hosts and stand-bys."""
    return sorted(pid for pid, line in descendants(os.getpid()) if line.startswith("ray::ExpertActor"))


def guests(service: Deployment) -> list[int]:
    """How many each host of the service has."""
    import ray

    from cluster.discovery import find_controller

    namespace = namespace_of(NAME)
    names = ray.get(find_controller(namespace).residents.remote())
    return [len(ray.get(ray.get_actor(name, namespace=namespace).guests.remote())) for name in names]


def test_a_run_on_the_services_hosts_has_the_same_curve_and_changes_no_token(
    service: Deployment, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = checkpoint("mini")
    own, guest = tmp_path / "own", tmp_path / "guest"
    given = {"steps": STEPS, "export": False, "snapshots": {"every_steps": 4}}
    bodies = mixed_bodies(checkpoint("tiny").name, STREAMS, TOKENS)
    with training(write_recipe(tmp_path, model, **given), own, variables=there()) as process:
        expected = [stream.answer for stream in run_streams(service.url, bodies)[0]]
        finish(process)
    assert all(answer[2] is None for answer in expected)
    service.wait_ready(standby=True)
    wait_until(lambda: len(expert_processes()) == 3)
    before = service.hosts()

    recipe = write_recipe(tmp_path, model, **given, experts={"hosts": 2})
    with training(recipe, guest, f"experts.service={NAME}", variables=there()) as process:
        wait_for_step(guest, 2, process)
        assert len(expert_processes()) == 3  # none was made for the run
        assert guests(service) == [1, 1]
        streams, _ = run_streams(service.url, bodies, lambda: os.kill(before[0]["pid"], signal.SIGKILL))
        assert [stream.answer for stream in streams] == expected
        output = finish(process)
    assert "is lost" in output  # so its guest had died with the host
    assert curve(guest) == curve(own)

    service.wait_ready(standby=True)
    wait_until(lambda: guests(service) == [0, 0] and len(expert_processes()) == 3)
    after = service.hosts()
    assert after[1]["pid"] == before[1]["pid"]
    assert [host["bytes"] for host in after] == [host["bytes"] for host in before]
    assert [stream.answer for stream in run_streams(service.url, bodies)[0]] == expected
