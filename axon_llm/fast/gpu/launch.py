"""Kernels that begin before the one in front of them has ended (programmatic dependent launch, Hopper and later).

A step is a chain of some two hundred kernels of a few microseconds, each of which needs what the one before it wrote.
Between two of them the memory stands still: the last programs run out, the next kernel starts, asks for its weights,
and waits for the first to come. But weights depend on no kernel. So each kernel here says at once that the next may
come (``gdc_launch_dependents``): as soon as processors are free, its programs start and ask for weights, and only then
wait until everything before them is written (``gdc_wait``).

A kernel launched so must wait before it touches anything that another wrote, also if it only overwrites it. Where the
compiler places the loads of a loop, as in tiles, the wait comes before all of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def dependent(device: torch.device) -> bool:
    """Whether kernels are launched so on this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def stages_for(device: torch.device, size: int, most: int, beside: int = 0) -> int:
    """Loads of ``size`` bytes that can be under way in a loop, beside others: as many as have shared memory."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    shared: int = getattr(properties, "shared_memory_per_block_optin", 48 << 10)  # its stubs do not know it
    return max(1, min(most, (shared - beside) // size))


def whole_row(K: int) -> dict[str, int]:
    """Sizes of a kernel that takes a row of K channels at once."""
    size = 1 << (K - 1).bit_length()
    return {"BK": size, "warps": 4 if size <= 4096 else 8}


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, warps: int, stages: int = 3, **sizes: Any
) -> None:
    """Run a kernel that takes ``DEPENDENT`` on the current stream.

    Args:
        kernel: compiled by Triton.
        grid: programs, in up to three dimensions.
        device: of its tensors.
        arguments: the kernel's, up to those it is compiled for.
        warps: of a program.
        stages: of loads under way in a loop around products of the matrix unit.
        sizes: what it is compiled for, by name.
    """
    early = dependent(device)
    more = {"launch_pdl": True} if early else {}
    kernel[grid](*arguments, **sizes, DEPENDENT=early, num_warps=warps, num_stages=stages, **more)
