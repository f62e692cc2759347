"""Training data: from files to the rows of a global batch."""
