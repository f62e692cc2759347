"""The next token from logits, as a pure function of (logits, history, params, position).

Each row is computed alone in float64, and its one random number comes from a counter-based generator keyed by
(request seed, position): a continuation on another machine draws what this one would have drawn.
Shapes: `V` vocabulary.
"""

from collections.abc import Sequence as Tokens

import numpy as np
import torch
from torch import Tensor

from attention.requests import SamplingParams, TokenLogprob

FIRST = 256  # tokens that hold top_p of the mass nearly always
GREEDY_BELOW = 1e-5  # a temperature this small divides logits beyond any use


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a function of the two alone (Philox 4x64-10)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def penalised(logits_V: Tensor, prompt: Tokens[int], answer: Tokens[int], params: SamplingParams) -> Tensor:
    """Float64 logits after repetition, presence and frequency penalties and logit_bias, in that order.

    The repetition penalty (arXiv 1909.05858) sees prompt and answer; the other two see the answer, as OpenAI's. Without
    any of them, the logits themselves.
    """
    if not (params.penalises or params.logit_bias):
        return logits_V
    logits = logits_V.to(torch.float64, copy=True)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *answer}), dtype=torch.int64, device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if answer and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(answer, dtype=torch.int64, device=logits.device)
        counts = torch.bincount(ids, minlength=len(logits)).double()
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    if params.logit_bias:
        tokens, biases = zip(*params.logit_bias, strict=True)
        ids = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
        logits.index_add_(0, ids, torch.tensor(biases, dtype=torch.float64, device=logits.device))
    return logits


def forbid(logits_V: Tensor, tokens: Tokens[int]) -> Tensor:
    """Logits in which `tokens` cannot be drawn."""
    if tokens:
        logits_V = logits_V.clone()
        logits_V[list(tokens)] = -torch.inf
    return logits_V


def draw(logits_V: Tensor, params: SamplingParams, position: int) -> int:
    """Draw the token at absolute `position` from penalised logits: temperature, top_k, top_p, min_p."""
    if params.temperature < GREEDY_BELOW:
        return int(logits_V.argmax())
    scaled = logits_V.double() / params.temperature
    probabilities = torch.softmax(scaled, dim=-1)
    threshold = uniform(params.seed, position)
    if not params.top_k and params.top_p >= 1.0 and params.min_p <= 0.0:
        return _inverse(probabilities.cpu(), threshold)
    # running sums on CPU: a GPU's are not the same twice
    ordered, tokens, mass = (each.cpu() for each in _likeliest(probabilities, params))
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_p < 1.0:
        # A token stays while the mass before it, within what top_k left, is below top_p: the first always.
        share = ordered / mass
        keep &= share.cumsum(0) - share < params.top_p
    if params.min_p > 0.0:
        keep &= ordered >= params.min_p * ordered[0]
    keep[0] = True
    return int(tokens[keep][_inverse(ordered[keep], threshold)])


def _likeliest(probabilities_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities and ids of at least those tokens that may be kept, likeliest first, equal ones by id; and the mass
    that top_k leaves.

    To sort a large vocabulary takes longer than a layer, so as many are looked for as top_k names, or as hold top_p
    nearly always; only where they do not is all of it sorted.
    """
    count = params.top_k or FIRST
    if count >= len(probabilities_V):
        ordered, tokens = probabilities_V.sort(descending=True, stable=True)
        return ordered, tokens, probabilities_V.sum()
    first = probabilities_V.topk(count).values
    mass = first.sum() if params.top_k else probabilities_V.sum()
    enough = params.top_k or (params.top_p < 1.0 and first.sum() >= params.top_p * mass)
    least = first[-1] if enough else params.min_p * first[0]
    candidates = (probabilities_V >= least).nonzero()[:, 0]  # topk's own choice among equals is not told
    ordered, order = probabilities_V[candidates].sort(descending=True, stable=True)
    tokens = candidates[order]
    return (ordered[:count], tokens[:count], mass) if params.top_k else (ordered, tokens, mass)


def _inverse(weights: Tensor, threshold: float) -> int:
    """Index at which the running sum of `weights` passes `threshold` of the total."""
    running = weights.cumsum(0)
    index = int(torch.searchsorted(running, threshold * running[-1], right=True))
    if index >= len(weights):  # the product rounded up to the total
        index = len(weights) - 1
    while weights[index] == 0:  # never a token of no probability
        index -= 1
    return index


def score(logits_V: Tensor, token: int, alternatives: int) -> TokenLogprob:
    """Log-probability of `token` and of the likeliest `alternatives`, or all there are, under the model's distribution.

    Taken before temperature and penalties, so it does not depend on how the request samples.
    """
    logprobs = torch.log_softmax(logits_V.double(), dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        values, ids = logprobs.topk(min(alternatives, len(logprobs)))
        top = tuple(sorted(zip(ids.tolist(), values.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0])))
    return TokenLogprob(token_id=token, logprob=float(logprobs[token]), top=top)
