"""The native CPU kernels as ctypes sees them. Pointers are `Tensor.data_ptr()`; every tensor is float32 unless it says
otherwise, and who calls has checked its shape and strides."""

import ctypes
import importlib.util
import os
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache

import torch
from torch import Tensor

from kernels.build import buildable, library

CHOICE = "SHOAL_KERNELS"  # environment: an instruction set's name, or "torch"

LEAST_CAPABILITY = (8, 0)  # tensor cores that multiply bf16

_KINDS = {"p": c_void_p, "l": c_long, "i": c_int, "f": c_float, "-": None}
_SIGNATURES = {
    "shoal_set_threads": ("-", "il"),
    "shoal_pack": ("-", "plllpli"),
    "shoal_unpack": ("-", "plllpli"),
    "shoal_linear": ("-", "plllpilllpllp"),
    "shoal_product": ("-", "plilplillpl"),
    "shoal_experts": ("l", "plllppppplllplp"),
    "shoal_gated": ("-", "pplllp"),
    "shoal_gated_gradients": ("-", "pplppllppp"),
    "shoal_rms_norm": ("-", "plpllfpl"),
    "shoal_rms_norm_gradients": ("-", "pppllfpp"),
    "shoal_rotate_heads": ("-", "pllllpppl"),
    "shoal_write_latents": ("-", "plpppplllfp"),
    "shoal_route": ("-", "plllllifpp"),
    "shoal_combine": ("-", "ppplplllppp"),
    "shoal_split_slots": ("l", "ppllplpppppp"),
    "shoal_latent_attention": ("-", "pppllppllllfp"),
    "shoal_causal_attention": ("-", "pllpllpllpllllfpp"),
    "shoal_causal_gradients": ("-", "ppllpllpllpppllllfppp"),
    "shoal_send": ("l", "pplpllpplllplp"),
    "shoal_receive": ("l", "pplpplllppppllp"),
    "shoal_news": ("l", "plpl"),
    "shoal_wait_news": ("l", "plpill"),
    "shoal_ring": ("-", "p"),
    "shoal_announce": ("-", "pllli"),
    "shoal_answer": ("l", "ppppppll"),
}
"""Result and arguments of each function: pointer, long, int or float."""


def instruction_set() -> str:
    """The kernels that serve on CPU in this process: avx512, avx2, portable, or torch where none was built.

    The environment's SHOAL_KERNELS names another, or triton where Triton interprets (TRITON_INTERPRET=1): the GPU's
    kernels, very slowly. Raises ValueError when that one cannot serve here.
    """
    able = [name for name in buildable() if runs_here(name) and library(name) is not None]
    asked = os.environ.get(CHOICE)
    if asked is None:
        return able[0] if able else "torch"
    interpreted = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" and _triton_is_installed() else ()
    if asked not in (*able, "torch", *interpreted):
        raise ValueError(
            f"{CHOICE} is {asked!r}; expected one of {[*able, 'torch']} (python -m kernels.build builds them)"
        )
    return asked


def arithmetic(device: torch.device | str) -> str:
    """Whose results have the same bits: `fused`, which AVX2 and AVX-512 are, `portable`, `torch`, or a kind of GPU."""
    kind = torch.device(device).type
    if kind != "cpu":
        if not torch.cuda.is_available():
            return kind
        major, minor = torch.cuda.get_device_capability(device)
        return f"{kind} {major}.{minor} {'triton' if triton_serves(device) else 'torch'}"
    name = instruction_set()
    return "fused" if name in ("avx2", "avx512") else name


def runs_here(name: str) -> bool:
    """Whether this machine has an instruction set."""
    level = {"portable": 0, "avx2": 1, "avx512": 2}[name]
    return level <= {"AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)


@cache
def native() -> ctypes.CDLL | None:
    """The library of this process, loaded once; None where the torch kernels serve."""
    name = instruction_set()
    if name in ("torch", "triton"):
        return None
    loaded = ctypes.CDLL(str(library(name)))
    for function, (result, arguments) in _SIGNATURES.items():
        getattr(loaded, function).restype = _KINDS[result]
        getattr(loaded, function).argtypes = [_KINDS[kind] for kind in arguments]
    return loaded


def triton_serves(device: torch.device | str) -> bool:
    """Whether the kernels in `kernels.gpu` compute for tensors of a device.

    They do on CUDA where Triton is, as with every build of torch for it, and SHOAL_KERNELS is not "torch".
    """
    if torch.device(device).type == "cpu":
        return os.environ.get(CHOICE) == "triton"
    return os.environ.get(CHOICE) != "torch" and _triton_is_installed() and _multiplies_bf16()


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _multiplies_bf16() -> bool:
    return torch.cuda.get_device_capability() >= LEAST_CAPABILITY


def check_dense(dtype: torch.dtype, *tensors: Tensor) -> None:
    """Assert that native code may read these from end to end as numbers of `dtype`."""
    for tensor in tensors:
        assert tensor.dtype is dtype, f"a tensor is {tensor.dtype}; expected {dtype}"
        assert tensor.is_contiguous()


def native_serves(tensor: Tensor) -> bool:
    """Whether there are native kernels for tensors such as this one: fp32 on CPU, where they were built."""
    return tensor.dtype is torch.float32 and native_for(tensor.device) is not None


def native_for(device: torch.device | str) -> ctypes.CDLL | None:
    """The native library for tensors of a device; None where torch computes."""
    return native() if torch.device(device).type == "cpu" else None
