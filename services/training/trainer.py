"""The Ray Train job of a run, and what it came to."""

import contextlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cluster.spec import ServiceSpec
from experts.tls import TlsFiles
from model.snapshots.history import snapshots
from model.snapshots.layout import step_of
from services.training.outcome import SNAPSHOTS, Outcome, read_outcome
from services.training.progress import follow
from services.training.recipe import Recipe

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

START_S = "10"
"""That Ray Train waits for room for the workers that it decided for, 60 by default.

What it decides by is looked at every 20 s: just after a node died it decides for that node's workers, too.
"""
COLLECTIVE_S = 3600.0  # that workers wait for one of them, longer than that one waits for its hosts


class TrainingFailed(RuntimeError):
    """The run ended before its last step; the message says why, and what is kept."""


class TrainingUnfinished(TrainingFailed):
    """The run was asked to end before its last step, and did."""


class TrainingStopped(TrainingFailed):
    """Signal `number` ended the run before its last step; the message says from where the same command goes on."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def fit(recipe: Recipe, service: ServiceSpec, most: int, steps: int, console: Console) -> int:
    """Run it on the Ray that is there, with up to `most` workers, show it, and say how it ended; steps made.

    Raises TrainingFailed: TrainingUnfinished where it was asked to end.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.discovery import get_or_start_controller
    from cluster.threads import node_threads, thread_environment
    from services.training.ray_loop import train_worker

    service = with_threads(service)
    controller = get_or_start_controller(service)
    workers = recipe.workers
    if most > workers.least:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_S)  # handed on to where Ray Train runs
    resources = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "service": plain(service), "steps": steps},
        scaling_config=ScalingConfig(
            num_workers=workers.least if most == workers.least else (workers.least, most),
            use_gpu=workers.gpus > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=workers.resize_every_s,
        ),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if workers.gpus > 0 else "gloo", timeout_s=int(COLLECTIVE_S)
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(recipe.output_dir),
            failure_config=FailureConfig(max_failures=workers.restarts),
            worker_runtime_env={"env_vars": thread_environment(workers.threads or node_threads())},
        ),
    )
    stop = threading.Event()
    watcher = threading.Thread(target=follow, args=(recipe.output_dir, steps, stop, console), name="progress")
    watcher.start()
    try:
        _fit(trainer)
    except TrainingFailedError as error:
        raise TrainingFailed(_reason(error)) from error
    finally:
        stop.set()
        watcher.join()
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(controller.shutdown.remote(), timeout=30)
    outcome = last_word(recipe.output_dir, steps)
    wrote = f"; wrote {outcome.result}" if outcome.result is not None else ""
    console.print(f"{outcome.steps} steps made{wrote}", soft_wrap=True)
    return outcome.steps


def last_word(output_dir: Path, steps: int) -> Outcome:
    """What the workers of a run of so many steps say at its end; raises what `fit` raises where not all are made."""
    outcome = read_outcome(output_dir)
    if outcome is None:
        raise TrainingFailed("the workers ended without a word; Ray's logs say why")
    if outcome.failed is not None:
        raise TrainingFailed(f"{outcome.failed}; the snapshots in {output_dir / SNAPSHOTS} are kept")
    if outcome.steps < steps:
        kept = next((step_of(path) for path in snapshots(output_dir / SNAPSHOTS)), None)
        onward = "there" if kept == outcome.steps else "the beginning" if kept is None else f"step {kept}"
        raise TrainingUnfinished(f"{outcome.steps} of {steps} steps made; the same command goes on from {onward}")
    return outcome


def with_threads(service: ServiceSpec) -> ServiceSpec:
    """Told how many threads each of its hosts has, so that later lives, whatever nodes are there by then, have as many.

    Products of few rows may have other bits with other numbers, and a replica's gradients must have the same.
    """
    from cluster.nodes import living_nodes, shared_threads

    if service.threads is not None or service.lodges_with is not None:
        return service
    return replace(service, threads=shared_threads(service.hosts, living_nodes(None)))


def _fit(trainer: "TorchTrainer") -> None:
    """Fit in a thread of its own: in the main one Ray Train takes SIGINT for itself, and ends without a snapshot."""
    ended: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  who waits raises it
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=fit, name="fit", daemon=True).start()  # none that a second signal would have to wait for
    ended.result()


def plain(service: ServiceSpec) -> dict[str, Any]:
    """As JSON has it; `from_plain` reads it."""
    tls = {name: value and str(value) for name, value in asdict(service.tls).items()} if service.tls else None
    return {**asdict(service), "resources": dict(service.resources), "tls": tls}


def from_plain(raw: Mapping[str, Any]) -> ServiceSpec:
    tls = raw["tls"]
    files = TlsFiles(Path(tls["certificate"]), Path(tls["key"]), Path(tls["root"]), tls["name"]) if tls else None
    return ServiceSpec(**{**raw, "tls": files})


def _reason(error: BaseException) -> str:
    """The last line of the innermost cause."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
