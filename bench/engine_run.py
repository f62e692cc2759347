"""A workload on an engine of this very process."""

from attention.engine import Engine
from attention.requests import GenerateRequest, SamplingParams
from bench.child import now_s
from bench.errors import BenchError
from bench.timing import GenerationClock, Sample, Workload


def measure_engine(engine: Engine, workload: Workload, name: str) -> Sample:
    """Submit every prompt, step until the clock says that it has seen enough, cancel the rest.

    `name` has not been used with this engine before. Raises BenchError when a request fails.
    """
    places = {f"{name}-{place}": place for place in range(workload.batch)}
    params = SamplingParams(max_tokens=workload.most_tokens, temperature=0.0, ignore_eos=True)
    clock = GenerationClock(workload, now_s())
    for request, prompt in zip(places, workload.prompts, strict=True):
        engine.submit(GenerateRequest(request, prompt, params))
    while engine.has_work and not clock.done:
        updates, at_s = engine.step(), now_s()
        for update in updates:
            if update.error is not None:
                raise BenchError(update.error)
            clock.add(places[update.id], update.token_ids, at_s)
    for request in places:
        engine.cancel(request)
    return clock.sample()
