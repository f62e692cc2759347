"""The two Serve deployments: an attention worker, and the ingress that speaks HTTP."""

import gc
import os
import time
from dataclasses import dataclass, replace

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.imports import kept_objects
from cluster.joining import contents_of
from cluster.spec import ServiceSpec, WorkerSpec
from cluster.threads import node_threads, settle_threads
from model.adapters.overlay import open_with_adapters
from model.generation import read_generation_defaults
from model.tokenizer import Tokenizer
from services.api import create_app
from services.app_args import SHORTEST_KEY
from services.backend import ServedModel
from services.keys import check_key
from services.pool import WorkerPool


class AttentionReplica:
    """Serve starts, counts and replaces it; requests reach its worker by the worker's own door."""

    def __init__(self, service: ServiceSpec, spec: WorkerSpec) -> None:
        settle_threads(spec.threads or node_threads())
        with kept_objects():
            from cluster.attention_worker import AttentionWorker  # the ingress, which is here too, needs nothing of it

        replica = serve.get_replica_context().replica_id.unique_id
        self._worker = AttentionWorker(called(service), spec, f"attention-{replica}")

    def check_health(self) -> None:
        self._worker.check_health()

    def shutdown(self) -> None:
        self._worker.close()

    def __del__(self) -> None:
        if hasattr(self, "_worker"):
            self._worker.close()


@dataclass(frozen=True, slots=True)
class IngressSpec:
    """What an ingress must know to answer."""

    service: ServiceSpec
    served_name: str
    max_length: int
    api_key: str | None
    admin_token: str | None
    max_in_flight: int
    worker_deadline_s: float


async def open_app(spec: IngressSpec) -> FastAPI:
    """The HTTP application over the service's workers, in a Serve replica."""
    service = called(spec.service)
    checkpoint = open_with_adapters(service.model, service.adapters)
    model = ServedModel(
        id=spec.served_name,
        created=int(time.time()),
        vocab_size=checkpoint.config.vocab_size,
        max_length=min(spec.max_length, checkpoint.config.max_position_embeddings),
        fingerprint=f"shoal-{checkpoint.fingerprint()}",
        tokenizer=Tokenizer.load(checkpoint.directory),
        defaults=read_generation_defaults(checkpoint.directory),
    )
    contents = contents_of(checkpoint)
    pool = WorkerPool(model, service, contents, spec.max_in_flight, spec.worker_deadline_s)
    api_key, admin_token = spec.api_key or secret("SHOAL_API_KEY"), spec.admin_token or secret("SHOAL_ADMIN_TOKEN")
    return create_app(pool, api_key, admin_token, f"ingress-{serve.get_replica_context().replica_id.unique_id}")


def called(service: ServiceSpec) -> ServiceSpec:
    """The service under the name of its Serve application."""
    return replace(service, name=serve.get_replica_context().app_name)


def secret(name: str) -> str | None:
    """A key from the environment; None where it is not set or empty.

    Raises ValueError for one that is too short, or cannot be sent.
    """
    value = os.environ.get(name) or None
    if value is not None and len(value) < SHORTEST_KEY:
        raise ValueError(f"{name} has {len(value)} characters; expected at least {SHORTEST_KEY}")
    try:
        return None if value is None else check_key(value)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


@serve.ingress()
class Ingress:
    """Serve's HTTP proxy passes requests to the application that this builds."""

    def __init__(self, spec: IngressSpec, attention: DeploymentHandle) -> None:
        self._spec = spec
        self._attention = attention  # makes Serve start the workers with the ingress

    async def __serve_build_asgi_app__(self) -> FastAPI:
        app = await open_app(self._spec)
        gc.collect()
        gc.freeze()  # what is there now stays, and every stream would stop while a full collection looks at all of it
        return app
