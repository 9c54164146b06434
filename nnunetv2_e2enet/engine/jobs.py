"""The structs of the core's C ABI, field by field those of ``native/jobs.h``: maps, weights, and jobs for the core to run."""

from __future__ import annotations

from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_void_p


class Grid(Structure):
    """Tiles of a feature map; ``Grid`` of ``native/core.h``."""

    _fields_ = (
        ("depth", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("tiles_y", c_int32),
        ("tiles_x", c_int32),
        ("slice", c_int64),
        ("tiles", c_int64),
        ("chunk", c_int64),
    )


class Map(Structure):
    """A feature map in memory, with the norm that it still needs."""

    _fields_ = (
        ("data", c_void_p),
        ("channels", c_int64),
        ("grid", Grid),
        ("scale", c_void_p),
        ("offset", c_void_p),
        ("slope", c_float),
    )


class Norm(Structure):
    """Weights of an instance norm, and the memory for its statistics."""

    _fields_ = (
        ("gamma", c_void_p),
        ("beta", c_void_p),
        ("scale", c_void_p),
        ("offset", c_void_p),
        ("mean", c_void_p),
        ("rstd", c_void_p),
        ("unit", c_void_p),
        ("eps", c_double),
    )


class WinogradWeights(Structure):
    """Transformed kernels of a convolution and its connections; see ``ConvWeights``."""

    _fields_ = (
        ("weight", c_void_p),
        ("start", c_void_p),
        ("output", c_void_p),
        ("index", c_void_p),
        ("chunk_first", c_void_p),
        ("connections", c_int64),
        ("inputs", c_int32),
        ("outputs", c_int32),
        ("chunks", c_int32),
        ("dense", c_int32),
    )


class Upsample(Structure):
    """A transposed convolution from a coarser map; see ``UpsampleWeights``."""

    _fields_ = (
        ("coarse", Map),
        ("weight", c_void_p),
        ("start", c_void_p),
        ("output", c_void_p),
        ("index", c_void_p),
        ("connections", c_int64),
        ("outputs", c_int32),
        ("stride", c_int32 * 3),
    )


class ConvJob(Structure):
    """A convolution at stride 1 over the flows of a node."""

    _fields_ = (
        ("flows", Map * 3),
        ("n_flows", c_int32),
        ("upward", c_int32),
        ("shift", c_void_p),
        ("upsample", Upsample),
        ("weights", WinogradWeights),
        ("norm", Norm),
        ("out", Map),
        ("halved", c_void_p),
        ("seconds", c_void_p),
    )


class StridedJob(Structure):
    """A strided convolution of the encoder."""

    _fields_ = (
        ("input", Map),
        ("shift", c_void_p),
        ("weight", c_void_p),
        ("stride", c_int32 * 3),
        ("norm", Norm),
        ("out", Map),
        ("seconds", c_void_p),
    )


class PoolJob(Structure):
    """Max-pooling of a finer map."""

    _fields_ = (
        ("input", Map),
        ("halved", c_int32),
        ("gamma", c_void_p),
        ("stride", c_int32 * 3),
        ("out", Map),
        ("seconds", c_void_p),
    )


class HeadJob(Structure):
    """A segmentation head: 1 x 1 convolution to logits."""

    _fields_ = (
        ("input", Map),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("classes", c_int32),
        ("logits", c_void_p),
        ("seconds", c_void_p),
    )


class NormGradientJob(Structure):
    """The backward pass of norm and activation."""

    _fields_ = (
        ("raw", Map),
        ("gradient", c_void_p),
        ("mean", c_void_p),
        ("rstd", c_void_p),
        ("pooled", Map),
        ("pooled_gradient", c_void_p),
        ("stride", c_int32 * 3),
        ("apply", c_int32),
        ("by_raw", c_void_p),
        ("constant", c_void_p),
        ("weight_gradient", c_void_p),
        ("bias_gradient", c_void_p),
        ("seconds", c_void_p),
    )


class ConvGradientJob(Structure):
    """The backward pass of a convolution at stride 1."""

    _fields_ = (
        ("forward", ConvJob),
        ("turned", WinogradWeights),
        ("gradient", c_void_p),
        ("mean", c_void_p),
        ("by_raw", c_void_p),
        ("constant", c_void_p),
        ("into", Map * 3),
        ("add", c_int32 * 3),
        ("places", c_void_p),
        ("weight_gradient", c_void_p),
    )


class StridedGradientJob(Structure):
    """The backward pass of a strided convolution."""

    _fields_ = (
        ("input", Map),
        ("shift", c_void_p),
        ("stride", c_int32 * 3),
        ("gradient", Map),
        ("into", c_void_p),
        ("turned", c_void_p),
        ("places", c_void_p),
        ("weight_gradient", c_void_p),
        ("seconds", c_void_p),
    )


class UpsampleGradientJob(Structure):
    """The backward pass of a transposed convolution."""

    _fields_ = (
        ("upsample", Upsample),
        ("gradient", Map),
        ("turned", c_void_p),
        ("turned_start", c_void_p),
        ("turned_output", c_void_p),
        ("turned_index", c_void_p),
        ("into", c_void_p),
        ("add", c_int32),
        ("places", c_void_p),
        ("weight_gradient", c_void_p),
        ("seconds", c_void_p),
    )


class HeadGradientJob(Structure):
    """The backward pass of a segmentation head."""

    _fields_ = (
        ("input", Map),
        ("into", c_void_p),
        ("add", c_int32),
        ("classes", c_int32),
        ("turned", c_void_p),
        ("places", c_void_p),
        ("logits", c_void_p),
        ("weight_gradient", c_void_p),
        ("bias_gradient", c_void_p),
        ("seconds", c_void_p),
    )


GradientJob = NormGradientJob | ConvGradientJob | StridedGradientJob | UpsampleGradientJob | HeadGradientJob
Job = ConvJob | StridedJob | PoolJob | HeadJob | GradientJob


class Axis(Structure):
    """One axis of a resampled scan; ``Axis`` of ``native/scan.h``."""

    _fields_ = (
        ("lower", c_void_p),
        ("upper", c_void_p),
        ("lower_weight", c_void_p),
        ("upper_weight", c_void_p),
        ("size", c_int64),
    )


class LabelJob(Structure):
    """Logits of a scan and the labels that they are resampled to; of ``native/scan.h``."""

    _fields_ = (
        ("slices", c_void_p),
        ("classes", c_int64),
        ("class_stride", c_int64),
        ("row_stride", c_int64),
        ("width", c_int32),
        ("regions", c_int32),
        ("threshold", c_float),
        ("label_bytes", c_int32),
        ("axes", Axis * 3),
        ("labels", c_void_p),
        ("out", c_void_p),
        ("out_slice", c_int64),
        ("out_row", c_int64),
    )
