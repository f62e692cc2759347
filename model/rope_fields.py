"""Rotary settings in either form found in the wild: rope_scaling + rope_theta, or rope_parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

from model.config_fields import ConfigError, Fields


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """YaRN (arXiv 2309.00071); lengths in tokens."""

    factor: float
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    original_max_position_embeddings: int


def read_rope(raw: Mapping[str, object]) -> tuple[float, RopeScaling | None]:
    """rope_theta and the YaRN settings, None for plain rotary embedding."""
    old, new = raw.get("rope_scaling"), raw.get("rope_parameters")
    if old is not None and new is not None and old != new:
        raise ConfigError("rope_scaling and rope_parameters are both set and differ; expected one of them")
    name = "rope_scaling" if new is None else "rope_parameters"
    given = old if new is None else new
    if given is None:
        return Fields(raw).number("rope_theta", default=10000.0), None
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} is {given!r}; expected an object or null")
    fields = Fields(given, f"{name}.")
    theta = fields.number("rope_theta", default=Fields(raw).number("rope_theta", default=10000.0))
    kind = fields.choice("rope_type" if "rope_type" in given else "type", ("default", "yarn"), default="default")
    if kind == "default":
        return theta, None
    if theta <= 1:
        field = "rope_theta" if given.get("rope_theta") is None else f"{name}.rope_theta"
        raise ConfigError(f"{field} is {theta}; expected more than 1, as YaRN's ramp is by its logarithm")
    fast, slow = fields.number("beta_fast", default=32.0), fields.number("beta_slow", default=1.0)
    if fast < slow:
        raise ConfigError(f"{name}.beta_fast is {fast}; expected at least beta_slow ({slow})")
    factor = fields.number("factor")
    if factor < 1:
        raise ConfigError(f"{name}.factor is {factor}; expected at least 1")

    if given.get("attention_factor") is not None:
        raise ConfigError(f"{name}.attention_factor is set; expected mscale and mscale_all_dim to say it")
    if not fields.flag("truncate", default=True):
        raise ConfigError(f"{name}.truncate is false; expected true: the released model rounds YaRN's ramp")

    def mscale(field: str) -> float:  # absent and 0 both mean that it does not apply
        return fields.number(field) if given.get(field) else 0.0

    return theta, RopeScaling(
        factor=factor,
        beta_fast=fast,
        beta_slow=slow,
        mscale=mscale("mscale"),
        mscale_all_dim=mscale("mscale_all_dim"),
        original_max_position_embeddings=fields.size("original_max_position_embeddings"),
    )
