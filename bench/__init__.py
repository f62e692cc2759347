"""The benchmark: transformers and Shoal side by side, in one run, on one checkpoint."""
