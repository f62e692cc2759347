"""A linear map whose every output row has the same bits whatever other rows are computed with it."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels.native import native_for, triton_serves
from kernels.packed import PackedMatrix, kept_dtype

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
    """A weight [N, K] held once. On CPU it is kept in fp32 or bf16 and computes in fp32; on CUDA, in its own dtype."""

    def __init__(self, weight: Tensor, out_dtype: torch.dtype | None = None) -> None:
        """`out_dtype` is the result's on CUDA, where without it it is the weight's; on CPU it is fp32."""
        if weight.ndim != 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; expected [out_features, in_features]")
        self.out_features, self.in_features = weight.shape
        self._native = native_for(weight.device)
        self._packed: PackedMatrix | None = None
        self._weight: Tensor | None = None
        self._out_dtype = weight.dtype if out_dtype is None else out_dtype
        self._triton = triton_serves(weight.device)
        if self._native is not None:
            self._packed = PackedMatrix(weight.to(kept_dtype(weight.dtype)))
        elif weight.device.type == "cpu":
            self._weight = weight.to(torch.float32, copy=True).contiguous()  # not the checkpoint's mapped file
        else:
            self._weight = weight.contiguous()

    @property
    def nbytes(self) -> int:
        held = self._weight if self._packed is None else self._packed.data
        assert held is not None
        return held.numel() * held.element_size()

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N], plus `add` of the result's shape; a row's bits depend on the row alone.

        The exception is CUDA where torch computes, whose libraries sum by the number of rows.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input has {x.shape[-1]} features; expected {self.in_features}")
        if self._packed is not None:
            return self._call_native(x, add)
        assert self._weight is not None
        if self._triton:
            return self._call_triton(x, add)
        if x.device.type != "cpu":
            out = F.linear(x.to(self._weight.dtype), self._weight).to(self._out_dtype)
        else:
            rows_RK = x.reshape(-1, self.in_features).float()
            out = tiled_linear(rows_RK, self._weight).view(*x.shape[:-1], self.out_features)
        return out if add is None else out + add

    def unpack(self) -> Tensor:
        """The weight, [N, K], in the dtype in which it is kept."""
        if self._packed is not None:
            return self._packed.unpack()
        assert self._weight is not None
        return self._weight

    def _call_triton(self, x: Tensor, add: Tensor | None) -> Tensor:
        from kernels.gpu.product import product

        assert self._weight is not None
        add_RN = None if add is None else add.reshape(-1, self.out_features)
        out_RN = product(x.reshape(-1, self.in_features), self._weight, self._out_dtype, add_RN)
        return out_RN.view(*x.shape[:-1], self.out_features)

    def _call_native(self, x: Tensor, add: Tensor | None) -> Tensor:
        assert self._native is not None
        assert self._packed is not None
        x = x.float().contiguous()
        out = torch.empty(*x.shape[:-1], self.out_features)
        if add is not None:
            add = add.float().contiguous()
            assert add.shape == out.shape, f"add has shape {tuple(add.shape)}; expected {tuple(out.shape)}"
        self._native.shoal_linear(
            x.data_ptr(),
            self.in_features,
            0,
            x.numel() // self.in_features,
            self._packed.address,
            self._packed.narrow,
            1,
            self.in_features,
            self.out_features,
            out.data_ptr(),
            self.out_features,
            0,
            None if add is None else add.data_ptr(),
        )
        return out
