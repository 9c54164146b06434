"""The forward and backward pass of one sample; kept maps stay in memory until the backward pass has read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ctypes import Structure, c_int32
from functools import partial

import numpy as np
from torch import Tensor

from nnunetv2_e2enet.engine import jobs as abi
from nnunetv2_e2enet.engine.arena import gaps, place
from nnunetv2_e2enet.engine.layout import Buffer, Floats, StoredMap, empty, pages
from nnunetv2_e2enet.engine.program import Program
from nnunetv2_e2enet.engine.training_weights import TrainedBlock, TrainedNode, TrainingWeights
from nnunetv2_e2enet.engine.weights import PackedBlock, PackedNode

Piece = tuple[int, int]  # of memory: first and last byte (exclusive)

GRADIENT_BYTES = 4  # of a pixel
WORTH_EMPTYING = 128 << 20  # bytes: below, new pages cost more than the memory is worth


class TrainingProgram(Program):
    """Jobs for the logits of one sample, and for the gradients of all parameters.

    One map a block is kept, the output of its convolution; the downward flow and the first map of the network, which is one
    convolution of the image, are computed again. Gradients of maps are those after norm and activation. Each is written by the
    first of its readers and added to by the others. The norm's backward pass is applied by the convolutions that read the
    gradient, and before a strided convolution by a job of its own. All gradients are floats, however maps are stored.

    Args:
        weights: refilled by the caller before each forward pass.
        patch_size: spatial axes of the input.
        samples: how many are kept at the same time. Then what is kept and what is not lie in memory of their own.
        like: another program for the same weights and size, to share memory with that no sample keeps.
    """

    def __init__(
        self,
        weights: TrainingWeights,
        patch_size: Sequence[int],
        samples: int = 1,
        like: TrainingProgram | None = None,
    ) -> None:
        self.samples = samples
        self._training = weights
        self._like = like
        self._tape: list[tuple[TrainedBlock | int, list[StoredMap], StoredMap, TrainedNode | None]] = []
        self._pools: dict[StoredMap, tuple[StoredMap, tuple[int, int, int]]] = {}  # by the pooled map: what it was pooled from
        self._cheap: dict[StoredMap, tuple[TrainedBlock, StoredMap]] = {}  # maps that are computed again rather than kept
        self._again: dict[StoredMap, StoredMap] = {}  # by those maps: the second time
        self._pooled: dict[StoredMap, tuple[StoredMap, tuple[int, int, int]]] = {}  # by the finer map, pooled again
        self._gradients: dict[StoredMap, Buffer] = {}  # by the map
        self._coefficients: dict[StoredMap, Floats] = {}  # by_raw and constant of Channel, by the map
        self._bindings: list[tuple[Structure, str, int]] = []  # where jobs point to a parameter's gradient
        self._head_jobs: list[tuple[int, abi.HeadGradientJob]] = []
        super().__init__(weights.packed, patch_size, weights.core)
        self._backward_jobs = self._jobs[self._n_forward :]
        del self._jobs[self._n_forward :]

    def empty_between(self) -> None:
        """Return memory without kept maps to the system until the backward pass."""
        for first, last in self._between:
            empty(self._transient, first, last)

    def run_backward(self, logits: Sequence[Tensor], gradients: Sequence[Tensor], threads: int) -> None:
        """Add the gradients of one sample; what the forward pass kept is gone afterwards.

        Args:
            logits: their gradients, one tensor ``(classes, *size)`` a head, finest first, float32, contiguous.
            gradients: of each parameter of the network, float32, contiguous.
            threads: how many to use.
        """
        self._fit_scratch(threads)
        for bound, field, parameter in self._bindings:
            setattr(bound, field, gradients[parameter].data_ptr())
        for level, head in self._head_jobs:
            head.logits = logits[level].data_ptr()
        for job in self._backward_jobs:
            self._core.run(job, self._scratch.ctypes.data, threads)

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _fit_scratch(self, threads: int) -> None:
        if threads == self._threads:
            return
        like = self._like
        if like is not None and like._threads == threads:
            self._scratch = like._scratch
        else:
            jobs = [*self._jobs, *self._backward_jobs]
            self._scratch = pages(max(self._core.scratch_floats(job, threads) for job in jobs))
        self._threads = threads

    def _place(self) -> Floats:
        lifetimes = self._lifetimes()
        kept = [b for b, life in lifetimes.items() if life.first < self._n_forward <= life.last]
        apart = [] if self.samples == 1 else kept
        held_apart = set(apart)
        others = [b for b in lifetimes if b not in held_apart]
        if self._like is None:
            self._offsets, n_bytes = place([lifetimes[b] for b in others])
            self._transient = pages(n_bytes // np.float32().itemsize)
        else:
            self._offsets, self._transient = self._like._offsets, self._like._transient
        offsets = dict(zip(others, self._offsets, strict=True))
        for buffer, offset in offsets.items():
            buffer.place_at(self._transient.ctypes.data + offset)
        self._between = self._idle((offsets[b], offsets[b] + b.n_bytes) for b in kept if b in offsets)
        memory = pages(sum(b.n_bytes for b in apart) // np.float32().itemsize)
        address = memory.ctypes.data
        for buffer in apart:
            buffer.place_at(address)
            address += buffer.n_bytes
        return memory

    def _idle(self, held: Iterable[Piece]) -> list[Piece]:
        """The memory around these pieces, if there is enough of it."""
        found = gaps(held, self._transient.nbytes)
        return found if sum(last - first for first, last in found) >= WORTH_EMPTYING else []

    @property
    def n_bytes(self) -> int:
        """Memory of this program alone; programs of the same batch share what no backward pass needs."""
        return super().n_bytes + (self._transient.nbytes if self._like is None else 0)

    # ---- building ---------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        super()._build()
        self._n_forward = len(self._steps)
        first, _, first_map, _ = self._tape[0]
        assert isinstance(first, TrainedBlock)
        if first.conv is not None and len(self.weights.encoder[0]) > 1:  # then the second block alone reads it
            self._cheap[first_map] = first, first_map
        for entry, flows, out, node in reversed(self._tape):
            if isinstance(entry, int):
                self._add_head_gradient(entry, out)
                continue
            out = self._again.get(out, out)
            self._add_norm_gradient(entry, out)
            if entry.turned is None:
                self._add_strided_gradient(entry, flows[0], out)
            else:
                self._add_conv_gradient(entry, flows, out, node)

    def _add_block(
        self, block: PackedBlock, level: int, flows: list[StoredMap], pooled_later: bool, node: PackedNode | None = None
    ) -> StoredMap:
        out = super()._add_block(block, level, flows, pooled_later, node)
        assert isinstance(block, TrainedBlock)
        assert node is None or isinstance(node, TrainedNode)
        self._tape.append((block, flows, out, node))
        return out

    def _add_pool(self, level: int, finer: StoredMap, stride: tuple[int, int, int]) -> StoredMap:
        pooled = super()._add_pool(level, finer, stride)
        self._pools[pooled] = finer, stride
        return pooled

    def _compute_again(self, stored: StoredMap) -> StoredMap:
        """The map itself if it is kept, otherwise the same a second time."""
        if stored in self._cheap:
            block, out = self._cheap[stored]
            again = StoredMap(self._like_map(out), out.norm)
            assert block.conv is not None
            self._add(partial(self._conv_job, block, block.conv, [self._image], again, None), self._image.buffer, again.buffer)
            self._again[stored] = again
            return again
        return self._pool_again(stored) if stored in self._pools else stored

    def _pool_again(self, pooled: StoredMap) -> StoredMap:
        finer, stride = self._pools[pooled]
        source = StoredMap(finer.buffer, finer.norm)  # what it was halved to is gone
        again = StoredMap(self._like_map(pooled), finer.norm)
        self._add(partial(self._pool_job, source, again, stride), finer.buffer, again.buffer)
        self._pooled[finer] = again, stride
        return again

    def _add_head(self, level: int, x: StoredMap) -> None:
        super()._add_head(level, x)
        self._tape.append((level, [], x, None))

    def _gradient(self, stored: StoredMap) -> tuple[Buffer, bool]:
        """Memory for the gradient of a map, and whether something was written there before."""
        known = stored in self._gradients
        if not known:
            self._gradients[stored] = self._like_map(stored, pixel_bytes=GRADIENT_BYTES)
        return self._gradients[stored], known

    def _like_map(self, stored: StoredMap, channels: int | None = None, pixel_bytes: int | None = None) -> Buffer:
        grid = stored.grid
        size = grid.depth, grid.height, grid.width
        return Buffer(channels or stored.channels, size, pixel_bytes or self._core.pixel_bytes)

    def _add_head_gradient(self, level: int, x: StoredMap) -> None:
        into, add = self._gradient(x)
        self._add(partial(self._head_gradient_job, level, x, into, add), x.buffer, into)

    def _add_norm_gradient(self, block: TrainedBlock, out: StoredMap) -> None:
        gradient, known = self._gradient(out)
        assert known
        pool = self._pooled.get(out)
        buffers = [] if pool is None else [pool[0].buffer, self._gradients[pool[0]]]
        coefficients = np.empty((2, out.channels), np.float32)
        self._kept.append(coefficients)
        self._coefficients[out] = coefficients
        make = partial(self._norm_gradient_job, block, out, gradient, pool, coefficients)
        self._add(make, out.buffer, gradient, *buffers)

    def _add_strided_gradient(self, block: TrainedBlock, x: StoredMap, out: StoredMap) -> None:
        gradient, _ = self._gradient(out)
        into = None
        if x is not self._image:
            into, known = self._gradient(x)
            assert known  # the map of a level is fused before it is reduced, so something was written
        self._add(partial(self._strided_gradient_job, block, x, gradient, into), x.buffer, gradient, into)

    def _add_conv_gradient(
        self, block: TrainedBlock, flows: list[StoredMap], out: StoredMap, node: TrainedNode | None
    ) -> None:
        gradient, _ = self._gradient(out)
        flows = [self._compute_again(flow) for flow in flows]
        targets: list[tuple[Buffer, bool] | None] = []
        for index, flow in enumerate(flows):
            if node is not None and index == 1:
                targets.append((self._like_map(out, len(node.upsample.output), GRADIENT_BYTES), False))
            else:
                targets.append(None if flow is self._image else self._gradient(flow))
        used = [target[0] for target in targets if target is not None]
        make = partial(self._conv_gradient_job, block, flows, out, gradient, node, targets)
        self._add(make, *(flow.buffer for flow in flows), out.buffer, gradient, *used)
        if node is not None:
            into, add = self._gradient(flows[1])
            upward = targets[1]
            assert upward is not None
            self._add(
                partial(self._upsample_gradient_job, node, flows[1], upward[0], into, add), flows[1].buffer, upward[0], into
            )

    # ---- jobs -------------------------------------------------------------------------------------------------------

    def _bind(self, job: Structure, field: str, parameter: int | None, channels: int = 0) -> None:
        if parameter is None:  # there is no such parameter: its gradient goes nowhere
            setattr(job, field, self._pointer(np.zeros(channels, np.float32)))
        else:
            self._bindings.append((job, field, parameter))

    def _map_of(self, buffer: Buffer) -> abi.Map:
        return self._map(StoredMap(buffer, None))

    def _head_gradient_job(self, level: int, x: StoredMap, into: Buffer, add: bool) -> abi.HeadGradientJob:
        head = self._training.heads[level]
        _, _, classes = self.weights.heads[level]
        job = abi.HeadGradientJob(
            input=self._map(x),
            into=into.address,
            add=add,
            classes=classes,
            turned=self._pointer(head.turned),
            places=self._pointer(head.places),
            seconds=self.seconds.ctypes.data,
        )
        self._bind(job, "weight_gradient", head.parameter)
        if head.bias is not None:
            self._bind(job, "bias_gradient", head.bias)
        self._head_jobs.append((level, job))
        return job

    def _norm_gradient_job(
        self,
        block: TrainedBlock,
        out: StoredMap,
        gradient: Buffer,
        pool: tuple[StoredMap, tuple[int, int, int]] | None,
        coefficients: Floats,
    ) -> abi.NormGradientJob:
        assert out.norm is not None
        job = abi.NormGradientJob(
            raw=self._map(out),
            gradient=gradient.address,
            mean=self._pointer(out.norm.mean),
            rstd=self._pointer(out.norm.rstd),
            apply=block.turned is None,
            by_raw=self._pointer(coefficients[0]),
            constant=self._pointer(coefficients[1]),
            seconds=self.seconds.ctypes.data,
        )
        if pool is not None:
            pooled, stride = pool
            job.pooled = self._map(pooled)
            job.pooled_gradient = self._gradients[pooled].address
            job.stride = (c_int32 * 3)(*stride)
        self._bind(job, "weight_gradient", block.gamma, out.channels)
        self._bind(job, "bias_gradient", block.beta, out.channels)
        return job

    def _conv_gradient_job(
        self,
        block: TrainedBlock,
        flows: list[StoredMap],
        out: StoredMap,
        gradient: Buffer,
        node: TrainedNode | None,
        targets: list[tuple[Buffer, bool] | None],
    ) -> abi.ConvGradientJob:
        assert block.conv is not None
        assert block.turned is not None
        assert out.norm is not None
        coefficients = self._coefficients[out]
        job = abi.ConvGradientJob(
            forward=self._conv_job(block, block.conv, flows, out, node),
            turned=self._conv_weights(block.turned),
            gradient=gradient.address,
            mean=self._pointer(out.norm.mean),
            by_raw=self._pointer(coefficients[0]),
            constant=self._pointer(coefficients[1]),
            places=self._pointer(block.places),
        )
        for index, target in enumerate(targets):
            if target is not None:
                job.into[index] = self._map_of(target[0])
                job.add[index] = target[1]
        self._bind(job, "weight_gradient", block.parameter)
        return job

    def _strided_gradient_job(
        self, block: TrainedBlock, x: StoredMap, gradient: Buffer, into: Buffer | None
    ) -> abi.StridedGradientJob:
        assert block.turned_direct is not None
        job = abi.StridedGradientJob(
            input=self._map(x),
            shift=self._pointer(block.shift),
            stride=(c_int32 * 3)(*block.stride),
            gradient=self._map_of(gradient),
            into=None if into is None else into.address,
            turned=self._pointer(block.turned_direct),
            places=self._pointer(block.places),
            seconds=self.seconds.ctypes.data,
        )
        self._bind(job, "weight_gradient", block.parameter)
        return job

    def _upsample_gradient_job(
        self, node: TrainedNode, coarse: StoredMap, upward: Buffer, into: Buffer, add: bool
    ) -> abi.UpsampleGradientJob:
        job = abi.UpsampleGradientJob(
            upsample=self._upsample(node, coarse),
            gradient=self._map_of(upward),
            turned=self._pointer(node.turned.weight),
            turned_start=self._pointer(node.turned.start),
            turned_output=self._pointer(node.turned.output),
            turned_index=self._pointer(node.turned.index),
            into=into.address,
            add=add,
            places=self._pointer(node.places),
            seconds=self.seconds.ctypes.data,
        )
        self._bind(job, "weight_gradient", node.parameter)
        return job
