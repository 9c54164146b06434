"""A network for one patch size: memory, and the list of jobs for the core. Built once, run for every patch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import c_int32
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from nnunetv2_e2enet.engine import jobs as abi
from nnunetv2_e2enet.engine.arena import Lifetime, place
from nnunetv2_e2enet.engine.core import TIMERS, Core
from nnunetv2_e2enet.engine.jobs import ConvJob, HeadJob, Job, PoolJob, StridedJob
from nnunetv2_e2enet.engine.layout import Buffer, Floats, StoredMap, StoredNorm, pages
from nnunetv2_e2enet.engine.units import image_factor
from nnunetv2_e2enet.engine.weights import ConvWeights, NormWeights, PackedBlock, PackedNode, PackedWeights

Make = Callable[[], Job]


@dataclass(frozen=True)
class Step:
    """A job to be, made once the buffers that it reads and writes have their places."""

    make: Make
    buffers: list[Buffer]


class Program:
    """Jobs that compute the logits of one sample.

    Not to be run by two threads at once: they would share the memory.

    Attributes:
        patch_size: spatial axes of the input.
        seconds: time spent by the first thread, by kind of work (see ``TIMERS``), summed over all runs.
    """

    def __init__(self, weights: PackedWeights, patch_size: Sequence[int], core: Core) -> None:
        self.patch_size = tuple(patch_size)
        self.weights = weights
        self.seconds = np.zeros(len(TIMERS))
        self._core = core
        self._threads = 0
        self._kept: list[object] = []  # what the jobs point to
        self._of_image: list[ConvJob | StridedJob] = []  # jobs that read the image
        self._heads: list[tuple[int, HeadJob]] = []  # by level
        self._steps: list[Step] = []
        size = of_image = [1] * (3 - len(patch_size)) + list(patch_size)
        self._sizes = [size := [s // t for s, t in zip(size, stride, strict=True)] for stride in weights.strides]
        self._image = StoredMap(Buffer(weights.input_channels, of_image, core.pixel_bytes), None)
        self._build()
        self._memory = self._place()
        self._scratch = pages(0)
        self._jobs = [step.make() for step in self._steps]
        self._steps.clear()  # they refer to this program, whose memory shall go with the last other reference, not with the gc

    @property
    def n_bytes(self) -> int:
        """Memory of all maps and of scratch space."""
        return self._memory.nbytes + self._scratch.nbytes

    def run(self, x: Tensor, logits: Sequence[Tensor], threads: int) -> None:
        """Compute one sample.

        Args:
            x: ``(channels, *patch)``, float32, contiguous.
            logits: one tensor ``(classes, *size)`` a head to compute, finest first, float32, contiguous.
            threads: how many to use.
        """
        self._fit_scratch(threads)
        scratch = self._scratch.ctypes.data
        factor = image_factor(x) if self._core.storage == "float16" else 1.0
        for first in self._of_image:
            first.norm.eps = self.weights.encoder[0][0].norm.eps * factor**2
        self._core.import_image(x.data_ptr(), factor, self._image.struct(), threads)
        for level, head in self._heads:
            head.logits = logits[level].data_ptr() if level < len(logits) else None
        for job in self._jobs:
            self._core.run(job, scratch, threads)

    def _fit_scratch(self, threads: int) -> None:
        if threads == self._threads:
            return
        self._scratch = pages(max(self._core.scratch_floats(job, threads) for job in self._jobs))
        self._threads = threads

    def _place(self) -> Floats:
        """Memory for all maps, each of which has its own from the step that writes it to the last that reads it."""
        lifetimes = self._lifetimes()
        offsets, n_bytes = place(list(lifetimes.values()))
        memory = pages(n_bytes // np.float32().itemsize)
        for buffer, offset in zip(lifetimes, offsets, strict=True):
            buffer.place_at(memory.ctypes.data + offset)
        return memory

    def _lifetimes(self) -> dict[Buffer, Lifetime]:
        """The lifetime of each buffer: the steps from the first to the last that read or write it."""
        lifetimes: dict[Buffer, Lifetime] = {}
        for index, step in enumerate(self._steps):
            for buffer in step.buffers:
                first = lifetimes[buffer].first if buffer in lifetimes else index
                lifetimes[buffer] = Lifetime(buffer.n_bytes, first, index)
        return lifetimes

    # ---- building ---------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        maps = self._build_encoder()
        last_level = len(maps) - 1
        for stage in self.weights.stages:
            before = list(maps)
            strides = [node.pool_stride for node in stage[1:]]
            pooled = [self._add_pool(level, before[level], s) for level, s in enumerate(strides) if s is not None]
            for level, node in enumerate(stage):
                flows = [before[level], before[level + 1], *pooled[level - 1 : level]] if level else before[:2]
                maps[level] = self._build_node(node, level, flows, pooled_later=level < len(stage) - 2)
            last_level = len(stage) - 1
            if last_level < len(self.weights.heads):
                self._add_head(last_level, maps[last_level])

    def _build_encoder(self) -> list[StoredMap]:
        maps: list[StoredMap] = []
        x = self._image
        for level, blocks in enumerate(self.weights.encoder):
            for index, block in enumerate(blocks):
                x = self._add_block(block, level, [x], pooled_later=index == len(blocks) - 1)
            maps.append(x)
        return maps

    def _build_node(self, node: PackedNode, level: int, flows: list[StoredMap], pooled_later: bool) -> StoredMap:
        first, *others = node.blocks
        x = self._add_block(first, level, flows, pooled_later and not others, node)
        for block in others:
            x = self._add_block(block, level, [x], pooled_later and block is others[-1])
        return x

    def _add_block(
        self, block: PackedBlock, level: int, flows: list[StoredMap], pooled_later: bool, node: PackedNode | None = None
    ) -> StoredMap:
        out = StoredMap(self._buffer(block.outputs, level), StoredNorm(block.outputs, block.norm.slope))
        if block.conv is not None:
            if pooled_later and self._halves(level):
                out.halved = self._buffer(block.outputs, level, halved=True)
            make: Make = partial(self._conv_job, block, block.conv, flows, out, node)
        else:
            make = partial(self._strided_job, block, flows[0], out)
        self._add(make, *(flow.buffer for flow in flows), out.buffer, out.halved)
        return out

    def _halves(self, level: int) -> bool:
        """Whether the downward flow from this level pools 2 x 2 pixels of the plane."""
        return level + 2 < len(self._sizes) and self.weights.strides[level + 1][1:] == (2, 2)

    def _add_pool(self, level: int, finer: StoredMap, stride: tuple[int, int, int]) -> StoredMap:
        """The downward flow from ``level``."""
        pooled = StoredMap(self._buffer(finer.channels, level + 1), finer.norm)
        self._add(partial(self._pool_job, finer, pooled, stride), finer.halved or finer.buffer, pooled.buffer)
        return pooled

    def _add_head(self, level: int, x: StoredMap) -> None:
        self._add(partial(self._head_job, level, x), x.buffer)

    def _buffer(self, channels: int, level: int, halved: bool = False) -> Buffer:
        return Buffer(channels, self._sizes[level], self._core.pixel_bytes, halved)

    def _add(self, make: Make, *buffers: Buffer | None) -> None:
        self._steps.append(Step(make, [buffer for buffer in buffers if buffer is not None]))

    # ---- jobs -------------------------------------------------------------------------------------------------------

    def _conv_job(
        self, block: PackedBlock, conv: ConvWeights, flows: list[StoredMap], out: StoredMap, node: PackedNode | None
    ) -> ConvJob:
        job = ConvJob(
            n_flows=len(flows),
            upward=-1 if node is None else 1,
            shift=self._pointer(block.shift),
            weights=self._conv_weights(conv),
            norm=self._norm(block.norm, out),
            out=self._map(out),
            halved=None if out.halved is None else out.halved.address,
            seconds=self.seconds.ctypes.data,
        )
        if node is not None:
            job.upsample = self._upsample(node, flows[1])
            upward = StoredMap(out.buffer, None, len(node.upsample.output))  # of which only the shape is looked at
            flows = [flows[0], upward, *flows[2:]]
        job.flows[: len(flows)] = [self._map(flow) for flow in flows]
        if flows[0] is self._image:
            self._of_image.append(job)
        return job

    def _strided_job(self, block: PackedBlock, x: StoredMap, out: StoredMap) -> StridedJob:
        assert block.direct is not None
        job = StridedJob(
            input=self._map(x),
            shift=self._pointer(block.shift),
            weight=self._pointer(block.direct),
            stride=(c_int32 * 3)(*block.stride),
            norm=self._norm(block.norm, out),
            out=self._map(out),
            seconds=self.seconds.ctypes.data,
        )
        if x is self._image:
            self._of_image.append(job)
        return job

    def _pool_job(self, finer: StoredMap, pooled: StoredMap, stride: tuple[int, int, int]) -> PoolJob:
        assert finer.norm is not None
        source = finer if finer.halved is None else StoredMap(finer.halved, finer.norm)
        return PoolJob(
            self._map(source),
            finer.halved is not None,
            self._pointer(finer.norm.scale),
            (c_int32 * 3)(*stride),
            self._map(pooled),
            self.seconds.ctypes.data,
        )

    def _head_job(self, level: int, x: StoredMap) -> HeadJob:
        weight, bias, classes = self.weights.heads[level]
        pointer = None if bias is None else self._pointer(bias)
        job = HeadJob(self._map(x), self._pointer(weight), pointer, classes, None, self.seconds.ctypes.data)
        self._heads.append((level, job))
        return job

    def _map(self, stored: StoredMap) -> abi.Map:
        self._kept.append(stored)
        return stored.struct()

    def _pointer(self, array: np.ndarray) -> int:
        self._kept.append(array)
        return int(array.ctypes.data)

    def _norm(self, weights: NormWeights, out: StoredMap) -> abi.Norm:
        assert out.norm is not None
        return abi.Norm(
            self._pointer(weights.gamma),
            self._pointer(weights.beta),
            self._pointer(out.norm.scale),
            self._pointer(out.norm.offset),
            self._pointer(out.norm.mean),
            self._pointer(out.norm.rstd),
            None if weights.unit is None else self._pointer(weights.unit),
            weights.eps,
        )

    def _conv_weights(self, conv: ConvWeights) -> abi.WinogradWeights:
        return abi.WinogradWeights(
            self._pointer(conv.weight),
            self._pointer(conv.start),
            self._pointer(conv.output),
            self._pointer(conv.index),
            self._pointer(conv.chunk_first),
            len(conv.index),
            conv.inputs,
            conv.outputs,
            len(conv.chunk_first) - 1,
            conv.dense,
        )

    def _upsample(self, node: PackedNode, coarse: StoredMap) -> abi.Upsample:
        weights = node.upsample
        return abi.Upsample(
            self._map(coarse),
            self._pointer(weights.weight),
            self._pointer(weights.start),
            self._pointer(weights.output),
            self._pointer(weights.index),
            len(weights.index),
            len(weights.output),
            (c_int32 * 3)(*node.up_stride),
        )
