"""Adapters for tests: random LoRA by our writer and by PEFT, and what PEFT makes of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV2ForCausalLM

from model.adapters.lora_write import write_adapter
from model.adapters.spec import LoraSpec, lora_tensors
from model.config import ModelConfig, read_config

TOKENS = torch.arange(2, 60)[None]
MLP = ("gate_proj", "up_proj", "down_proj")
V2 = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *MLP)
LITE = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *MLP)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def matrices(config: ModelConfig, spec: LoraSpec, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Random ones that change each weight by about a hundredth of a unit."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in lora_tensors(config, spec).items():
        yield name, 0.1 * torch.randn(shape, generator=generator)


def write_random(out: Path, base: Path, spec: LoraSpec, seed: int = 0) -> Path:
    config = read_config(base)
    return write_adapter(out, spec, config, matrices(config, spec, seed), str(base))


def load(base: Path, dtype: torch.dtype = torch.float32) -> DeepseekV2ForCausalLM:
    return DeepseekV2ForCausalLM.from_pretrained(
        base, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def peft_adapter(base: Path, out: Path, **settings: Any) -> Path:
    """A random adapter that PEFT made and saved."""
    torch.manual_seed(1)
    model = get_peft_model(load(base), LoraConfig(init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(out, save_embedding_layers=False)
    return out


def peft_merged(base: Path, adapter: Path, out: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights under Hugging Face's names after PEFT merged the adapter."""
    PeftModel.from_pretrained(load(base, dtype), adapter).merge_and_unload().save_pretrained(out)
    return load_file(out / "model.safetensors")


@torch.no_grad()
def peft_logits(base: Path, adapter: Path) -> Tensor:
    """[T, V] of TOKENS, by PEFT without merging."""
    return PeftModel.from_pretrained(load(base), adapter)(TOKENS).logits[0]


def edit_config(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(adapter: Path, add: dict[str, Tensor], drop: tuple[str, ...] = ()) -> None:
    path = adapter / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if name not in drop}
    save_file(kept | add, path)
