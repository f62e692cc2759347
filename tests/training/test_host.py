"""A training host: what it refuses, what may be asked again, and rows that are never computed with another's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experts.errors import HostRefused
from experts.host import ExpertHost
from experts.messages import ForwardRequest
from experts.training.expert import Contribution, TrainedExpert
from experts.training.host import TrainingHost
from experts.training.messages import BackwardRequest
from experts.training.spec import ExpertTraining
from experts.training.store import TrainableExperts
from model.checkpoint import Checkpoint
from router.placement import Host
from tests.training.rig import make_host

PAIRS = ((1, 0), (1, 1), (2, 3))


@pytest.fixture
def opened(checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(checkpoint("mini"))


@pytest.fixture
def host(opened: Checkpoint) -> TrainingHost:
    _, made = make_host(opened, Host("host-0", 1, "local"), PAIRS)
    return made


def request(layer: int = 1, expert: int = 0, micro: int = 0, step: int = 0, **changed: int) -> BackwardRequest:
    generator = torch.Generator().manual_seed(micro + 10 * layer)
    given = {"generation": 1, "rank": 0} | changed
    return BackwardRequest(
        generation=given["generation"],
        step=step,
        micro=micro,
        rank=given["rank"],
        layer=layer,
        x_RD=torch.randn(3, given.get("hidden", 64), generator=generator),
        dout_RD=torch.randn(3, given.get("hidden", 64), generator=generator),
        pair_row_P=torch.tensor([0, given.get("row", 2)], dtype=torch.int32),
        pair_expert_P=torch.tensor([expert, expert], dtype=torch.int32),
        pair_weight_P=torch.tensor([0.5, 0.25]),
        answer_P=torch.tensor([1, 0], dtype=torch.int32),
    )


def fill(host: TrainingHost) -> None:
    host.backward(request(1, 0))
    host.backward(request(1, 1, micro=1))
    host.backward(request(2, 3))
    host.backward(request(2, 3, micro=1))


def test_a_step_asked_for_twice_is_made_once(host: TrainingHost) -> None:
    host.configure(ExpertTraining("run"))
    host.begin(0, 2, 1, PAIRS)
    fill(host)
    before = {pair: host.expert(pair).down.clone() for pair in PAIRS}
    host.apply(0, 1e-2, 1.0)
    once = {pair: host.expert(pair).down.clone() for pair in PAIRS}
    host.apply(0, 1e-2, 1.0)
    assert all(not torch.equal(before[pair], once[pair]) for pair in PAIRS)
    assert all(torch.equal(host.expert(pair).down, once[pair]) for pair in PAIRS)
    assert set(host.status().versions.values()) == {1}


def test_a_step_that_was_given_up_is_not_made(host: TrainingHost, opened: Checkpoint) -> None:
    host.configure(ExpertTraining("run"))
    host.begin(0, 1, 1, [(1, 0)])
    host.backward(request())
    host.restart(opened, [(2, 3)])
    with pytest.raises(HostRefused, match="no step is under way; step 0 was to be made"):
        host.apply(0, 1e-2, 1.0)
    assert host.expert((1, 0)).version == 0


def test_a_request_asked_for_twice_counts_once_and_is_answered_twice(host: TrainingHost) -> None:
    host.configure(ExpertTraining("run"))
    host.begin(0, 2, 1, PAIRS)
    first = host.backward(request())
    host.settle()
    grad = host.expert((1, 0)).parameters["down_proj"].grad
    assert grad is not None
    kept = grad.clone()
    second = host.backward(request())
    host.settle()
    assert torch.equal(first.dx_AD, second.dx_AD)
    assert first.dx_AD.shape == (1, 64)
    assert torch.equal(grad, kept)


def test_norms_are_not_told_before_everything_came(host: TrainingHost) -> None:
    host.configure(ExpertTraining("run"))
    host.begin(0, 2, 1, PAIRS)
    host.backward(request())
    with pytest.raises(HostRefused, match="micro-batch 1 of worker 0 is missing in layer 1"):
        host.squared_norms(0)
    host.begin(0, 2, 1, PAIRS)
    fill(host)
    assert set(host.squared_norms(0)) == set(PAIRS)


def test_gradients_are_whole_whoever_settles_them(opened: Checkpoint) -> None:
    stepped: list[Tensor] = []
    for settled in (True, False):
        _, host = make_host(opened, Host("host-0", 1, "local"), PAIRS)
        host.configure(ExpertTraining("run"))
        host.begin(0, 2, 1, PAIRS)
        fill(host)
        if settled:
            host.settle()
        host.apply(0, 1e-2, 1.0)
        stepped.append(host.expert((2, 3)).down.clone())
    assert torch.equal(*stepped)


def test_a_step_whose_gradients_could_not_be_kept_is_not_made(
    host: TrainingHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.configure(ExpertTraining("run"))
    host.begin(0, 2, 1, PAIRS)
    fill(host)
    before = host.expert((2, 3)).down.clone()

    def fail(expert: TrainedExpert, gained: Contribution) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(TrainedExpert, "accumulate", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        host.settle()
    monkeypatch.undo()
    for call in (lambda: host.squared_norms(0), lambda: host.backward(request())):
        with pytest.raises(HostRefused, match="in step None"):
            call()
    with pytest.raises(HostRefused, match="no step is under way"):
        host.apply(0, 1e-2, 1.0)
    assert torch.equal(host.expert((2, 3)).down, before)
    host.begin(0, 2, 1, PAIRS)
    fill(host)
    assert set(host.squared_norms(0)) == set(PAIRS)


@pytest.mark.parametrize(
    ("bad", "code", "told"),
    [
        (request(generation=2), "wrong_generation", "generation 1; the request was for 2"),
        (request(step=4), "not_ready", "in step 0; the call was for step 4"),
        (request(expert=5), "not_held", "does not train \\(1, 5\\)"),
        (request(row=3), "bad_request", "outside the 3 rows"),
        (request(row=-1), "bad_request", "outside the 3 rows"),
        (request(hidden=32), "bad_request", "32 wide; expected 64"),
        (request(micro=2), "bad_request", "micro-batch 2 of worker 0"),
        (request(rank=1), "bad_request", "of worker 1"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_and_counts_for_nothing(
    host: TrainingHost, bad: BackwardRequest, code: str, told: str
) -> None:
    host.configure(ExpertTraining("run"))
    host.begin(0, 2, 1, PAIRS)
    with pytest.raises(HostRefused, match=told) as refused:
        host.backward(bad)
    assert refused.value.code == code
    assert all(trained.grad is None for pair in PAIRS for trained in host.expert(pair).parameters.values())


class Held:
    """A lock that somebody else has: who would wait for it fails."""

    def __enter__(self) -> None:
        raise AssertionError("it waits for whoever reads")

    def __exit__(self, *_: object) -> None: ...


def test_only_the_step_itself_waits_for_whoever_reads_states(host: TrainingHost, opened: Checkpoint) -> None:
    training = ExpertTraining("run")
    host.configure(training)
    host._reading = Held()  # type: ignore[assignment]
    host.configure(ExpertTraining.from_json(training.to_json()))
    assert set(host.status().versions.values()) == {0}
    host.begin(0, 2, 1, PAIRS)
    host.host.forward(
        ForwardRequest(
            1, 1, 1, torch.zeros(1, 64), torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        )
    )
    fill(host)
    assert set(host.squared_norms(0)) == set(PAIRS)
    for change in (
        lambda: host.apply(0, 1e-2, 1.0),
        lambda: host.configure(ExpertTraining("another")),
        lambda: host.adopt((1, 0), 0, host.state((1, 0))[1]),
        lambda: host.restart(opened, PAIRS),
    ):
        with pytest.raises(AssertionError, match="it waits for whoever reads"):
            change()


def test_a_run_that_could_not_begin_is_begun_when_it_is_asked_for_again(
    host: TrainingHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure = TrainedExpert.configure

    def fail(expert: TrainedExpert, pair: tuple[int, int], training: ExpertTraining) -> None:
        if pair == PAIRS[-1]:
            raise RuntimeError("no memory")
        configure(expert, pair, training)

    monkeypatch.setattr(TrainedExpert, "configure", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        host.configure(ExpertTraining("run"))
    assert host.status().run_id is None
    monkeypatch.undo()
    host.configure(ExpertTraining("run"))
    assert set(host.status().versions.values()) == {0}


def test_rows_are_refused_outside_a_step(host: TrainingHost) -> None:
    rows = ForwardRequest(
        1, 1, 1, torch.zeros(1, 64), torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    )
    for moment in (lambda: None, lambda: host.configure(ExpertTraining("run"))):
        moment()
        with pytest.raises(HostRefused, match=r"^not_ready: "):
            host.host.forward(rows)
    host.begin(0, 1, 1, PAIRS)
    assert host.host.forward(rows).y_PD.shape == (1, 64)
    with pytest.raises(HostRefused, match="at step 0; step 1 was to begin"):
        host.begin(1, 1, 1, PAIRS)
    host.apply(0, 1e-2, 1.0)
    with pytest.raises(HostRefused, match=r"^not_ready: "):
        host.host.forward(rows)  # its experts have stepped, and the rows are of the step before
    host.begin(1, 1, 1, PAIRS)
    assert host.host.forward(rows).y_PD.shape == (1, 64)


def test_an_expert_without_the_gradients_of_a_step_does_not_make_it(host: TrainingHost) -> None:
    host.configure(ExpertTraining("run"))
    host.begin(0, 2, 1, PAIRS)
    fill(host)
    before = {pair: host.expert(pair).down.clone() for pair in PAIRS}
    for step in (1, 5):
        with pytest.raises(HostRefused, match=f"at step 0, without the gradients of step {step}"):
            host.apply(step, 1e-2, 1.0)
    assert all(torch.equal(host.expert(pair).down, before[pair]) for pair in PAIRS)
    with pytest.raises(HostRefused, match="in step 0; the call was for step 1"):
        host.squared_norms(1)
    host.apply(0, 1e-2, 1.0)
    once = {pair: host.expert(pair).down.clone() for pair in PAIRS}
    with pytest.raises(HostRefused, match="at step 1, without the gradients of step 1"):
        host.apply(1, 1e-2, 1.0)  # which was not begun
    assert all(torch.equal(host.expert(pair).down, once[pair]) for pair in PAIRS)


def test_requests_of_several_workers_are_computed_apart(opened: Checkpoint) -> None:
    """A matrix product's bits depend on its rows: whoever asks at the same time must not matter."""
    sizes: list[int] = []

    class Watched(TrainableExperts):
        def __call__(self, x_RD: Tensor, *rest: Tensor) -> Tensor:  # type: ignore[override]
            sizes.append(len(x_RD))
            return super().__call__(x_RD, *rest)

    host = ExpertHost(opened.config, "host-0", 1, make_store=Watched)
    host.load(opened, PAIRS)
    requests = [
        ForwardRequest(
            1, 1, 1, torch.ones(rows, 64), torch.arange(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
        )
        for rows in (2, 5)
    ]
    host.forward_batch(requests)
    assert sizes == [2, 5]
