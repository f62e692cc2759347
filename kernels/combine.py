"""The two ends of a dispatch: slots split by who computes them, and their answers summed in slot order.

Shapes: `T` tokens, `K` slots a token, `S` = T · K slots, `E` experts, `D` model, `O` owners, `P` slots of one owner,
`R` rows of one owner.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.native import check_dense, native, native_for, triton_serves

SHARED_ROWS = 64  # halves of which a host still computes at nearly its full speed


class NoOwner(Exception):
    """A wanted expert has no owner."""

    def __init__(self, expert: int) -> None:
        super().__init__(expert)
        self.expert = expert


@dataclass(frozen=True, slots=True)
class OwnedSlots:
    """What one owner computes: rows, each once, and its slots in rising order."""

    owner: int
    row_R: Tensor  # int64, of the T tokens
    slot_P: Tensor  # int64, of the S slots
    slot_row_P: Tensor  # int32, place in row_R
    slot_expert_P: Tensor  # int32


def split_slots(expert_TK: Tensor, owner_E: Tensor, owners: int, slots: Tensor | None = None) -> list[OwnedSlots]:
    """Split the slots (all, or those of `slots`, int64 and rising) by owner_E[expert], int32.

    Owners without a slot are left out. Raises NoOwner for an expert whose owner is below 0. Runs on CPU.
    """
    library = native()
    if library is None:
        return _split_plainly(expert_TK.reshape(-1), owner_E, owners, expert_TK.shape[1], slots)
    check_dense(torch.int64, expert_TK, *(() if slots is None else (slots,)))
    check_dense(torch.int32, owner_E)
    count = expert_TK.numel() if slots is None else slots.numel()
    long_buffer = torch.empty(2 * count, dtype=torch.int64)
    int_buffer = torch.empty(2 * count, dtype=torch.int32)
    rows, ints = long_buffer.data_ptr(), int_buffer.data_ptr()
    ends = (ctypes.c_long * (2 * owners + 2))()
    missing = library.shoal_split_slots(
        expert_TK.data_ptr(),
        None if slots is None else slots.data_ptr(),
        count,
        expert_TK.shape[1],
        owner_E.data_ptr(),
        owners,
        rows,
        rows + 8 * count,
        ints,
        ints + 4 * count,
        ctypes.addressof(ends),
        ctypes.addressof(ends) + 8 * (owners + 1),
    )
    if missing:
        raise NoOwner(missing - 1)
    return [
        OwnedSlots(
            owner,
            long_buffer[ends[owner] : ends[owner + 1]],
            long_buffer[count + first : count + last],
            int_buffer[first:last],
            int_buffer[count + first : count + last],
        )
        for owner in range(owners)
        if (first := ends[owners + 1 + owner]) < (last := ends[owners + 2 + owner])
    ]


def split_shared(
    expert_TK: Tensor,
    owner_E: Tensor,
    holder_EC: Tensor,
    holders_E: Tensor,
    turn: int,
    owners: int,
    slots: Tensor | None = None,
    least: int = SHARED_ROWS,
) -> list[OwnedSlots]:
    """As `split_slots`, but an expert that `least` of all slots chose has them spread over its holders, row by row.

    holder_EC, int32, has in its first holders_E[expert], int64, columns who may be asked. Experts with the same holders
    keep a row at one of them. Fewer rows are not worth reading an expert's weights at several hosts.
    """
    experts_S = expert_TK.reshape(-1)
    many_E = (torch.bincount(experts_S, minlength=len(holders_E)) >= least) & (holders_E > 1)
    if not many_E.any():
        return split_slots(expert_TK, owner_E, owners, slots)
    slot_S = torch.arange(len(experts_S))
    place_S = (slot_S // expert_TK.shape[1] + turn) % holders_E[experts_S].clamp(min=1)
    owner_S = torch.where(many_E[experts_S], holder_EC[experts_S, place_S], owner_E[experts_S])
    try:
        parts = split_slots(slot_S.view_as(expert_TK), owner_S, owners, slots)
    except NoOwner as slot:
        raise NoOwner(int(experts_S[slot.expert])) from None
    return [replace(part, slot_expert_P=experts_S[part.slot_P].int()) for part in parts]


def _split_plainly(
    experts_S: Tensor, owner_E: Tensor, owners: int, top_k: int, slots: Tensor | None
) -> list[OwnedSlots]:
    slots_P = torch.arange(len(experts_S)) if slots is None else slots
    wanted_P = experts_S[slots_P]
    owner_P = owner_E[wanted_P]
    if (owner_P < 0).any():
        raise NoOwner(int(wanted_P[owner_P < 0][0]))
    parts: list[OwnedSlots] = []
    for owner in range(owners):
        mine = slots_P[owner_P == owner]
        if len(mine):
            rows, places = torch.unique(mine // top_k, return_inverse=True)
            parts.append(OwnedSlots(owner, rows, mine, places.int(), experts_S[mine].int()))
    return parts


def combine_slots(
    answers: Sequence[tuple[Tensor, Tensor]],
    weights_TK: Tensor,
    shared_TD: Tensor | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """residual + (Σ_k weight[t, k] · answer of slot (t, k), summed in rising k, + shared), [T, D] fp32.

    `answers` are pairs (slot_P int64, y_PD fp32 contiguous) that together cover every slot once. Who computed a
    slot, and in which order answers came, changes no bit.
    """
    tokens, top_k = weights_TK.shape
    width = answers[0][1].shape[1] if answers else 0
    library = native_for(weights_TK.device)
    if library is None:
        return _combine_plainly(answers, weights_TK, width, shared_TD, residual_TD)
    parts = len(answers)
    counts = [slot_P.shape[0] for slot_P, _ in answers]
    assert sum(counts) == tokens * top_k
    for (slot_P, y_PD), count in zip(answers, counts, strict=True):
        check_dense(torch.int64, slot_P)
        check_dense(torch.float32, y_PD)
        assert y_PD.shape == (count, width)
    weights_TK = weights_TK.float().contiguous()
    residual_TD = None if residual_TD is None else residual_TD.float().contiguous()
    shared_TD = None if shared_TD is None else shared_TD.float().contiguous()
    for other_TD in (residual_TD, shared_TD):
        assert other_TD is None or other_TD.shape == (tokens, width)
    out_TD = torch.empty(tokens, width)
    table = (ctypes.c_long * (3 * parts))(
        *[slot_P.data_ptr() for slot_P, _ in answers], *[y_PD.data_ptr() for _, y_PD in answers], *counts
    )
    start = ctypes.addressof(table)
    library.shoal_combine(
        start,
        start + 8 * parts,
        start + 16 * parts,
        parts,
        weights_TK.data_ptr(),
        tokens,
        top_k,
        width,
        None if residual_TD is None else residual_TD.data_ptr(),
        None if shared_TD is None else shared_TD.data_ptr(),
        out_TD.data_ptr(),
    )
    return out_TD


def _combine_plainly(
    answers: Sequence[tuple[Tensor, Tensor]],
    weights_TK: Tensor,
    width: int,
    shared_TD: Tensor | None,
    residual_TD: Tensor | None,
) -> Tensor:
    tokens, top_k = weights_TK.shape
    y_SD = torch.empty(tokens * top_k, width, device=weights_TK.device)
    for slot_P, y_PD in answers:
        y_SD[slot_P.to(y_SD.device)] = y_PD.to(y_SD.device)
    if triton_serves(y_SD.device):
        from kernels.gpu import rows

        return rows.combine(y_SD, weights_TK, shared_TD, residual_TD)
    y_TKD = y_SD.view(tokens, top_k, width)
    total_TD = weights_TK[:, :1] * y_TKD[:, 0]
    for slot in range(1, top_k):
        total_TD = total_TD + weights_TK[:, slot : slot + 1] * y_TKD[:, slot]
    for other in (shared_TD, residual_TD):
        total_TD = total_TD if other is None else total_TD + other
    return total_TD
