"""How a checkpoint's author would have it generate, from generation_config.json: sampling defaults and end tokens."""

from dataclasses import dataclass
from pathlib import Path

from model.config_fields import ConfigError, Fields
from model.json_file import read_object


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a request that is silent samples with."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    repetition_penalty: float = 1.0


def read_generation_defaults(directory: Path) -> GenerationDefaults:
    """Read generation_config.json; absent fields, or an absent file, mean OpenAI's defaults.

    `do_sample` false does not make an API request greedy: transformers writes it into every file.
    """
    path, raw = _read(directory)

    def number(name: str, default: float, low: float, high: float) -> float:
        value = raw.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(f"{path}: {name} is {value!r}; expected a number from {low} to {high}")
        return float(value)

    return GenerationDefaults(
        temperature=number("temperature", 1.0, 0.0, 2.0),
        top_p=number("top_p", 1.0, 1e-6, 1.0),
        top_k=int(number("top_k", 0, 0, 1e6)),
        repetition_penalty=number("repetition_penalty", 1.0, 1e-3, 10.0),
    )


def read_end_tokens(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """generation_config.json's `eos_token_id`: an id, a list of them, or none.

    Chat fine-tunes name the token that ends a turn here alone. Raises ConfigError for what is no token id.
    """
    path, raw = _read(directory)
    return Fields(raw, f"{path}: ").tokens("eos_token_id", vocab_size)


def _read(directory: Path) -> tuple[Path, dict[str, object]]:
    """The file and its fields, none where it is absent; raises ConfigError for what is no JSON object."""
    path = Path(directory) / "generation_config.json"
    raw = read_object(path, ConfigError, "") if path.exists() else {}
    return path, raw
