"""What quantisation costs in quality: ``python -m axon_llm.bench.quality -m MODEL``.

The float32 readable model is the truth. On the same tokens, each mode's logits are compared with it: relative error
(the norm of the difference over the norm of the logits), how often the likeliest token is the same, and the mean
Kullback-Leibler divergence in nats per token, the logarithm of what perplexity on its own text rises by.
For a model that has learned something the tokens are text it samples itself, at temperature 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from axon_llm.cache import KVCache
from axon_llm.checkpoint import load
from axon_llm.fast import accelerate
from axon_llm.fast.quantise import GROUP, dequantise_int4, dequantise_int8, quantise_int4, quantise_int8
from axon_llm.model import Transformer

MODES: tuple[tuple[str, str, str | None], ...] = (
    ("bfloat16", "bfloat16", None),
    ("int8", "bfloat16", "int8"),
    ("int4", "bfloat16", "int4"),
)


@torch.inference_mode()
def sample(model: Transformer, rows: int, length: int, seed: int = 0) -> Tensor:
    """Text that the model writes at temperature 1, ``[rows, length]``; begins with BOS where there is one."""
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(model.config, slots=rows, max_seq_len=length)
    bos = model.config.bos_token_id
    tokens = torch.arange(1, rows + 1)[:, None] if bos is None else torch.full((rows, 1), bos)
    for position in range(length - 1):
        logits = model(tokens[:, -1:], torch.full((rows, 1), position), cache)[:, 0]
        tokens = torch.cat((tokens, torch.softmax(logits, -1).multinomial(1, generator=generator)), dim=1)
    return tokens


@torch.inference_mode()
def compare(exact: Tensor, actual: Tensor) -> dict[str, float]:
    """Error figures of logits ``[B, T, V]`` against exact ones."""
    p, q = exact.log_softmax(-1), actual.log_softmax(-1)
    return {
        "relative_error": float((actual - exact).norm() / exact.norm()),
        "same_likeliest": float((actual.argmax(-1) == exact.argmax(-1)).float().mean()),
        "kl_nats": float((p.exp() * (p - q)).sum(-1).mean()),
    }


def round_activations(x: Tensor, piece: int) -> Tensor:
    """``x`` ``[…, K]`` rounded to 127 steps either way of the largest of every ``piece`` channels; same dtype."""
    pieces = x.float().unflatten(-1, (-1, piece))
    scale = pieces.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127
    return ((pieces / scale).round() * scale).flatten(-2).to(x.dtype)


def as_on_a_gpu(model: Transformer, quantize: str) -> Transformer:
    """The readable model, weights and activations of its linears rounded as on a GPU, and then to their own type.

    The second rounding a GPU does not do to what it multiplies as integers, so this is no better than it is there.
    """

    def rounded(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        return (round_activations(inputs[0], GROUP if quantize == "int4" else inputs[0].shape[-1]),)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.float()
            stands_for = (
                dequantise_int8(*quantise_int8(weight))
                if quantize == "int8"
                else dequantise_int4(*quantise_int4(weight))
            )
            module.weight = nn.Parameter(stands_for.to(module.weight.dtype), requires_grad=False)
            module.register_forward_pre_hook(rounded)
    return model


def measure(name: str, rows: int, length: int) -> list[dict[str, object]]:
    """The figures of every mode on one model."""
    truth, _ = load(name, device="cpu", dtype="float32")
    positions = torch.arange(length).expand(rows, length)
    results: list[dict[str, object]] = []
    with torch.inference_mode():
        tokens = sample(truth, rows, length)
        exact = truth(tokens, positions)
        for mode, dtype, quantize in MODES:
            model = accelerate(load(name, device="cpu", dtype=dtype)[0], quantize)
            results.append({"mode": mode, "tokens": tokens.numel(), **compare(exact, model(tokens, positions))})
        for quantize in ("int8", "int4"):
            model = as_on_a_gpu(load(name, device="cpu", dtype="bfloat16")[0], quantize)
            found = compare(exact, model(tokens, positions))
            results.append({"mode": f"{quantize}, on a GPU", "tokens": tokens.numel(), **found})
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one JSON object per mode."""
    parser = argparse.ArgumentParser(description="What quantisation costs in quality.")
    parser.add_argument("-m", "--model", default="axon-tiny")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args(arguments)
    for result in measure(given.model, given.rows, given.length):
        print(json.dumps(result))


if __name__ == "__main__":
    main()
