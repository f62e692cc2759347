"""One small linear map for each attention head: [T, N, K] -> [T, N, O]."""

import torch
from torch import Tensor

from kernels.linear import PackedLinear


class PackedHeads:
    """N weights [O, K], one a head; row bits are independent of the number of tokens, as PackedLinear's are."""

    def __init__(self, weight_NOK: Tensor) -> None:
        self._heads = [PackedLinear(weight.contiguous()) for weight in weight_NOK]
        self.out_features = weight_NOK.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(head.nbytes for head in self._heads)

    def __call__(self, x_TNK: Tensor) -> Tensor:
        """Apply head n's map to x[:, n]: [T, N, K] -> [T, N, O]."""
        rows = [head(x_TNK[:, n].contiguous()) for n, head in enumerate(self._heads)]
        return torch.stack(rows, dim=1)
