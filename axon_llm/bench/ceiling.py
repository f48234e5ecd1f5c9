"""The machine's limits, measured in the same run as what is held against them.

A decode step cannot be faster than reading its weights and cache once; a prefill cannot be faster than its
multiplications. Both rates depend on the machine, the threads, and on a shared machine on the moment.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from statistics import median

import torch

from axon_llm.fast import native, ops
from axon_llm.fast.int8 import Int8Linear

_READ_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
_MATRIX = {"cpu": 2048, "cuda": 8192}
_AT_ONCE = 10  # on a GPU: the time of a launch would count in one alone


class Ceilings:
    """Probes that are run again and again between measurements.

    On a shared machine the memory can be twice as fast in one second as in the next, so each measurement is held
    against the probes right before and right after it, and should be short.

    Memory is read on a CPU: summed by PyTorch, and where there are kernels by our own reader (``kernels/memory.cpp``),
    which is a fifth faster on some processors because it tells them what it needs next. Each reads once, for the best
    of many would be a luckier moment than what is measured had; the faster of the two is the limit. On a GPU memory is
    copied, as its makers measure it, and each byte counts twice.

    The matrix product is of the kind that a prefill is made of: of int8 where it multiplies int8, of float32 where that
    is faster than bfloat16 and so takes its place. It is the best of three on a CPU, for it takes as little as 20 ms.

    Args:
        device: what to probe.
        dtype: of the activations.
        int8: weights and activations are multiplied as int8 (CPU only).

    Attributes:
        bandwidth: ``"read bandwidth"`` or ``"copy bandwidth"``.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, int8: bool = False) -> None:
        self._device = device
        copies = device.type == "cuda"
        self.bandwidth = "copy bandwidth" if copies else "read bandwidth"
        self._data = torch.ones(_READ_BYTES[device.type] // 4, device=device)
        self._copy = torch.empty_like(self._data) if copies else None
        self._bytes = self._data.nbytes * (2 if copies else 1)
        self._size = _MATRIX[device.type]
        self._multiply = self._product(device, dtype, int8)
        self._ours = native.loaded() and not copies
        self._read: list[float] = []
        self._summed: list[float] = []
        self._matmul: list[float] = []

    def probe_bandwidth(self) -> float:
        """Bytes per second between memory and processor now, all threads together; kept for the median."""
        self._summed.append(self._bytes / self._seconds(self._touch, 1))
        ours = self._bytes / self._seconds(lambda: torch.ops.axon.read_words(self._data), 1) if self._ours else 0.0
        self._read.append(max(self._summed[-1], ours))
        return self._read[-1]

    def probe_product(self) -> float:
        """Operations per second of a large matrix product now; kept for the median."""
        self._matmul.append(2 * self._size**3 / self._seconds(self._multiply, 3))
        return self._matmul[-1]

    def _product(self, device: torch.device, dtype: torch.dtype, int8: bool) -> Callable[[], object]:
        size = self._size
        if int8:
            with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError):  # a PyTorch without it
                weight = Int8Linear(torch.randint(-127, 128, (size, size), dtype=torch.int8), torch.ones(size))
                q = torch.randint(0, 256, (size, size), dtype=torch.uint8)
                ops.int8_linear(q[:1], weight.packed, weight.scale, weight.zero)
                return lambda: ops.int8_linear(q, weight.packed, weight.scale, weight.zero)
        if device.type == "cpu" and dtype == torch.bfloat16 and ops.wide_products():
            dtype = torch.float32
        one, other = torch.randn(2, size, size, device=device).to(dtype)
        return lambda: one @ other

    def _touch(self) -> None:
        if self._copy is None:
            self._data.sum()
        else:
            self._copy.copy_(self._data)

    def _seconds(self, work: Callable[[], object], times: int) -> float:
        """The quickest of ``times`` on a CPU, the mean of several on a GPU."""
        if self._device.type == "cpu":
            return min(seconds(work, self._device) for _ in range(times))
        work()
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        for _ in range(_AT_ONCE):
            work()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3 / _AT_ONCE

    @property
    def read_bytes_per_s(self) -> float:
        """Bytes per second: the median of all that :meth:`probe_bandwidth` found."""
        return median(self._read)

    @property
    def summed_bytes_per_s(self) -> float:
        """The same for PyTorch's own sum (on a GPU its copy)."""
        return median(self._summed)

    @property
    def flops_per_s(self) -> float:
        """Operations per second: the median of all that :meth:`probe_product` found."""
        return median(self._matmul)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long ``work`` takes, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
