"""The mean of two checkpoints of one model: ``python -m weights.mean ONE OTHER OUT``.

Where one was trained further from the other, their mean is often better than both: what the last stage learnt is kept
in part, and its noise is halved.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from axon_llm.checkpoint import load

from .export import export


def mean(one: Path, other: Path, out: Path) -> None:
    """Write the mean of two checkpoints, taken in float32, with the second one's tokenizer.

    Raises:
        ModelError: a checkpoint cannot be read.
        ValueError: their shapes differ.
    """
    (first, _), (second, _) = (load(folder, device="cpu", dtype="float32") for folder in (one, other))
    if first.config != second.config:
        raise ValueError(f"{one} and {other} are models of different shapes")
    pairs = zip(first.state_dict().items(), second.state_dict().values(), strict=True)
    export(out, second.config, {name: torch.lerp(a, b, 0.5) for (name, a), b in pairs})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(other / name, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m weights.mean", description=__doc__)
    for name in ("one", "other", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    mean(given.one, given.other, given.out)
