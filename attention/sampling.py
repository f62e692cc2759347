"""The next token from logits, as a pure function of (logits, history, params, position).

Each row is computed alone in float64, and its one random number comes from a counter-based generator keyed by
(request seed, position): a continuation on another machine draws what this one would have drawn.
Shapes: `V` vocabulary.
"""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention.requests import SamplingParams, TokenLogprob

FIRST = 256  # tokens that hold top_p of the mass nearly always
MOST_FIRST = 1024  # of a draw that others are drawn with
ROUNDING = 1e-9  # of a mass, which is not summed in the same order everywhere
TOGETHER = 8  # draws whose probabilities are in memory at once, and in a CPU's last cache
Probabilities = NDArray[np.float64]
Ids = NDArray[np.int64]
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


def restrict(logits_V: Tensor, allowed: bytes) -> Tensor:
    """Logits in which only tokens can be drawn whose bit is set, the lowest of a byte first."""
    bits = np.unpackbits(np.frombuffer(allowed, dtype=np.uint8), count=len(logits_V), bitorder="little")
    forbidden_V = torch.from_numpy(bits == 0).to(logits_V.device)
    return logits_V.masked_fill(forbidden_V, -torch.inf)


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """A token to be drawn from penalised logits, at an absolute position: temperature, top_k, top_p, min_p."""

    logits_V: Tensor
    params: SamplingParams
    position: int


def draw_all(draws: Tokens[Draw]) -> list[int]:
    """Each draw's token, in their order. Logits of all are on one device, which is waited for a few times in all.

    A token is a function of its own logits, params and position, whatever is drawn with it.
    """
    tokens = [0] * len(draws)
    greedy: dict[torch.dtype, list[int]] = {}
    spread: dict[torch.dtype, list[int]] = {}
    for place, one in enumerate(draws):
        kind = greedy if one.params.temperature < GREEDY_BELOW else spread
        kind.setdefault(one.logits_V.dtype, []).append(place)
    for places in greedy.values():
        rows = [draws[place].logits_V for place in places]
        if rows[0].device.type == "cpu":
            best = [int(logits_V.argmax()) for logits_V in rows]
        else:
            best = torch.stack(rows).argmax(-1).tolist()
        for place, token in zip(places, best, strict=True):
            tokens[place] = token
    for places in spread.values():
        for start in range(0, len(places), TOGETHER):
            some = places[start : start + TOGETHER]
            for place, token in zip(some, _draw_spread([draws[place] for place in some]), strict=True):
                tokens[place] = token
    return tokens


def _draw_spread(draws: Tokens[Draw]) -> list[int]:
    """Of draws that are not greedy, whose logits have one dtype."""
    device = draws[0].logits_V.device
    temperature_L1 = torch.tensor([[one.params.temperature] for one in draws], dtype=torch.float64, device=device)
    probabilities_LV = torch.softmax(torch.stack([one.logits_V for one in draws]).double() / temperature_L1, dim=-1)
    counts = [_looked_for(one.params, probabilities_LV.shape[1]) for one in draws]
    firsts = probabilities_LV.topk(max(counts) + 1) if any(counts) else None
    # running sums on CPU: a GPU's are not the same twice
    likeliest = None if firsts is None else (firsts.values.cpu().numpy(), firsts.indices.cpu().numpy())
    tokens = []
    for place, (one, count) in enumerate(zip(draws, counts, strict=True)):
        if not one.params.narrows:
            tokens.append(_inverse(probabilities_LV[place].cpu().numpy(), uniform(one.params.seed, one.position)))
            continue
        token = None
        if count and likeliest is not None:
            token = _among(likeliest[0][place], likeliest[1][place], count, one)
        tokens.append(_among_all(probabilities_LV[place].cpu().numpy(), one) if token is None else token)
    return tokens


def _looked_for(params: SamplingParams, vocabulary: int) -> int:
    """How many of the likeliest tokens are looked for at first; 0: none.

    To sort a large vocabulary takes longer than a layer, so as many as top_k names, or as hold top_p nearly always.
    """
    count = params.top_k or FIRST
    return count if params.narrows and count < min(vocabulary, MOST_FIRST) else 0


def _among(ordered_K: Probabilities, tokens_K: Ids, count: int, one: Draw) -> int | None:
    """The token, if it is surely one of the `count` likeliest; None where more may be kept, or another is as likely as
    the last.
    """
    params, first = one.params, ordered_K[:count]
    whole = params.top_k or first.sum() >= params.top_p + ROUNDING or first[-1] < params.min_p * first[0]
    if not whole or first[-1] == ordered_K[count]:
        return None
    order = np.lexsort((tokens_K[:count], -first))  # equal ones by id
    return int(tokens_K[order[_place(first, one)]])


def _among_all(probabilities_V: Probabilities, one: Draw) -> int:
    """The token, of all: only what is likely is sorted, not who, for that takes several times as long."""
    ordered = -np.sort(-probabilities_V)
    place = _place(ordered[: one.params.top_k or len(ordered)], one)
    likelier = int(np.searchsorted(-ordered, -ordered[place]))
    as_likely = np.flatnonzero(probabilities_V == ordered[place])
    return int(as_likely[place - likelier]) if len(as_likely) else 0  # where the logits are no numbers


def _place(ordered: Probabilities, one: Draw) -> int:
    """Which is drawn of tokens of these probabilities, the likeliest first, of which some are kept."""
    params = one.params
    kept = len(ordered)
    if params.top_p < 1.0:
        # A token stays while the mass before it, within what top_k left, is below top_p: the first always.
        running = ordered.cumsum()
        kept = int(np.count_nonzero(running - ordered < params.top_p * (running[-1] if params.top_k else 1.0)))
    if params.min_p > 0.0:
        kept = min(kept, int(np.count_nonzero(ordered >= params.min_p * ordered[0])))
    return _inverse(ordered[: max(1, kept)], uniform(params.seed, one.position))


def _inverse(weights: Probabilities, threshold: float) -> int:
    """Index at which the running sum of `weights` passes `threshold` of the total."""
    running = torch.from_numpy(weights).cumsum(0).numpy()  # twice as fast as numpy's
    index = int(np.searchsorted(running, threshold * running[-1], side="right"))
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
