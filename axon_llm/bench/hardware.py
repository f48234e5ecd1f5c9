"""What a figure was measured on: hardware, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

from axon_llm import __version__
from axon_llm.fast import native


def environment(device: torch.device) -> dict[str, str | int]:
    """Hardware, software and commit, for the head of every report."""
    return {
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "axon": __version__,
        "commit": commit(),
    }


def hardware(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its cores and its matrix instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = native.processor().get("model name") or platform.processor() or platform.machine()
    flags = native.processor_flags()
    extras = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx2") if flag in flags]
    count = torch.get_num_threads()
    return f"{name}, {count} thread{'' if count == 1 else 's'}" + (f" ({', '.join(extras[:3])})" if extras else "")


def commit() -> str:
    """The source tree's commit, with ``+`` if it has been changed since; ``""`` outside a tree."""
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
