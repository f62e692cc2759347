"""The simulator finds code that is broken on purpose, within the seeds that the code as it is passes."""

import pytest

from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.reference import Reference, open_references, write_models
from tests.simulation.run import simulate

SEEDS = 150


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, ...]:
    directory = tmp_path_factory.mktemp("mutants")
    write_models(directory)
    return open_references(directory)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_is_found(mutant: Mutant, references: tuple[Reference, ...]) -> None:
    for seed in range(SEEDS):
        with mutant():
            outcome = simulate(seed, references)
        if outcome.failure is not None:
            assert simulate(seed, references).failure is None  # it is the mutant's
            return
    pytest.fail(f"{mutant.__doc__} Nobody noticed, in {SEEDS} seeds.")
