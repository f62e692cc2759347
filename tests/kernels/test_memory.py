"""What attention of a long prompt takes beside what it is given and gives back."""

import gc
from pathlib import Path

import pytest
import torch

from kernels.attention import latent_attention

TOKENS, HEADS, LATENT, ROTARY, BLOCK = 4096, 4, 16, 8, 16
SCORES_BYTES = 4 * HEADS * TOKENS * TOKENS
OWN_BYTES = SCORES_BYTES // 8


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system keeps the peak")


def test_scores_of_a_long_prompt_are_never_there_at_once() -> None:
    q, cache = torch.randn(TOKENS, HEADS, LATENT + ROTARY), torch.randn(TOKENS // BLOCK, BLOCK, LATENT + ROTARY)
    tables = torch.arange(TOKENS // BLOCK, dtype=torch.int32)[None]
    owners, positions = torch.zeros(TOKENS, dtype=torch.int32), torch.arange(TOKENS, dtype=torch.int32)
    gc.collect()  # what it would free meanwhile would hide as much
    forget_peak()
    before = resident("VmRSS")
    out = latent_attention(q, cache, tables, owners, positions, LATENT, 0.3)
    assert resident("VmHWM") - before < OWN_BYTES
    assert out.isfinite().all()
