"""Which kernels serve, and that the number of threads changes no bit."""

import subprocess
import sys

import pytest
import torch

from kernels import build
from kernels.attention import latent_attention
from kernels.experts import PackedExperts
from kernels.linear import PackedLinear
from kernels.native import CHOICE, arithmetic, instruction_set, native
from kernels.swiglu import PackedSwiglu
from kernels.threads import set_threads


def test_the_environment_chooses(kernels: str) -> None:
    assert instruction_set() == kernels
    assert (native() is None) == (kernels == "torch")


def test_kernels_of_one_arithmetic_give_the_same_bits(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert arithmetic("cpu") == {"avx512": "fused", "avx2": "fused"}.get(kernels, kernels)
    assert arithmetic("cuda") == "cuda"
    if kernels != "avx512":
        return  # what fuses here is one instruction set, or none
    wide = compute(1)
    monkeypatch.setenv(CHOICE, "avx2")
    native.cache_clear()
    for got, wanted in zip(compute(1), wide, strict=True):
        assert torch.equal(got, wanted)


def test_unknown_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE, "sse9")
    with pytest.raises(ValueError, match="SHOAL_KERNELS is 'sse9'; expected one of"):
        instruction_set()


def test_changed_sources_are_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    before = build.library("portable")
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    assert build.library("portable") != before


def compute(threads: int) -> list[torch.Tensor]:
    """Every kernel that shares its work out, on sizes that are worth sharing."""
    set_threads(threads)
    generator = torch.Generator().manual_seed(9)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    experts = PackedExperts(200, 72)
    for expert in range(5):
        experts.load(expert, draw(72, 200), draw(72, 200), draw(200, 72))
    x = draw(130, 200)
    rows = torch.randint(130, (400,), generator=generator).int()
    chosen = torch.randint(5, (400,), generator=generator).int()
    positions = torch.cat((torch.arange(100), torch.tensor([40]))).int()
    owners = torch.cat((torch.zeros(100), torch.ones(1))).int()
    tables = torch.arange(26).view(2, 13).int()
    q, cache = draw(101, 4, 48), draw(26, 8, 48)
    return [
        PackedLinear(draw(333, 200))(x),
        experts(x, rows, chosen),
        PackedSwiglu(draw(72, 200), draw(72, 200), draw(200, 72))(x, x),
        latent_attention(q, cache, tables, owners, positions, 40, 0.2),
        latent_attention(q[-1:], cache, tables, owners[-1:], positions[-1:], 40, 0.2),
    ]


def test_the_number_of_threads_changes_no_bit(kernels: str) -> None:
    if kernels == "torch":
        pytest.skip("torch's own products may sum differently with another number of threads")
    threads = torch.get_num_threads()
    try:
        alone = compute(1)
        for count in (2, 3):
            for got, wanted in zip(compute(count), alone, strict=True):
                assert torch.equal(got, wanted)
    finally:
        set_threads(threads)


def test_the_whole_team_keeps_or_flushes_subnormal_numbers_as_the_caller_does(kernels: str) -> None:
    if kernels == "torch":
        pytest.skip("torch sets this for one thread")
    threads = torch.get_num_threads()
    linear, x = PackedLinear(torch.randn(640, 512) * 1e-20), torch.randn(300, 512) * 1e-20
    try:
        set_threads(3)
        kept = linear(x)
        if not torch.set_flush_denormal(True):
            pytest.skip("this machine always keeps them")
        flushed = [linear(x) for _ in range(10)]
        set_threads(1)
        flushed.append(linear(x))
        torch.set_flush_denormal(False)  # which would compare them as zeros, too
        assert torch.equal(kept, linear(x))
        assert kept.any()
        assert not torch.stack(flushed).any()
    finally:
        torch.set_flush_denormal(False)
        set_threads(threads)


FORKED = """
import ctypes, os, signal, sys
library = ctypes.CDLL(sys.argv[1])
x, out = (ctypes.c_float * 40000)(*[3.0] * 40000), (ctypes.c_float * 40000)()
def norm():
    library.shoal_rms_norm(x, ctypes.c_long(100), x, ctypes.c_long(400), ctypes.c_long(100), ctypes.c_float(0), out,
                           ctypes.c_long(100))
    return set(out) == {3.0}
library.shoal_set_threads(8, ctypes.c_long(0))
assert norm()
child = os.fork()
if not child:
    signal.alarm(20)
    alone = norm()
    library.shoal_set_threads(9, ctypes.c_long(0))
    os._exit(0 if alone and norm() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_has_a_team_of_its_own(kernels: str) -> None:
    if kernels == "torch":
        pytest.skip("torch has threads of its own")
    ran = subprocess.run([sys.executable, "-c", FORKED, str(build.library(kernels))], check=False, timeout=60)
    assert ran.returncode == 0
