"""`python -m tests.gpu.compiled CAPABILITY`: which instructions the products are compiled to; no GPU is needed for it.

Prints one JSON object a compiled kernel: its name, constants, how often each kind of matrix
instruction is in it, and the bytes of shared memory that a program takes.
"""

import json
import re
import sys
from collections import Counter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels.gpu.attention import latent_attention
from kernels.gpu.attention_cut import Cut, tiles_for
from kernels.gpu.experts import expert_layer
from kernels.gpu.product import head_products, product
from kernels.gpu.tiles import CRAMPED, CRAMPED_DEVICES, NARROW

MATRIX = re.compile(
    r"\b(wgmma\.mma_async\.sync\.aligned\.m\d+)n\d+(k\d+)|\b(mma\.sync\.aligned\.m\d+n\d+k\d+)|\b(tcgen05\.mma[.\w:]*)"
)


class NoDevice:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object = None) -> int:
        return 0


def compile_only(run: Any) -> Any:
    """In place of `JITFunction.run`."""

    def compiled(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        kinds = Counter("".join(part for part in found if part) for found in MATRIX.findall(kernel.asm["ptx"]))
        told = {"kernel": self.fn.__name__, "constants": options, "matrix": kinds, "shared": kernel.metadata.shared}
        print(json.dumps(told), flush=True)
        return kernel

    return compiled


def main() -> None:
    capability = int(sys.argv[1])
    triton.runtime.driver.set_active(NoDevice(capability))
    JITFunction.run = compile_only(JITFunction.run)
    kind = torch.bfloat16
    x, key, table = torch.zeros(96, 2048, dtype=kind), torch.zeros(576, dtype=torch.int64), torch.zeros(2, 64).long()
    heads = torch.zeros(16, 512, 128, dtype=kind)
    for each in CRAMPED if divmod(capability, 10) in CRAMPED_DEVICES else NARROW:
        product(x, torch.zeros(3072, 2048, dtype=kind), kind, None, each)
        expert_layer(x, key, table, 1408, torch.zeros(576, 2048), top_k=6, tile=each)
    head_products(torch.zeros(96, 16, 128, dtype=kind), heads, torch.zeros(96, 16, 512, dtype=kind))
    expert_layer(x, x[:, 0], table[:, :1], 2816, torch.zeros_like(x), add_PD=x)
    cache, tables, owner = torch.zeros(100, 16, 576, dtype=kind), torch.zeros(8, 64).int(), torch.zeros(96).int()
    tiles = tiles_for(kind, divmod(capability, 10))
    for cut in (Cut(apart=False, together=True), Cut(apart=True, together=False)):
        tile = tiles.many if cut.together else tiles.few
        latent_attention(torch.zeros(96, 16, 576, dtype=kind), cache, tables, owner, owner, 512, 0.1, cut, tile)


if __name__ == "__main__":
    main()
