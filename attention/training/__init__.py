"""The dense side of training: the decoder with gradients, its losses, its optimizer, and one worker's step."""
