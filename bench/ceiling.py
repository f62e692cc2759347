"""What the processor allows a prefill: the products that a prompt's token takes, at the speed of the best product."""

import torch
import torch.nn.functional as F  # noqa: N812

from bench.child import now_s
from bench.results import Ceiling
from model.config import ModelConfig
from services.footprint import Layout, footprint

SIDE = 2048  # of a square product, which is large enough to be limited by nothing but multiplying
ROUNDS = 9


def measure_ceiling(config: ModelConfig) -> Ceiling:
    """Of torch's own product, its fastest round; torch's threads are whatever they are set to."""
    x, weight = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    fastest_s = float("inf")
    with torch.inference_mode():
        for _ in range(ROUNDS):
            started_s = now_s()
            F.linear(x, weight)
            fastest_s = min(fastest_s, now_s() - started_s)
    return Ceiling(product_gflops=2e-9 * SIDE**3 / fastest_s, token_gflop=2e-9 * _multiplied(config))


def _multiplied(config: ModelConfig) -> int:
    """Weights that a prompt's token is multiplied with: the head is for each prompt's last token alone."""
    head = config.vocab_size * config.hidden_size
    return footprint(config, Layout(hosts=1)).active - head
