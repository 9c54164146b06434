"""What the command line offers; apart, so that it can say so without importing PyTorch."""

BESIDE = ("e2enet", "nnunet", "resenc")
"""Networks that can be built from plans."""
SPARSITIES = (0.0, 0.7, 0.8, 0.9)
"""Of E2ENet, in a profile."""
