"""The Ray of a run: a job's, that of the service whose hosts it uses, or a private one; and a look at the service."""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.session import LOOPBACK, LocalCluster, keep_private  # before anything that imports ray
from cluster.spec import CONTROLLER_NAME, namespace_of
from experts.tls import TlsFiles
from services.on_cluster import on_cluster
from services.state import ServiceRecord, read_record, running_services

ANSWER_S = 20.0
FOLLOW_S = 0.25
ENDING_S = 1.0  # from the first call to a Ray that ends which fails, until its raylet is gone
GONE_S = 2.0  # after a service, in which a run that uses its Ray may have noticed by itself
RAY_GONE = "Ray has ended, and this run with it; the same command goes on from the newest snapshot"
RUN_PREFIX = "train-"  # of the names under which runs keep their hosts


class ServiceUnusable(ValueError):
    """The service that a recipe names cannot take the run's expert hosts in; says what to do."""


@contextlib.contextmanager
def ray_of_run(
    service: str | None,
    on_end: Callable[[], None],
    on_gone: Callable[[], None],
    asked: Callable[[], bool],
    leftovers: Sequence[Path] = (),
) -> Iterator[None]:
    """The Ray of a job, or of a service that runs here, or a private one for as long as this lasts.

    Where the Ray is a service's, and ends with it within seconds, `on_end` is called in a thread when that begins to.
    Where it is gone before the run has ended, as a private one may be by itself, `on_gone` is, and the process ends
    with status 1; `asked` says whether the run was asked to end. Should this process be ended as well, without a chance
    to, that is said and done for it, and `leftovers` are removed.
    Raises ServiceUnusable where there is no Ray that `service` may be on.
    """
    import ray

    with contextlib.ExitStack() as stack:
        if on_cluster():
            ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
            stack.callback(ray.shutdown)
        elif service is not None:
            record = find_record(service, running_services())
            address = record.ray_address
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, _node_ip_address=LOOPBACK)
            stack.callback(ray.shutdown)
            left = threading.Event()
            stack.callback(left.set)
            threading.Thread(target=_follow, args=(record, left, on_end, on_gone), name="service", daemon=True).start()
        else:
            keep_private()
            cluster = stack.enter_context(
                LocalCluster("shoal-train", last_words=f"shoal: {RAY_GONE}", leftovers=leftovers)
            )
            over = threading.Event()
            stack.callback(over.set)

            def last() -> int:
                on_gone()
                return 1

            watching = cluster.end_process_with_it(over, last, asked)
            try:
                yield
            except Exception:  # of which the end of Ray may be the cause, and then nobody wants Ray's own words
                if cluster.ends_within(ENDING_S):
                    watching.join(ANSWER_S)  # with the process
                raise
            return
        yield


def find_record(service: str, records: list[ServiceRecord]) -> ServiceRecord:
    """The service, with a Ray, that `shoal serve` started here; raises ServiceUnusable."""
    names = {f"p{record.port}": record for record in records}
    record = names.get(service)
    if record is None:
        raise ServiceUnusable(
            f"experts.service is {service!r}; {_there(names)} on this machine: start it with `shoal serve` "
            "(--port 8000 is p8000), set RAY_ADDRESS for one on a cluster, or leave it out for hosts of the run's own"
        )
    if record.ray_address is None:
        raise ServiceUnusable(f"experts.service is {service!r}, whose Ray has not started yet: wait until it is ready")
    return record


def check_service(service: str, hosts: int) -> TlsFiles | None:
    """Look at the service in whose hosts' processes `hosts` expert hosts shall live, and with whose TLS.

    Raises ServiceUnusable, also where its files are not here.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    try:
        controller = ray.get_actor(CONTROLLER_NAME, namespace=namespace_of(service))
        status = ray.get(controller.status.remote(), timeout=ANSWER_S)
        tls: TlsFiles | None = ray.get(controller.tls.remote(), timeout=ANSWER_S)
    except ValueError:
        named = ray.util.list_named_actors(all_namespaces=True)
        prefix = namespace_of("")
        spaces = [actor["namespace"] for actor in named if actor["name"] == CONTROLLER_NAME]
        there = [space.removeprefix(prefix) for space in spaces if space.startswith(prefix)]
        there = [name for name in there if not name.startswith(RUN_PREFIX)]
        raise ServiceUnusable(
            f"experts.service is {service!r}; {_there(there)} on this Ray: name one that serves, or leave it out for "
            "hosts of the run's own"
        ) from None
    except (RayActorError, GetTimeoutError) as error:
        raise ServiceUnusable(f"the service {service} does not answer: {str(error).splitlines()[0]}") from error
    check_status(service, hosts, status)
    if tls is not None:
        try:
            tls.read()
        except ValueError as error:
            raise ServiceUnusable(
                f"the service {service} is guarded by TLS, and so is a run in its hosts, but not all of its files are "
                f"here: {error}"
            ) from error
    return tls


def check_status(service: str, hosts: int, status: dict[str, Any]) -> None:
    """Whether a service with this status can take `hosts` hosts in; raises ServiceUnusable."""
    if status["state"] != "ready":
        reason = f" ({status['reason']})" if status["reason"] else ""
        raise ServiceUnusable(f"the service {service} is {status['state']}{reason}: begin again when it is ready")
    ready = [host["id"] for host in status["expert_hosts"] if host["state"] == "ready"]
    if len(ready) < hosts:
        raise ServiceUnusable(
            f"experts.hosts is {hosts}; the service {service} has {len(ready)} expert hosts ({', '.join(ready)}): "
            f"use at most {len(ready)}, or give it more with `shoal experts scale {hosts}`"
        )


def _follow(
    record: ServiceRecord, left: threading.Event, on_end: Callable[[], None], on_gone: Callable[[], None]
) -> None:
    while read_record(record.port) is not None:
        if left.wait(FOLLOW_S):
            return
    on_end()
    while not record.ended:
        if left.wait(FOLLOW_S):
            return
    if not left.wait(GONE_S):  # what asks its Ray now waits for a minute
        try:
            on_gone()
        finally:
            os._exit(1)


def _there(names: Any) -> str:
    return f"there are the services {', '.join(sorted(names))}" if names else "there is no service"
