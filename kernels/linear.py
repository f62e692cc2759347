"""A linear map whose every output row has the same bits whatever other rows are computed with it."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

TILE_ROWS = 16
"""BLAS picks its accumulation order by the shape: multiplying in tiles of one size fixes it. The rows are the columns
of the product, which lie side by side in one vector register, so that a row's place in its tile does not matter."""


def tiled_linear(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """x · weightᵀ in zero-padded tiles of TILE_ROWS rows, [R, K] and [N, K] -> [R, N]."""
    rows = x_RK.shape[0]
    padded = F.pad(x_RK, (0, 0, 0, -rows % TILE_ROWS))
    out = torch.empty(padded.shape[0], weight_NK.shape[0], dtype=x_RK.dtype)
    for first in range(0, padded.shape[0], TILE_ROWS):
        tile_KR = padded[first : first + TILE_ROWS].t().contiguous()
        out[first : first + TILE_ROWS] = torch.mm(weight_NK, tile_KR).t()
    return out[:rows]


class PackedLinear:
    """A weight [N, K] held once. On CPU it computes in fp32; on CUDA in the weight's own dtype."""

    def __init__(self, weight: Tensor) -> None:
        if weight.ndim != 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; expected [out_features, in_features]")
        self._weight = (weight.float() if weight.device.type == "cpu" else weight).contiguous()
        self.out_features, self.in_features = self._weight.shape

    @property
    def nbytes(self) -> int:
        return self._weight.numel() * self._weight.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]; on CPU a row's bits depend on the row alone."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input has {x.shape[-1]} features; expected {self.in_features}")
        if x.device.type != "cpu":
            return F.linear(x.to(self._weight.dtype), self._weight)
        return tiled_linear(x.reshape(-1, self.in_features), self._weight).view(*x.shape[:-1], self.out_features)

    def unpack(self) -> Tensor:
        """The weight, [N, K]."""
        return self._weight
