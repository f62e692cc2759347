"""One step's tokens, flat and ragged: what the decoder needs to know of the sequences they belong to."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepBatch:
    """`T` tokens of `Q` sequences; a block table row holds at most `M` blocks; `L` rows want logits."""

    token_T: Tensor  # int64
    position_T: Tensor  # int32, absolute
    sequence_T: Tensor  # int32, row of the block tables
    slot_T: Tensor  # int64, where each token's latent goes: block * block_size + offset
    block_tables_QM: Tensor  # int32
    logit_row_L: Tensor  # int64, indexes into T
    cos_TR: Tensor  # fp32, [T, R / 2]
    sin_TR: Tensor  # fp32, [T, R / 2]
