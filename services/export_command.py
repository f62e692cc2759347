"""`shoal export`: a checkpoint and the adapters that apply to it, as one checkpoint."""

import argparse
from pathlib import Path

from services.commands import CommandError


def add_parser(commands_: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `export` to the command line."""
    text = "Write a checkpoint with LoRA adapters merged and deltas applied, in Hugging Face's layout."
    command = commands_.add_parser("export", help=text, description=text)
    command.add_argument("model", metavar="MODEL", help="directory of the checkpoint")
    command.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="DIR",
        help="LoRA adapter or delta; may be given more than once, in the order in which they apply",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write it; 0 when it is there."""
    from model.adapters.overlay import merged_tensors, open_with_adapters
    from model.config import read_raw_config
    from model.export import export_checkpoint

    try:
        checkpoint = open_with_adapters(options.model, options.adapter)
        raw = read_raw_config(checkpoint.directory)
        out = export_checkpoint(options.out, raw, merged_tensors(checkpoint), checkpoint.directory)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    print(f"wrote {out}")
    return 0
