"""A recipe of a few steps on a few lines of text."""

import json
from pathlib import Path
from typing import Any


def small_run(model: Path, place: Path) -> dict[str, Any]:
    """Write its data to `place`; fields of the recipe."""
    data = place / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"number {n}"}) + "\n" for n in range(20)))
    return {
        "model": str(model),
        "output_dir": str(place / "out"),
        "data": {"files": [str(data)], "sequence_length": 64},
        "steps": 4,
        "batch_tokens": 128,
        "micro_batch_tokens": 64,
    }
