"""Every request ends with exactly its tokens, whatever dies; and after each fault everything comes to rest."""

from pathlib import Path

import pytest

from tests.simulation.many import run_seeds
from tests.simulation.reference import Reference, open_references, write_models
from tests.simulation.run import simulate

SEEDS = 2000
IMPATIENT_S = 1.0  # shorter than many faults


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("simulation")
    write_models(directory)
    return directory


@pytest.fixture(scope="module")
def references(models: Path) -> tuple[Reference, ...]:
    return open_references(models)


def test_no_fault_costs_or_changes_a_token(models: Path) -> None:
    failed = {seed: why for part in run_seeds(models, range(SEEDS)) for seed, why in part.failures.items()}
    assert not failed, f"python -m tests.simulation --seed {min(failed)} --trace"


def test_a_client_that_gives_up_early_gets_an_error_and_no_wrong_token(references: tuple[Reference, ...]) -> None:
    for seed in range(100):
        assert simulate(seed, references, IMPATIENT_S).failure is None, f"--seed {seed} --deadline {IMPATIENT_S}"


def test_giving_up_early_does_happen(references: tuple[Reference, ...]) -> None:
    outcomes = [simulate(seed, references, IMPATIENT_S) for seed in range(20)]
    assert any("error" in line for outcome in outcomes for line in outcome.lines())


def test_a_seed_replays_exactly(references: tuple[Reference, ...]) -> None:
    for seed in range(6):
        assert simulate(seed, references) == simulate(seed, references)


def test_seeds_differ(references: tuple[Reference, ...]) -> None:
    assert len({simulate(seed, references).digest for seed in range(10)}) == 10


def test_what_can_happen_does(references: tuple[Reference, ...]) -> None:
    lines = [line for seed in range(60) for line in simulate(seed, references).lines()]
    for what in (
        "change_committed",
        "change_rolled_back",
        "controller_crashed",
        "worker_killed",
        "hang_up",
        "freeze",
        "probed host-0/1 False",
        "not_adopted",
        "is under way: ask again",
        "refusal host-1/2 wrong_generation",
        "Retire",
        "StopHost",
        "Abandon",
    ):
        assert any(what in line for line in lines), what
