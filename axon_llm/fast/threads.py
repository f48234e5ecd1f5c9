"""How many CPU threads a model is worth.

Every operation of a step ends with all threads waiting for the slowest. For a model of a few million weights an
operation takes microseconds, so a second thread saves little; and where another program holds one of the cores, every
operation waits for that core. Measured with axon-tiny on two cores beside one busy process: 19 ms per token with one
thread, 676 with two.
"""

from __future__ import annotations

import os

import torch

from axon_llm.model import Transformer

SMALL_MODEL_BYTES = 64 << 20


def fit_threads(model: Transformer) -> int:
    """Compute with one thread if the model is small and on the CPU, and ``OMP_NUM_THREADS`` does not say otherwise.

    Sets torch's number of threads for the whole process: a program decides this once, after loading its model.

    Returns:
        The number of threads in use.
    """
    weight = model.embed_tokens.weight
    size = model.config.num_parameters * weight.element_size()
    if weight.device.type == "cpu" and size < SMALL_MODEL_BYTES and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)
    return torch.get_num_threads()
