"""Choices of command line options, in a module that does not import PyTorch."""

BESIDE = ("e2enet", "nnunet", "resenc")
"""Networks that can be built from plans."""
SPARSITIES = (0.0, 0.7, 0.8, 0.9)
"""Of E2ENet, in a profile."""
