"""How the controller of a service is found, or started by whoever needs it first."""

import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from cluster.controller import Controller
from cluster.joining import OtherFiles
from cluster.spec import CONTROLLER_NAME, ServiceSpec

JOIN_S = 120.0  # for the controller of an earlier service to end, and its own to start
RETRY_S = 0.2


def get_or_start_controller(spec: ServiceSpec) -> Any:
    """The service's controller, started if it does not run yet; safe to call from several actors at once."""
    return (
        ray.remote(Controller)
        .options(
            name=CONTROLLER_NAME,
            namespace=spec.namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=1000,
            num_cpus=spec.control_cpus,
        )
        .remote(spec)
    )


def join_service(spec: ServiceSpec, contents: str) -> tuple[Any, str]:
    """The controller of the very service that `spec` describes, and its token, for a worker whose files are `contents`.

    One that runs another description under the same name ends, with its hosts, and a new one is started. Raises
    OtherFiles where the service has other files, and RuntimeError where it is not there in time.
    """
    deadline_s = time.monotonic() + JOIN_S
    while time.monotonic() < deadline_s:
        try:
            controller = get_or_start_controller(spec)
            token = ray.get(controller.join.remote(spec, contents, True), timeout=deadline_s - time.monotonic())
            if token is not None:
                return controller, token
        except RayTaskError as error:
            if isinstance(error.cause, OtherFiles):
                raise error.cause from None
            raise
        except (RayActorError, GetTimeoutError):  # it is ending, or has no room to start
            pass
        time.sleep(RETRY_S)
    raise RuntimeError(
        f"the controller of {spec.name} did not answer in {JOIN_S:.0f} s: an earlier service of this name still ends, "
        f"or no node has the {spec.control_cpus:g} CPUs that the controller reserves"
    )


def find_controller(namespace: str) -> Any:
    """The running controller of a namespace; raises ValueError when there is none."""
    return ray.get_actor(CONTROLLER_NAME, namespace=namespace)
