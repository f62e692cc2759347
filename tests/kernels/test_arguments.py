"""What native code would read past its end, or as other numbers, is refused before it is read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.attention import latent_attention
from kernels.build import INSTRUCTION_SETS
from kernels.combine import combine_slots, split_slots
from kernels.experts import PackedExperts
from kernels.gated import gated, gated_gradients, weighted_gradients
from kernels.heads import PackedHeads
from kernels.norm import rms_norm
from kernels.rotary import rotate_heads, write_latents
from kernels.swiglu import PackedSwiglu
from kernels.topk import softmax_top_k

NETWORK = torch.zeros(12, 20), torch.zeros(12, 20), torch.zeros(20, 12)


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attend(width: int = 20, tables: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    tables = torch.arange(8).int()[None] if tables is None else tables
    positions = numbers(3, 4, 5) if positions is None else positions
    q, cache = torch.zeros(3, 2, width), torch.zeros(16, 4, 20)
    return latent_attention(q, cache, tables, numbers(0, 0, 0), positions, 16, 0.3)


def experts(x: Tensor, rows: Tensor, chosen: Tensor, out: Tensor | None = None) -> Tensor:
    packed = PackedExperts(20, 12)
    packed.load(0, *NETWORK)
    return packed(x, rows, chosen, out)


def write(slots: Tensor, cos: Tensor) -> None:
    write_latents(torch.zeros(3, 20), torch.ones(16), 1e-6, cos, torch.zeros(3, 2), slots, torch.zeros(4, 1, 20))


def choose(dtype: torch.dtype) -> object:
    return softmax_top_k(torch.zeros(3, 8, dtype=dtype), 1, 1, 2, False, 1.0)


WRONG: dict[str, Callable[[], object]] = {
    "queries_of_another_width": lambda: attend(width=18),
    "positions_apart": lambda: attend(positions=numbers(3, 9, 4, 9, 5, 9)[::2]),
    "positions_missing": lambda: attend(positions=numbers(3)),
    "blocks_apart": lambda: attend(tables=torch.arange(16).int()[None, ::2]),
    "wide_rows_for_experts": lambda: experts(torch.zeros(2, 18), numbers(0), numbers(0)),
    "pairs_without_an_expert": lambda: experts(torch.zeros(2, 20), numbers(0, 1), numbers(0)),
    "a_place_of_another_type": lambda: experts(torch.zeros(2, 20), numbers(0), numbers(0), torch.zeros(1, 20).double()),
    "a_place_too_small": lambda: experts(torch.zeros(2, 20), numbers(0, 1), numbers(0, 0), torch.zeros(1, 20)),
    "other_heads": lambda: PackedHeads(torch.zeros(3, 5, 4))(torch.zeros(2, 2, 4)),
    "narrow_heads": lambda: PackedHeads(torch.zeros(3, 5, 4))(torch.zeros(2, 3, 3)),
    "heads_without_a_place": lambda: PackedHeads(torch.zeros(3, 5, 4))(torch.zeros(2, 3, 4), torch.zeros(2, 2, 5)),
    "wide_rows_for_a_network": lambda: PackedSwiglu(*NETWORK)(torch.zeros(2, 18)),
    "rows_of_rows": lambda: PackedSwiglu(*NETWORK)(torch.zeros(2, 3, 20)),
    "one_row_added_to_many": lambda: PackedSwiglu(*NETWORK)(torch.zeros(2, 20), torch.zeros(1, 20)),
    "a_gate_of_another_width": lambda: gated(torch.zeros(2, 20), torch.zeros(2, 18)),
    "gradients_of_fewer_rows": lambda: gated_gradients(torch.zeros(2, 20), torch.zeros(2, 20), torch.zeros(1, 20)),
    "weights_missing": lambda: weighted_gradients(*torch.zeros(2, 2, 20), torch.zeros(1), torch.zeros(2, 20)),
    "a_short_norm": lambda: rms_norm(torch.zeros(2, 20), torch.ones(19), 1e-6),
    "a_norm_apart": lambda: rms_norm(torch.zeros(2, 20), torch.ones(40)[::2], 1e-6),
    "wide_logits": lambda: choose(torch.float64),
    "narrow_logits": lambda: choose(torch.bfloat16),
    "angles_missing": lambda: rotate_heads(
        torch.zeros(3, 2, 6), torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(3, 2, 8)
    ),
    "angles_apart": lambda: write(torch.arange(3), torch.zeros(2, 3).t()),
    "slots_of_another_type": lambda: write(numbers(0, 1, 2), torch.zeros(3, 2)),
    "wanted_slots_of_another_type": lambda: split_slots(torch.tensor([[0, 1]]), numbers(0, 1), 2, numbers(0, 1)),
    "wanted_slots_apart": lambda: split_slots(
        torch.tensor([[0, 1]]), numbers(0, 1), 2, torch.tensor([0, 9, 1, 9])[::2]
    ),
    "owners_apart": lambda: split_slots(torch.tensor([[0, 1]]), numbers(0, 9, 1, 9)[::2], 2),
    "answers_to_other_slots": lambda: combine_slots([(torch.arange(4), torch.zeros(3, 8))], torch.ones(2, 2)),
    "answers_of_another_type": lambda: combine_slots([(torch.arange(4), torch.zeros(4, 8).half())], torch.ones(2, 2)),
    "a_residual_of_another_width": lambda: combine_slots(
        [(torch.arange(4), torch.zeros(4, 8))], torch.ones(2, 2), None, torch.zeros(2, 7)
    ),
}


@pytest.mark.parametrize(
    "kernels", INSTRUCTION_SETS, indirect=True
)  # torch looks for itself, and takes what lies apart
@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused(name: str) -> None:
    with pytest.raises(AssertionError):
        WRONG[name]()


def test_what_is_added_to_experts_answers_may_be_of_another_type() -> None:
    y, weights, residual = torch.randn(12, 8), torch.rand(4, 3), torch.randn(4, 8).bfloat16()
    out = combine_slots([(torch.arange(12), y)], weights.double(), None, residual)
    wanted = residual.double() + (weights.double()[:, :, None] * y.double().view(4, 3, 8)).sum(1)
    assert torch.allclose(out.double(), wanted, atol=1e-5)
