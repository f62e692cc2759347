"""Write a LoRA adapter as PEFT reads it: whole or not at all."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from model.adapters.errors import AdapterError
from model.adapters.lora_config import FILE, lora_config
from model.adapters.lora_layout import place
from model.adapters.lora_read import WEIGHTS
from model.adapters.spec import LoraSpec, lora_tensors
from model.adapters.tensor_file import TensorFile
from model.config import ModelConfig
from model.staging import staged


def write_adapter(
    out: Path | str, spec: LoraSpec, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], base_name: str
) -> Path:
    """Write every matrix that `lora_tensors(config, spec)` names, in fp32, with adapter_config.json.

    Tensors are taken one by one, in any order; in the order of `lora_tensors` no more than one layer's routed experts
    are in memory. `base_name` is what PEFT shall look for as the base: a directory or a name on the Hub. `out` appears
    only when all of it is written. Raises AdapterError when a matrix is missing, unknown, misshaped, given twice or not
    finite, and CheckpointError when `out` is in use.
    """
    out = Path(out).absolute()
    shapes = lora_tensors(config, spec)
    places = {name: place(name, shape, config.n_routed_experts) for name, shape in shapes.items()}
    missing = dict.fromkeys(shapes)
    with staged(out) as staging:
        with (staging / WEIGHTS).open("wb") as raw:
            file = TensorFile(raw, {place.tensor: (torch.float32, place.shape) for place in places.values()})
            for name, tensor in tensors:
                if name not in shapes:
                    raise AdapterError(f"{name} is not of this adapter; expected what lora_tensors names")
                if name not in missing:
                    raise AdapterError(f"{name} was given twice")
                if tensor.shape != shapes[name]:
                    raise AdapterError(f"{name} is {list(tensor.shape)}; expected {list(shapes[name])}")
                if not tensor.isfinite().all():
                    raise AdapterError(f"{name} has numbers that are not finite: training diverged before this")
                del missing[name]
                file.put(places[name].tensor, tensor, places[name].index)
        if missing:
            raise AdapterError(f"matrices were not given: {len(missing)}, first {next(iter(missing))}")
        document = json.dumps(lora_config(spec, config, base_name), indent=2) + "\n"
        (staging / FILE).write_text(document, encoding="utf-8")
    return out
