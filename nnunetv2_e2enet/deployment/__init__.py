"""Trained models for use elsewhere: one file with active weights only, prediction from it, and ONNX."""

from nnunetv2_e2enet.deployment.description import Description
from nnunetv2_e2enet.deployment.export import pack_model
from nnunetv2_e2enet.deployment.packed import PackedModel, read_packed, write_packed
from nnunetv2_e2enet.deployment.segmenter import Segmenter

__all__ = ["Description", "PackedModel", "Segmenter", "pack_model", "read_packed", "write_packed"]
