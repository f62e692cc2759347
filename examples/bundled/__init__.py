"""The bundled model's recipe: its shape, its tokenizer, the data it learns from, and its examination."""
