"""Training on the expert hosts: backward, optimizer step and state of the experts that a host holds."""
