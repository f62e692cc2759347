"""W + scaling · B · A, with the same bits on every host."""

import torch
from torch import Tensor

from kernels.linear import PackedLinear


def merge(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """The merged weight [O, I] in the weight's dtype: computed in fp32 (fp64 where the weight is) and rounded once.

    The kernel's bits do not depend on the number of threads, so that copies of an expert are equal wherever they were
    merged; scale and sum are separate operations for the same reason.
    """
    delta_OI = PackedLinear(a_RI.t())(b_OR).mul_(scaling)
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    return delta_OI.to(wide).add_(weight_OI).to(weight_OI.dtype)
