"""Whatever the number of rows, a product is compiled to one kind of instruction: what its bits rest on.

Attention on Hopper has two, which give a row the same bits there: the tests for a GPU look. And every program fits the
shared memory that the device has for one.
"""

import json
import os
import subprocess
import sys

import pytest

TIMEOUT_S = 300
MULTIPLY = {"_product", "_hidden", "_answers", "_attend"}
AMPERE, HOPPER = "mma.sync.aligned.m16n8k16", "wgmma.mma_async.sync.aligned.m64k16"
BLACKWELL = "tcgen05.mma.cta_group::1.kind::f16"


@pytest.mark.parametrize(
    ("capability", "instruction", "shared_kib"),
    [
        (80, AMPERE, 163),
        (89, AMPERE, 99),
        (90, HOPPER, 227),
        (100, BLACKWELL, 227),
    ],
)
def test_every_tile_multiplies_with_one_instruction(capability: int, instruction: str, shared_kib: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.compiled", str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} >= MULTIPLY
    attends = {name for kernel in kernels if kernel["kernel"] == "_attend" for name in kernel["matrix"]}
    assert attends == ({AMPERE, HOPPER} if capability == 90 else {instruction})
    for kernel in kernels:
        assert kernel["shared"] <= shared_kib << 10, kernel
        if kernel["kernel"] != "_attend":
            assert set(kernel["matrix"]) == ({instruction} if kernel["kernel"] in MULTIPLY else set()), kernel
