"""A training run from outside: what can be checked beforehand, its directory and its Ray, and its end."""

import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from cluster.spec import ServiceSpec
from experts.tls import TlsFiles
from experts.transport_kinds import check_transport
from model.checkpoint import Checkpoint
from model.config import ModelConfig, read_config
from model.staging import sweep
from services.on_cluster import on_cluster
from services.training.checks import check_recipe
from services.training.data.training_data import TrainingData
from services.training.directory import alone_in
from services.training.identity import identify, other_result
from services.training.initial import INITIAL, initial_checkpoint
from services.training.inputs import count_steps, load_data, share_data
from services.training.outcome import STOP, begin_outcome, read_outcome, told
from services.training.recipe import Recipe
from services.training.result import RESULTS, with_yarn
from services.training.room import lacking, look, most_workers
from services.training.session import (
    RAY_GONE,
    RUN_PREFIX,
    check_service,
    ray_of_run,
)  # nothing above imports ray, which this must do first
from services.training.trainer import TrainingStopped, TrainingUnfinished, fit, plain

UPLOADED = "working_dir_files"  # where Ray unpacks what `ray job submit --working-dir` sent
IDLE_END_S = 120.0  # the hosts of a run that has no worker any more end so long after it


def preview(recipe: Recipe) -> tuple[ModelConfig, TrainingData, int]:
    """Everything that can be known to fail before anything is started: the trained model's config, data and steps.

    Raises ValueError naming what is wrong; writes nothing.
    """
    check_transport(recipe.experts.transport)
    if recipe.experts.tls is not None:
        recipe.experts.tls.files.read()
    config = read_config(recipe.model) if recipe.init == "random" else Checkpoint.open(recipe.model).config
    config = with_yarn(config, recipe.yarn)
    check_recipe(recipe, config)
    data = load_data(recipe)
    return config, data, count_steps(recipe, data)


def first_weights(recipe: Recipe) -> Checkpoint:
    """What is trained; raises what `initial_checkpoint` does.

    Writes the weights of a run that begins at random: the directory must be held, as another run's may lie there.
    """
    return initial_checkpoint(recipe) if recipe.init == "random" else Checkpoint.open(recipe.model)


def train(recipe: Recipe, console: Console) -> int:
    """Run to the end, on the Ray that this process belongs to, the recipe's service's, or a private one; steps made.

    SIGINT and SIGTERM end it after a snapshot; a second one ends it at once. Raises what `preview` and
    `first_weights` raise, ServiceUnusable, TrainingStopped where a signal ended it, and else TrainingFailed.
    """
    recipe = absolute(recipe)
    console.print(f"reading {', '.join(file.name for file in recipe.data.files)}", markup=False, highlight=False)
    _, data, steps = preview(recipe)
    console.print(f"{len(data):,} samples of {data.samples.tokens:,} tokens, {steps:,} steps", highlight=False)
    try:
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {recipe.output_dir} cannot be made ({error.strerror}): give another") from error
    with alone_in(recipe.output_dir):
        for name in (*RESULTS, INITIAL):
            sweep(recipe.output_dir / name)
        return _train_alone(recipe, first_weights(recipe), data, steps, console)


def _train_alone(recipe: Recipe, checkpoint: Checkpoint, data: TrainingData, steps: int, console: Console) -> int:
    before = read_outcome(recipe.output_dir)
    if before is not None and before.result is not None and before.steps >= steps and Path(before.result).exists():
        if changed := other_result(before.identity or {}, identify(recipe, data, checkpoint)):
            raise ValueError(f"{before.result} is another run's result: {changed}; give another output_dir")
        console.print(f"all {before.steps} steps were made before; {before.result} has the result", soft_wrap=True)
        return before.steps
    shared = share_data(recipe.output_dir, data)
    del data  # a run is long
    _, known = told(recipe.output_dir)
    stop_file, service = recipe.output_dir / STOP, recipe.experts.service
    stop_file.unlink(missing_ok=True)  # an earlier command's
    heard: list[int] = []  # signals

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
        print(f"shoal: {RAY_GONE}", file=sys.stderr, flush=True)

    try:
        asked, leftovers = stop_file.exists, (shared, stop_file)
        with ray_of_run(service, on_end, on_gone, asked, leftovers), _signals(stop_file, heard, console):
            theirs = check_service(service, recipe.experts.hosts) if service is not None else None
            spec = service_spec(recipe, checkpoint, theirs)
            most = _find_room(recipe, spec, console)
            if stop_file.exists():
                raise TrainingUnfinished("stopped before a step was made; the same command goes on")
            begin_outcome(recipe.output_dir)
            return fit(recipe, spec, most, steps, console)
    except (TrainingUnfinished, KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, TrainingUnfinished) and not heard:
            raise  # its service ends, and no signal said so
        raise _stopped(end, heard) from end
    finally:
        shared.unlink(missing_ok=True)
        for line in told(recipe.output_dir, known)[0]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _find_room(recipe: Recipe, spec: ServiceSpec, console: Console) -> int:
    """Most workers that the run may have; raises ValueError where there is no room for the least, nor ever will be."""
    grows, room = on_cluster(), look(spec)
    if lack := lacking(recipe, room):
        if not grows:
            raise ValueError(lack)
        console.print(f"waiting for room: {lack}", markup=False, soft_wrap=True)
    most = most_workers(recipe, room, grows)
    if most < (recipe.workers.most or most):
        console.print(f"{most} workers: as many as there is room for now", soft_wrap=True)
    return most


def absolute(recipe: Recipe) -> Recipe:
    """With paths that mean the same to every process; `~` is home, as in a shell.

    The directory that a Ray job was sent goes away with the job, so there a relative output directory is below home.
    """
    data = recipe.data.model_copy(update={"files": tuple(_placed(file) for file in recipe.data.files)})
    at_home = UPLOADED in Path.cwd().parts
    output = Path.home() / os.path.expanduser(recipe.output_dir) if at_home else _placed(recipe.output_dir)
    experts = recipe.experts
    if experts.tls is not None:
        paths = {name: _named(getattr(experts.tls, name)) for name in ("certificate", "key", "root")}
        experts = experts.model_copy(update={"tls": experts.tls.model_copy(update=paths)})
    return recipe.model_copy(
        update={"model": _placed(recipe.model), "output_dir": output, "data": data, "experts": experts}
    )


def _placed(path: Path) -> Path:
    return Path(os.path.expanduser(path)).resolve()  # pathlib's own ends in RuntimeError where it finds no such home


def _named(path: Path) -> Path:
    """The same, but through links: those of a secret that Kubernetes mounts lead elsewhere on each node, and later."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def service_spec(recipe: Recipe, checkpoint: Checkpoint, theirs: TlsFiles | None = None) -> ServiceSpec:
    """The run's expert hosts, by whose name its next life finds them again: none that writes elsewhere, or wants other
    hosts, has the same. `theirs`: of the service in whose hosts' processes they live.
    """
    experts = recipe.experts
    spec = ServiceSpec(
        name=RUN_PREFIX,
        model=str(checkpoint.directory.resolve()),
        hosts=experts.hosts,
        replicas=experts.replicas,
        threads=experts.threads,
        cpus=experts.cpus,
        gpus=experts.gpus,
        resources=experts.resources,
        transport=experts.transport,
        tls=experts.tls.files if experts.tls is not None else theirs,
        standby=0,
        follow_application=False,
        trains=True,
        idle_end_s=IDLE_END_S,
        lodges_with=experts.service,
    )
    wanted = json.dumps([str(recipe.output_dir), plain(spec)], sort_keys=True)
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:8]
    return replace(spec, name=f"{RUN_PREFIX}{recipe.output_dir.name}-{digest}")


def _stopped(end: BaseException, heard: Sequence[int]) -> TrainingStopped:
    """That signals brought a run to this end: those `heard`, or one that came before it listened or after."""
    if isinstance(end, TrainingUnfinished):
        return TrainingStopped(str(end), heard[0])
    unheard = signal.SIGINT if isinstance(end, KeyboardInterrupt) else signal.SIGTERM  # for which Ray exits
    number = heard[-1] if heard else unheard
    return TrainingStopped("ended at once; the same command goes on from the newest snapshot", number)


@contextlib.contextmanager
def _signals(stop_file: Path, heard: list[int], console: Console) -> Iterator[None]:
    """SIGINT and SIGTERM ask the run to end, twice insist; set after Ray, which has handlers of its own.

    They are added to those `heard`.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        heard.append(number)
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
