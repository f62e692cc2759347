"""One small linear map for each attention head: [T, N, K] -> [T, N, O]."""

import torch
from torch import Tensor

from kernels.linear import tiled_linear
from kernels.memory import weight_memory
from kernels.native import native_for, triton_serves
from kernels.packed import PackedMatrix, kept_dtype, packed_numbers


class PackedHeads:
    """N weights [O, K], one a head; row bits are independent of the number of tokens, as PackedLinear's are."""

    def __init__(self, weight_NOK: Tensor) -> None:
        self.heads, self.out_features, self.in_features = weight_NOK.shape
        self._native = native_for(weight_NOK.device)
        self._packed: Tensor | None = None
        self._weight_NOK: Tensor | None = None
        if self._native is not None:
            numbers, kept = packed_numbers(self.out_features, self.in_features), kept_dtype(weight_NOK.dtype)
            self._packed = weight_memory(self.heads * numbers, kept)
            for head, weight in enumerate(weight_NOK):
                PackedMatrix(weight.to(kept), memory=self._packed[head * numbers :])
        elif weight_NOK.device.type == "cpu":
            self._weight_NOK = weight_NOK.to(torch.float32, copy=True).contiguous()
        else:
            self._weight_NOK = weight_NOK.contiguous()

    @property
    def nbytes(self) -> int:
        held = self._weight_NOK if self._packed is None else self._packed
        assert held is not None
        return held.numel() * held.element_size()

    def __call__(self, x_TNK: Tensor, out_TNO: Tensor | None = None) -> Tensor:
        """Apply head n's map to x[:, n]: [T, N, K] -> [T, N, O], into `out_TNO` if given.

        Of both, only the last dimension must be contiguous: parts of wider heads are read and written in place.
        """
        if out_TNO is None:
            shape = (*x_TNK.shape[:2], self.out_features)
            out_TNO = torch.empty(shape, dtype=x_TNK.dtype, device=x_TNK.device)
        assert x_TNK.stride(2) == out_TNO.stride(2) == 1
        assert x_TNK.shape[1:] == (self.heads, self.in_features)
        assert out_TNO.shape == (x_TNK.shape[0], self.heads, self.out_features)
        if self._weight_NOK is not None:
            if triton_serves(x_TNK.device):
                from kernels.gpu.product import head_products

                head_products(x_TNK, self._weight_NOK, out_TNO)
            elif x_TNK.device.type != "cpu":
                out_TNO.copy_(torch.einsum("tnk,nok->tno", x_TNK, self._weight_NOK))
            else:
                for head, weight_OK in enumerate(self._weight_NOK):
                    out_TNO[:, head] = tiled_linear(x_TNK[:, head].contiguous(), weight_OK)
            return out_TNO
        assert self._native is not None
        assert self._packed is not None
        assert x_TNK.dtype == out_TNO.dtype == torch.float32
        self._native.shoal_linear(
            x_TNK.data_ptr(),
            x_TNK.stride(0),
            x_TNK.stride(1),
            x_TNK.shape[0],
            self._packed.data_ptr(),
            self._packed.dtype == torch.bfloat16,
            self.heads,
            self.in_features,
            self.out_features,
            out_TNO.data_ptr(),
            out_TNO.stride(0),
            out_TNO.stride(1),
            None,
        )
        return out_TNO
