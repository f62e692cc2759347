"""Rotary position embedding of DeepSeek-V2: interleaved pairs, plain or YaRN frequencies.

Shapes: `T` tokens, `N` heads, `R` rotary dimensions (qk_rope_head_dim).
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angular speed of each rotary pair, [R / 2] fp32, in radians a position.

    YaRN blends per pair: fast pairs keep their speed (extrapolation), slow ones are divided by `factor`
    (interpolation), with a linear ramp between (arXiv 2309.00071, eqs 19-23).
    """
    width = config.qk_rope_head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    extrapolated = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return extrapolated
    interpolated = 1.0 / (scaling.factor * config.rope_theta**exponents)
    keep = 1.0 - _ramp(scaling, config.rope_theta, width)
    return interpolated * (1.0 - keep) + extrapolated * keep


def _ramp(scaling: RopeScaling, theta: float, width: int) -> Tensor:
    """0 for pairs that turn often within the original context, 1 for those that hardly turn, [R / 2]."""

    def pair_turning(rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high: float = min(math.ceil(pair_turning(scaling.beta_slow)), width - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(width // 2, dtype=torch.float32)
    return ((pairs - low) / (high - low)).clamp(0, 1)


def rotation_gain(config: ModelConfig) -> float:
    """What cos and sin are multiplied by: g(mscale) / g(mscale_all_dim), 1 when the two are equal."""
    scaling = config.rope_scaling
    if scaling is None or scaling.factor <= 1:
        return 1.0

    def gain(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return gain(scaling.mscale) / gain(scaling.mscale_all_dim)
    return gain(1.0)


class RotaryTable:
    """cos and sin of every position below `length`, computed once, so that a position's bits never vary."""

    def __init__(self, config: ModelConfig, length: int, device: torch.device | str = "cpu") -> None:
        positions = torch.arange(length, dtype=torch.float32)
        # The angle is rounded to fp32, as in the released code; its cosine is then taken exactly.
        angles = (positions[:, None] * inverse_frequencies(config)).double()
        gain = rotation_gain(config)
        self.cos_PR = (angles.cos() * gain).float().to(device)
        self.sin_PR = (angles.sin() * gain).float().to(device)

    def at(self, position_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, R / 2] fp32, of integer positions [T]."""
        return self.cos_PR[position_T], self.sin_PR[position_T]
