"""E2ENet's forward pass in NumPy, from its description alone, and what it computes for small networks: ``reference.py``."""
