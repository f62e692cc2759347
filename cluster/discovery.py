"""How the controller of a service is found, or started by whoever needs it first."""

from typing import Any

import ray

from cluster.controller import Controller
from cluster.spec import CONTROLLER_NAME, ServiceSpec


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


def find_controller(namespace: str) -> Any:
    """The running controller of a namespace; raises ValueError when there is none."""
    return ray.get_actor(CONTROLLER_NAME, namespace=namespace)
