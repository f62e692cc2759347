"""The latent cache: kv_lora_rank + qk_rope_head_dim numbers a token a layer, in blocks of fixed size."""

import torch
from torch import Tensor

from model.config import ModelConfig


class LatentCache:
    """Storage of the latents, [layers, blocks, block_size, W]; which sequence owns a block is BlockPool's."""

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.block_size = block_size
        self.latent = config.kv_lora_rank
        self.data_LBSW = torch.zeros(
            config.num_hidden_layers, blocks, block_size, config.latent_width, dtype=dtype, device=device
        )

    def layer(self, layer: int) -> Tensor:
        """One layer's blocks, [blocks, block_size, W]."""
        return self.data_LBSW[layer]

    @property
    def nbytes(self) -> int:
        return self.data_LBSW.numel() * self.data_LBSW.element_size()


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that one block takes over all layers."""
    return config.num_hidden_layers * block_size * config.latent_width * dtype.itemsize
