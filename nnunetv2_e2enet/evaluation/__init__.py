"""How a model is judged and shown."""
