"""How far a result is from what float64 gives."""

import torch
from torch import Tensor

TOLERATED = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def close(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Of numbers that were given in `dtype`: the norm of the error, by that of what is expected."""
    assert out.shape == expected.shape
    out, expected = out.double().cpu(), expected.double().cpu()
    error = float((out - expected).norm() / expected.norm())
    assert error < TOLERATED[dtype], f"relative error {error:.1e}"
