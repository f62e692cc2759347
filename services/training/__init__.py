"""Fine-tuning: the data, the loss and the step of a training run."""
