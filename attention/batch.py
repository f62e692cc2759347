"""One step's tokens, flat and ragged: what the decoder needs to know of the sequences they belong to."""

from dataclasses import dataclass, replace

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

    def __len__(self) -> int:
        """T."""
        return self.token_T.shape[0]

    def halves(self) -> tuple["StepBatch", "StepBatch"]:
        """The earlier tokens and the later ones, in views; a sequence may lie in both, and no row wants logits."""
        middle = len(self) // 2
        return self._rows(slice(0, middle)), self._rows(slice(middle, len(self)))

    def _rows(self, rows: slice) -> "StepBatch":
        return replace(
            self,
            token_T=self.token_T[rows],
            position_T=self.position_T[rows],
            sequence_T=self.sequence_T[rows],
            slot_T=self.slot_T[rows],
            logit_row_L=self.logit_row_L[:0],
            cos_TR=self.cos_TR[rows],
            sin_TR=self.sin_TR[rows],
        )
