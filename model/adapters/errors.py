"""What can be wrong with an adapter."""

from model.safetensors_header import CheckpointError


class AdapterError(CheckpointError):
    """An adapter cannot be written, or not be applied to this model; the message names what and the fix."""
