"""Data sets that the package can make by itself."""

from nnunetv2_e2enet.datasets.phantom import LABELS, MANY_LABELS, phantom_case, write_phantom_dataset

__all__ = ["LABELS", "MANY_LABELS", "phantom_case", "write_phantom_dataset"]
