"""adapter_config.json as PEFT has it: written for a spec, and read for what changes the arithmetic."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.adapters.errors import AdapterError
from model.adapters.lora_layout import DOWN, GATE_UP
from model.adapters.spec import LoraSpec, lora_modules, lora_scaling
from model.config import ModelConfig
from model.json_file import read_object

FILE = "adapter_config.json"
FOREIGN = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in B",
    "modules_to_save": "modules trained beside LoRA",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "repeated layers",
    "fan_in_fan_out": "transposed weights",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
"""Fields that mean more than W + scaling · B · A when they are set."""
BASE_STAYS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base as it was; the others (PiSSA, OLoRA, …) subtract from it."""
READ = frozenset({"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"})
NO_MATTER = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
        *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules", "target_parameters"),
        *("bias", "ensure_weight_tying", "lora_dropout", "megatron_config", "megatron_core", "runtime_config"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "qalora_group_size", "velora_config"),
    }
)
"""Fields that are checked by themselves, or say how it was trained or which layers, which the tensors tell."""
SAFE_PATTERN = re.compile(r"(?:\.\*|\\?\.|\\d\+?|\[[\w-]+\]\+?|[\w^$|()-])+")
REPEATS = 3  # in one pattern of names: more could take a regular expression forever


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Rank and scale of each module, by the module's name in transformers."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, float]  # by pattern, the first that fits
    alphas: Mapping[str, float]
    parameters: frozenset[str]  # ends of names of parameters that were targeted as such

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scaling of one module."""
        parameter = f"{module}.weight"
        targeted = any(f".{parameter}".endswith(f".{target}") for target in self.parameters)
        name = parameter if targeted else module
        rank = int(_first(self.ranks, name, self.rank))
        return rank, lora_scaling(_first(self.alphas, name, self.alpha), rank, self.rslora)


def lora_config(spec: LoraSpec, config: ModelConfig, base_name: str) -> dict[str, object]:
    """The fields that PEFT needs. Multilayer perceptrons are targeted by parameter: given as modules, PEFT takes
    gate_proj, up_proj and down_proj for those of the routed experts and leaves the others alone."""
    ends = sorted({_end(module) for module in lora_modules(config, spec)})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "use_rslora": spec.rslora,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": [end for end in ends if "mlp." not in end],
        "target_parameters": [end for end in ends if "mlp." in end],
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def read_lora_config(path: Path) -> LoraSettings:
    """Raises AdapterError naming the field that cannot be applied, or what is wrong with the file."""
    raw = read_object(path, AdapterError, "give the directory of a LoRA adapter in PEFT's format")
    _refuse(path, raw)
    rank = raw.get("r")
    if not isinstance(rank, int) or not _is_number(rank):
        raise AdapterError(f"{path}: r is {rank!r:.200}; expected an integer of at least 1")
    if not _is_number(raw.get("lora_alpha")):
        raise AdapterError(f"{path}: lora_alpha is {raw.get('lora_alpha')!r:.200}; expected a finite number above 0")
    if not isinstance(raw.get("use_rslora", False), bool):
        raise AdapterError(f"{path}: use_rslora is {raw['use_rslora']!r}; expected true or false")
    parameters = raw.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise AdapterError(f"{path}: target_parameters is {parameters!r:.200}; expected a list of names")
    return LoraSettings(
        rank,
        float(raw["lora_alpha"]),
        raw.get("use_rslora", False),
        _patterns(path, raw, "rank_pattern"),
        _patterns(path, raw, "alpha_pattern"),
        frozenset(parameters),
    )


def _refuse(path: Path, raw: Mapping[str, object]) -> None:
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {raw.get('peft_type')!r}; expected 'LORA': no other is applied")
    for field, meaning in FOREIGN.items():
        if raw.get(field):
            raise AdapterError(f"{path}: {field} is set ({meaning}); only plain LoRA is applied: merge it with PEFT")
    if raw.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias is {raw['bias']!r}; expected 'none': DeepSeek-V2 has no biases")
    start = raw.get("init_lora_weights")
    if start not in BASE_STAYS:
        raise AdapterError(
            f"{path}: init_lora_weights is {start!r}, which changes the base weights: save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )
    unknown = [name for name, value in raw.items() if value and name not in READ | NO_MATTER | FOREIGN.keys()]
    if unknown:
        raise AdapterError(
            f"{path} sets {', '.join(sorted(unknown)[:5])}, which this version does not know: "
            "remove what does not change the arithmetic, or merge it with PEFT"
        )


def _patterns(path: Path, raw: Mapping[str, object], field: str) -> Mapping[str, float]:
    patterns = raw.get(field) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{path}: {field} is {patterns!r:.200}; expected names and numbers")
    for pattern, value in patterns.items():
        whole = field == "alpha_pattern" or isinstance(value, int)
        if not _is_number(value) or not whole:
            raise AdapterError(f"{path}: {field} gives {pattern!r} {value!r}; expected a number above 0")
        repeats = pattern.count("*") + pattern.count("+")
        if SAFE_PATTERN.fullmatch(pattern) is None or repeats > REPEATS:
            raise AdapterError(
                f"{path}: {field} has the pattern {pattern!r:.200}; expected module names, in which . .* \\d+ [0-9] "
                f"(a|b) may stand for others, with at most {REPEATS} repeats"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterError(f"{path}: {field} has the pattern {pattern!r:.200}, which is none: {error}") from error
    return patterns


def _first(patterns: Mapping[str, float], name: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the whole name or its end after a dot."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _end(module: str) -> str:
    """What PEFT shall look for: the end of the name of a linear layer, or of a parameter of an MLP."""
    parts = module.split(".")[3:]
    if parts[0] == "self_attn":
        return parts[-1]
    if parts[-1] in (GATE_UP, DOWN) and parts[1] == "experts":
        return f"mlp.experts.{parts[-1]}"
    return ".".join([*parts, "weight"])
