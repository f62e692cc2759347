"""Whether a Ray has what a run reserves of it."""

import ray

from services.training.recipe import Recipe


def lacking(recipe: Recipe) -> str | None:
    """What the run reserves and this Ray has not, as it is now; None where all of it is there."""
    there = ray.cluster_resources()
    workers, experts = recipe.workers, recipe.experts
    own = experts.hosts if experts.service is None else 0
    wanted = {
        "CPU": ("cpus", workers.least * workers.cpus + own * experts.cpus),
        "GPU": ("gpus", workers.least * workers.gpus + own * experts.gpus),
    }
    for kind, (name, amount) in wanted.items():
        if amount > there.get(kind, 0.0):
            hosts = f" and {own} hosts with experts.{name} {getattr(experts, name):g}" if own else ""
            return (
                f"{workers.least} workers with workers.{name} {getattr(workers, name):g}{hosts} reserve {amount:g} "
                f"{kind}s, of which there are {there.get(kind, 0.0):g}: lower one of them"
            )
    for name, amount in experts.resources.items():
        if amount * own > there.get(name, 0.0):
            return f"experts.resources asks for {amount * own:g} of {name}, of which there are {there.get(name, 0.0):g}"
    return None


def most_workers(recipe: Recipe) -> int:
    """Of `workers.most`, those that a private Ray, which does not grow, has room for beside the run's hosts.

    Ray Train counts what a node has, not what is free there, and would wait for the rest for ever.
    """
    there = ray.cluster_resources()
    workers, experts = recipe.workers, recipe.experts
    own, most = experts.hosts if experts.service is None else 0, workers.most or workers.least
    for kind, each, hosts in (("CPU", workers.cpus, experts.cpus), ("GPU", workers.gpus, experts.gpus)):
        if each > 0:
            most = min(most, int((there.get(kind, 0.0) - own * hosts) / each))
    return max(workers.least, most)
