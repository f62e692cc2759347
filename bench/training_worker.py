"""transformers' full fine-tuning in a process of its own: AdamW, forward and backward of the whole batch at once."""

import sys
from pathlib import Path

import torch
from pydantic import TypeAdapter

from bench.child import answer_commands, now_s
from bench.timing import Prompts

LEARNING_RATE = 1e-6


class Trainer:
    """One model, as transformers trains it fastest here among its implementations of the experts."""

    def __init__(self, directory: Path, experts: str) -> None:
        from transformers import DeepseekV2ForCausalLM

        self._model = DeepseekV2ForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
        )
        self._model.train()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self, sequences: Prompts) -> float:
        """Seconds of one step over these token ids, all of the same length."""
        ids = torch.tensor([list(sequence) for sequence in sequences])
        started_s = now_s()
        self._model(ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return now_s() - started_s


def main() -> None:
    """`python -m bench.training_worker DIR THREADS EXPERTS`."""
    torch.set_num_threads(int(sys.argv[2]))
    trainer = Trainer(Path(sys.argv[1]), sys.argv[3])
    sequences, seconds = TypeAdapter(Prompts), TypeAdapter(float)
    answer_commands({"step": lambda raw: seconds.dump_json(trainer.step(sequences.validate_json(raw)))})


if __name__ == "__main__":
    main()
