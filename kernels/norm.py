"""Root-mean-square normalisation."""

import torch
from torch import Tensor

from kernels.native import check_dense, native_for, triton_serves


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32; the result has the wider dtype of both."""
    native = native_for(x.device)
    if native is not None and x.dtype == weight.dtype == torch.float32:
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        assert weight.shape == (width,)
        assert weight.is_contiguous()
        native.shoal_rms_norm(
            x.data_ptr(), width, weight.data_ptr(), x.numel() // width, width, eps, out.data_ptr(), width
        )
        return out
    if triton_serves(x.device):
        from kernels.gpu import rows

        return rows.rms_norm(x, weight, eps)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def rms_norm_gradients(dout: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight for that of what `rms_norm` gives, all fp32."""
    native = native_for(x.device)
    if native is not None:
        width = x.shape[-1]
        dout, x = dout.contiguous(), x.contiguous()
        assert dout.shape == x.shape
        assert weight.shape == (width,)
        check_dense(torch.float32, dout, x, weight)
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        native.shoal_rms_norm_gradients(
            dout.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            x.numel() // width,
            width,
            eps,
            dx.data_ptr(),
            dweight.data_ptr(),
        )
        return dx, dweight
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed, scaled = x * scale, dout * weight
    dx = scale * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx, (dout * normed).flatten(0, -2).sum(0)
