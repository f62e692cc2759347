"""Slots are split by owner and summed in slot order, whoever answered."""

import random

import pytest
import torch

from kernels.combine import NoOwner, combine_slots, split_shared, split_slots


def routed(tokens: int, top_k: int, experts: int, seed: int) -> torch.Tensor:
    rng = random.Random(seed)
    return torch.tensor([rng.sample(range(experts), top_k) for _ in range(tokens)]).view(tokens, top_k)


@pytest.mark.parametrize(("tokens", "top_k", "owners"), [(1, 1, 1), (1, 6, 2), (9, 4, 3), (40, 6, 16)])
def test_every_slot_goes_once_to_its_owner_with_its_row(tokens: int, top_k: int, owners: int) -> None:
    expert_TK = routed(tokens, top_k, 16, tokens)
    owner_E = torch.tensor([expert * 7 % owners for expert in range(16)]).int()
    seen: dict[int, int] = {}
    for part in split_slots(expert_TK, owner_E, owners):
        rows = part.row_R.tolist()
        assert rows == sorted(set(rows))
        assert len(part.slot_P)
        for slot, place, expert in zip(part.slot_P, part.slot_row_P, part.slot_expert_P, strict=True):
            assert rows[int(place)] == int(slot) // top_k
            assert int(expert) == int(expert_TK.reshape(-1)[slot])
            assert int(owner_E[expert]) == part.owner
            seen[int(slot)] = part.owner
        assert part.slot_P.tolist() == sorted(part.slot_P.tolist())
        assert set(part.slot_row_P.tolist()) == set(range(len(rows)))
    assert sorted(seen) == list(range(tokens * top_k))


@pytest.mark.parametrize("turn", [0, 1, 5])
def test_rows_of_a_busy_expert_are_spread_over_its_holders_and_no_others(turn: int) -> None:
    expert_TK = torch.stack((torch.zeros(90, dtype=torch.int64), 1 + torch.arange(90) % 3), 1)
    holder_EC = torch.tensor([[0, 2, 1], [1, 0, -1], [2, -1, -1], [0, -1, -1]]).int()
    holders_E = torch.tensor([3, 2, 1, 1])
    owner_E = torch.tensor([0, 1, 2, 0]).int()
    parts = split_shared(expert_TK, owner_E, holder_EC, holders_E, turn, 3, least=60)
    asked = {int(slot): part.owner for part in parts for slot in part.slot_P}
    for slot, owner in asked.items():
        expert, row = int(expert_TK.reshape(-1)[slot]), slot // 2
        assert owner == (int(holder_EC[0, (row + turn) % 3]) if expert == 0 else int(owner_E[expert]))
    assert sorted(asked) == list(range(180))
    for part in parts:
        assert part.slot_expert_P.tolist() == expert_TK.reshape(-1)[part.slot_P].tolist()
        assert part.row_R[part.slot_row_P.long()].tolist() == (part.slot_P // 2).tolist()
    wanted = torch.tensor([3, 4, 100, 102])
    some = split_shared(expert_TK, owner_E, holder_EC, holders_E, turn, 3, wanted, least=60)
    assert {int(slot): part.owner for part in some for slot in part.slot_P} == {
        slot: asked[slot] for slot in wanted.tolist()
    }
    few = split_shared(expert_TK, owner_E, holder_EC, holders_E, turn, 3, least=91)
    assert {int(slot): part.owner for part in few for slot in part.slot_P} == {
        slot: int(owner_E[expert]) for slot, expert in enumerate(expert_TK.reshape(-1).tolist())
    }
    with pytest.raises(NoOwner) as caught:
        split_shared(expert_TK, torch.tensor([0, 1, -1, 0]).int(), holder_EC, holders_E, turn, 3, least=60)
    assert caught.value.expert == 2


def test_only_the_wanted_slots_are_split() -> None:
    expert_TK = routed(12, 3, 8, 1)
    wanted = torch.tensor([0, 4, 5, 20, 35])
    parts = split_slots(expert_TK, (torch.arange(8) % 2).int(), 2, wanted)
    assert sorted(int(slot) for part in parts for slot in part.slot_P) == wanted.tolist()
    assert all(part.row_R[part.slot_row_P.long()].tolist() == (part.slot_P // 3).tolist() for part in parts)


def test_an_expert_without_an_owner_is_named() -> None:
    with pytest.raises(NoOwner) as caught:
        split_slots(torch.tensor([[0, 5]]), torch.tensor([0, 0, 0, 0, 0, -1]).int(), 1)
    assert caught.value.expert == 5


@pytest.mark.parametrize("width", [1, 16, 50])
def test_the_sum_is_taken_in_slot_order_whoever_answered(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    y_SD = torch.randn(20 * 6, width, generator=generator)
    weights_TK = torch.rand(20, 6, generator=generator)
    shared, residual = torch.randn(2, 20, width, generator=generator)
    whole = combine_slots([(torch.arange(120), y_SD)], weights_TK, shared, residual)
    exact = (y_SD.double().view(20, 6, width) * weights_TK.double()[..., None]).sum(1) + shared + residual
    assert torch.allclose(whole.double(), exact, atol=1e-5)
    for seed in range(5):
        owner_S = torch.randint(4, (120,), generator=torch.Generator().manual_seed(seed))
        answers = [(mine := (owner_S == owner).nonzero()[:, 0], y_SD[mine]) for owner in (2, 0, 3, 1)]
        assert torch.equal(combine_slots(answers, weights_TK, shared, residual), whole)
    plain = combine_slots([(torch.arange(120), y_SD)], weights_TK)
    assert torch.allclose(plain + shared + residual, whole, atol=1e-5)
    one = combine_slots([(torch.arange(6), y_SD[6:12])], weights_TK[1:2], shared[1:2], residual[1:2])
    assert torch.equal(one[0], whole[1])
