"""A network for one patch size: buffers, and the list of jobs for the core. Built once, run for every patch."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int32

import numpy as np
from torch import Tensor

from nnunetv2_e2enet.engine import core as abi
from nnunetv2_e2enet.engine.core import ConvJob, Core, HeadJob, PoolJob, StridedJob
from nnunetv2_e2enet.engine.layout import Buffer, StoredMap, StoredNorm, aligned
from nnunetv2_e2enet.engine.weights import ConvWeights, NormWeights, PackedBlock, PackedNode, PackedWeights

Job = ConvJob | StridedJob | PoolJob


class Workspace:
    """Memory for one patch at a time: two maps a level, the pooled map a level, scratch.

    Reused by all nodes of a level and all patches of a size.
    """

    def __init__(self, weights: PackedWeights, patch_size: Sequence[int], pixel_bytes: int) -> None:
        size = [1] * (3 - len(patch_size)) + list(patch_size)
        sizes = []
        for stride in weights.strides:
            size = [s // t for s, t in zip(size, stride, strict=True)]
            sizes.append(size)
        features = weights.features
        self.image = Buffer(weights.input_channels, sizes[0], pixel_bytes)
        self.maps = [
            (Buffer(n, size, pixel_bytes), Buffer(n, size, pixel_bytes)) for n, size in zip(features, sizes, strict=True)
        ]
        self.pooled = [Buffer(n, size, pixel_bytes) for n, size in zip(features, sizes[1:-1], strict=False)]
        halves = [stride[1:] == (2, 2) for stride in weights.strides[1:-1]]
        self.halved = [
            Buffer(n, size, pixel_bytes, halved=True) if half else None
            for n, size, half in zip(features, sizes, halves, strict=False)
        ]
        self.scratch = aligned(0)

    @property
    def n_bytes(self) -> int:
        halved = [buffer for buffer in self.halved if buffer is not None]
        buffers = [self.image, *(b for pair in self.maps for b in pair), *self.pooled, *halved]
        return sum(b.n_bytes for b in buffers) + self.scratch.nbytes


class Program:
    """Jobs that compute the logits of one sample.

    Not to be run by two threads at once: they would share the workspace.

    Attributes:
        patch_size: spatial axes of the input.
        seconds: time spent by the first thread, by kind of work (see ``TIMERS``), summed over all runs.
    """

    def __init__(self, weights: PackedWeights, patch_size: Sequence[int], core: Core) -> None:
        self.patch_size = tuple(patch_size)
        self.weights = weights
        self.workspace = Workspace(weights, patch_size, core.pixel_bytes)
        self.seconds = np.zeros(len(abi.TIMERS))
        self._core = core
        self._threads = 0
        self._kept: list[object] = []  # what the jobs point to
        self._jobs: list[Job | tuple[int, HeadJob]] = []
        self._image = StoredMap(self.workspace.image, None)
        self._build()

    @property
    def n_bytes(self) -> int:
        return self.workspace.n_bytes

    def run(self, x: Tensor, logits: Sequence[Tensor], threads: int) -> None:
        """Compute one sample.

        Args:
            x: ``(channels, *patch)``, float32, contiguous.
            logits: one tensor ``(classes, *size)`` a head to compute, finest first, float32, contiguous.
            threads: how many to use.
        """
        self._fit_scratch(threads)
        scratch = self.workspace.scratch.ctypes.data
        self._core.import_image(x.data_ptr(), self._image.struct(), threads)
        for job in self._jobs:
            if isinstance(job, tuple):
                level, head = job
                if level < len(logits):
                    self._core.run_head(head, logits[level].data_ptr(), scratch, threads)
            else:
                self._core.run(job, scratch, threads)

    def _fit_scratch(self, threads: int) -> None:
        if threads == self._threads:
            return
        jobs = [job[1] if isinstance(job, tuple) else job for job in self._jobs]
        self.workspace.scratch = aligned(max(self._core.scratch_floats(job, threads) for job in jobs))
        self._threads = threads

    # ---- building ---------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        maps = self._build_encoder()
        last_level = len(maps) - 1
        for stage in self.weights.stages:
            before = list(maps)
            strides = [node.pool_stride for node in stage[1:]]
            pooled = [self._add_pool(level, before[level], s) for level, s in enumerate(strides) if s is not None]
            for level, node in enumerate(stage):
                halved = self._halved(level) if level < len(stage) - 2 else None  # of others no downward flow leaves
                flows = [before[level], before[level + 1], *pooled[level - 1 : level]] if level else before[:2]
                maps[level] = self._build_node(node, level, flows, halved)
            last_level = len(stage) - 1
            if last_level < len(self.weights.heads):
                self._add_head(last_level, maps[last_level])

    def _build_encoder(self) -> list[StoredMap]:
        maps: list[StoredMap] = []
        x = self._image
        for level, blocks in enumerate(self.weights.encoder):
            for index, block in enumerate(blocks):
                halved = self._halved(level) if index == len(blocks) - 1 else None
                x = self._build_block(block, [x], self._free_map(level, x), halved)
            maps.append(x)
        return maps

    def _free_map(self, level: int, used: StoredMap) -> Buffer:
        first, second = self.workspace.maps[level]
        return second if used.buffer is first else first

    def _build_node(self, node: PackedNode, level: int, flows: list[StoredMap], halved: Buffer | None) -> StoredMap:
        x = self._build_block(node.blocks[0], flows, self._free_map(level, flows[0]), halved, node)
        for block in node.blocks[1:]:
            x = self._build_block(block, [x], self._free_map(level, x), halved)
        return x

    def _build_block(
        self, block: PackedBlock, flows: list[StoredMap], target: Buffer, halved: Buffer | None, node: PackedNode | None = None
    ) -> StoredMap:
        norm = StoredNorm(block.outputs, block.norm.slope)
        out = StoredMap(target, norm)
        if block.conv is not None:
            job = ConvJob(
                n_flows=len(flows),
                upward=-1 if node is None else 1,
                shift=self._pointer(block.shift),
                weights=self._conv_weights(block.conv),
                norm=self._norm(block.norm, norm),
                out=self._map(out),
                halved=None if halved is None else halved.address,
                seconds=self.seconds.ctypes.data,
            )
            out.halved = halved
            if node is not None:
                job.upsample = self._upsample(node, flows[1])
                flows = [flows[0], StoredMap(target, None, len(node.upsample.output)), *flows[2:]]
            job.flows[: len(flows)] = [self._map(flow) for flow in flows]
            self._jobs.append(job)
        else:
            assert block.direct is not None
            self._jobs.append(
                StridedJob(
                    input=self._map(flows[0]),
                    shift=self._pointer(block.shift),
                    weight=self._pointer(block.direct),
                    stride=(c_int32 * 3)(*block.stride),
                    norm=self._norm(block.norm, norm),
                    out=self._map(out),
                    seconds=self.seconds.ctypes.data,
                )
            )
        return out

    def _halved(self, level: int) -> Buffer | None:
        return self.workspace.halved[level] if level < len(self.workspace.halved) else None

    def _add_pool(self, level: int, finer: StoredMap, stride: tuple[int, int, int]) -> StoredMap:
        """The downward flow from ``level``; before any node of the next stage, which may overwrite what it reads."""
        norm = finer.norm
        assert norm is not None
        source = finer if finer.halved is None else StoredMap(finer.halved, norm)
        pooled = StoredMap(self.workspace.pooled[level], norm)
        self._jobs.append(
            PoolJob(
                self._map(source),
                finer.halved is not None,
                self._pointer(norm.scale),
                (c_int32 * 3)(*stride),
                self._map(pooled),
                self.seconds.ctypes.data,
            )
        )
        return pooled

    def _add_head(self, level: int, x: StoredMap) -> None:
        weight, bias, classes = self.weights.heads[level]
        pointer = None if bias is None else self._pointer(bias)
        head = HeadJob(self._map(x), self._pointer(weight), pointer, classes, self.seconds.ctypes.data)
        self._jobs.append((level, head))

    def _map(self, stored: StoredMap) -> abi.Map:
        self._kept.append(stored)
        return stored.struct()

    def _pointer(self, array: np.ndarray) -> int:
        self._kept.append(array)
        return int(array.ctypes.data)

    def _norm(self, weights: NormWeights, stored: StoredNorm) -> abi.Norm:
        return abi.Norm(
            self._pointer(weights.gamma),
            self._pointer(weights.beta),
            self._pointer(stored.scale),
            self._pointer(stored.offset),
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
