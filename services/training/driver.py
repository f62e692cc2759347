"""A training run from outside: what can be checked beforehand, the Ray Train job, and its end."""

import contextlib
import hashlib
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cluster.spec import ServiceSpec
from experts.transport_kinds import check_transport
from model.checkpoint import Checkpoint
from model.config import ModelConfig, read_config
from services.training.checks import check_recipe
from services.training.data.training_data import TrainingData
from services.training.identity import identify, other_result
from services.training.initial import initial_checkpoint
from services.training.inputs import count_steps, load_data, share_data
from services.training.outcome import SNAPSHOTS, STOP, begin_outcome, read_outcome, told
from services.training.progress import follow
from services.training.recipe import Recipe
from services.training.result import with_yarn
from services.training.session import (
    RUN_PREFIX,
    check_service,
    ray_of_run,
)  # nothing above imports ray, which this must do first

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

UPLOADED = "working_dir_files"  # where Ray unpacks what `ray job submit --working-dir` sent
IDLE_END_S = 120.0  # the hosts of a run that has no worker any more end so long after it


class TrainingFailed(RuntimeError):
    """The run ended before its last step; the message says why, and what is kept."""


def preview(recipe: Recipe) -> tuple[ModelConfig, TrainingData, int]:
    """Everything that can be known to fail before anything is started: the trained model's config, data and steps.

    Raises ValueError naming what is wrong; writes nothing.
    """
    check_transport(recipe.experts.transport)
    config = read_config(recipe.model) if recipe.init == "random" else Checkpoint.open(recipe.model).config
    config = with_yarn(config, recipe.yarn)
    check_recipe(recipe, config)
    data = load_data(recipe)
    return config, data, count_steps(recipe, data)


def prepare(recipe: Recipe) -> tuple[Checkpoint, TrainingData, int]:
    """What is trained, on what, and the steps; raises what `preview` raises, and what `initial_checkpoint` does.

    Writes the first weights of a run that begins at random.
    """
    _, data, steps = preview(recipe)
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = initial_checkpoint(recipe) if recipe.init == "random" else Checkpoint.open(recipe.model)
    return checkpoint, data, steps


def train(recipe: Recipe, console: Console) -> int:
    """Run to the end, on the Ray that this process belongs to, the recipe's service's, or a private one; steps made.

    SIGINT and SIGTERM end it after a snapshot; a second one ends it at once. Raises what `prepare` raises,
    ServiceUnusable, and TrainingFailed.
    """
    recipe = absolute(recipe)
    console.print(f"reading {', '.join(file.name for file in recipe.data.files)}", markup=False, highlight=False)
    checkpoint, data, steps = prepare(recipe)
    console.print(f"{len(data):,} samples of {data.samples.tokens:,} tokens, {steps:,} steps", highlight=False)
    before = read_outcome(recipe.output_dir)
    if before is not None and before.result is not None and before.steps >= steps and Path(before.result).exists():
        if changed := other_result(before.identity or {}, identify(recipe, data, checkpoint)):
            raise ValueError(f"{before.result} is another run's result: {changed}; give another output_dir")
        console.print(f"all {before.steps} steps were made before; {before.result} has the result", soft_wrap=True)
        return before.steps
    begin_outcome(recipe.output_dir)
    shared = share_data(recipe.output_dir, data)
    del data  # a run is long
    _, known = told(recipe.output_dir)
    stop_file, service = recipe.output_dir / STOP, recipe.experts.service

    def on_end() -> None:
        stop_file.touch()
        console.print(
            f"the service {service} ends, and takes the run's expert hosts with it: stopping with a snapshot if there "
            "is still time; start it again, and the same command goes on from the last one",
            soft_wrap=True,
        )

    def on_gone() -> None:
        shared.unlink(missing_ok=True)
        stop_file.unlink(missing_ok=True)
        console.show_cursor()  # which a bar hides
        gone = "Ray has ended, and this run with it; the same command goes on from the newest snapshot"
        print(f"shoal: {gone}", file=sys.stderr, flush=True)

    try:
        with ray_of_run(service, on_end, on_gone), _signals(stop_file, console):
            if service is not None:
                check_service(service, recipe.experts.hosts)
            return _train(recipe, checkpoint, steps, console)
    finally:
        shared.unlink(missing_ok=True)
        for line in told(recipe.output_dir, known)[0]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def absolute(recipe: Recipe) -> Recipe:
    """With paths that mean the same to every process.

    The directory that a Ray job was sent goes away with the job, so there a relative output directory is below home.
    """
    data = recipe.data.model_copy(update={"files": tuple(file.resolve() for file in recipe.data.files)})
    output = Path.home() / recipe.output_dir if UPLOADED in Path.cwd().parts else recipe.output_dir.resolve()
    return recipe.model_copy(update={"model": recipe.model.resolve(), "output_dir": output, "data": data})


def _run_name(output_dir: Path) -> str:
    """Under which a run's hosts are found again: on one Ray, no other run that writes elsewhere may have the same."""
    return f"{RUN_PREFIX}{output_dir.name}-{hashlib.sha256(str(output_dir).encode()).hexdigest()[:8]}"


def service_spec(recipe: Recipe, checkpoint: Checkpoint) -> ServiceSpec:
    """The run's expert hosts."""
    experts = recipe.experts
    return ServiceSpec(
        name=_run_name(recipe.output_dir),
        model=str(checkpoint.directory.resolve()),
        hosts=experts.hosts,
        replicas=experts.replicas,
        threads=experts.threads,
        cpus=experts.cpus,
        gpus=experts.gpus,
        resources=experts.resources,
        transport=experts.transport,
        standby=0,
        follow_application=False,
        trains=True,
        idle_end_s=IDLE_END_S,
        lodges_with=experts.service,
    )


def _train(recipe: Recipe, checkpoint: Checkpoint, steps: int, console: Console) -> int:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.discovery import get_or_start_controller
    from cluster.threads import node_threads, thread_environment
    from services.training.ray_loop import train_worker

    service = service_spec(recipe, checkpoint)
    controller = get_or_start_controller(service)
    workers = recipe.workers
    most = workers.most or workers.least
    resources = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "service": _plain(service), "steps": steps},
        scaling_config=ScalingConfig(
            num_workers=workers.least if most == workers.least else (workers.least, most),
            use_gpu=workers.gpus > 0,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if workers.gpus > 0 else "gloo"),
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
    outcome = read_outcome(recipe.output_dir)
    if outcome is None:
        raise TrainingFailed("the workers ended without a word; Ray's logs say why")
    if outcome.failed is not None:
        raise TrainingFailed(f"{outcome.failed}; the snapshots in {recipe.output_dir / SNAPSHOTS} are kept")
    wrote = f"; wrote {outcome.result}" if outcome.result is not None else ""
    if outcome.steps < steps:
        console.print(f"{outcome.steps} of {steps} steps made; the same command goes on from there")
    else:
        console.print(f"{outcome.steps} steps made{wrote}", soft_wrap=True)
    return outcome.steps


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


def _plain(service: ServiceSpec) -> dict[str, Any]:
    return {**asdict(service), "resources": dict(service.resources)}


def _reason(error: BaseException) -> str:
    """The last line of the innermost cause."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextlib.contextmanager
def _signals(stop_file: Path, console: Console) -> Iterator[None]:
    """SIGINT and SIGTERM ask the run to end, twice insist; set after Ray, which has handlers of its own."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop_file.exists():
            raise KeyboardInterrupt
        stop_file.touch()
        console.print("stopping after this step, with a snapshot; once more stops at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop_file.unlink(missing_ok=True)
