"""What prompt-lookup speculation gains and costs: ``python -m axon_llm.bench.speculation -m random:llama-3.2-1b``.

Two texts are generated with and without it, in turn: one that repeats what stood before, and one that never does. A
model with random weights writes neither to order, so its output layer is replaced: the row of each token's successor is
that token's embedding, so that the likeliest next token is the successor in a permutation that we choose. A short cycle
is a text that repeats its prompt; one cycle through the whole vocabulary is a text that does not. The work per token is
that of any model of the shape, and the engine knows nothing of the trick: it must find out that drafting pays.

The tokens must be the same with and without; anything else is an error.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser
from statistics import median
from typing import Any

import torch
from torch import nn

from axon_llm.bench.hardware import environment
from axon_llm.checkpoint import load
from axon_llm.engine.engine import Engine
from axon_llm.engine.params import SamplingParams
from axon_llm.engine.speculate import DEFAULT_DRAFTS
from axon_llm.fast.memory import prefer_huge_pages
from axon_llm.fast.replace import accelerate
from axon_llm.model import Transformer

PERIOD = 48


def permuting(model: Transformer, period: int | None) -> Transformer:
    """Make the successor of each token the likeliest next one.

    Args:
        model: with float weights; changed in place.
        period: length of each cycle of the permutation; ``None`` for one cycle through the vocabulary.
    """
    embedding = model.embed_tokens.weight  # [vocab, hidden]
    count = embedding.shape[0]
    token = torch.arange(count, device=embedding.device)
    if period is None:
        before = (token - 1) % count
    else:
        start = token // period * period
        before = start + (token - start - 1) % torch.clamp(count - start, max=period)
    # Loud embeddings: the residual stream ends where it began, whatever the layers add to it.
    loud = embedding.detach() * 50.0
    model.embed_tokens.weight = nn.Parameter(loud, requires_grad=False)
    model.lm_head.weight = nn.Parameter(embedding.detach()[before].clone(), requires_grad=False)
    return model


def measure(
    name: str, quantize: str | None, dtype: str | None, tokens: int, repetitions: int, compile: bool
) -> list[dict[str, Any]]:
    """Generate both texts with and without speculation, in turn.

    Returns:
        For each text the medians in ms per token and the median of the ratios of neighbouring runs.

    Raises:
        AssertionError: speculation changed a token.
    """
    rows = []
    for text, period in (("repeats its prompt", PERIOD), ("does not repeat", None)):
        model, tokenizer = load(name, dtype=dtype)
        model = accelerate(permuting(model, period), quantize)
        engines = [
            Engine(model, tokenizer, max_seq_len=3 * PERIOD + tokens, speculate=drafts, compile=compile)
            for drafts in (0, DEFAULT_DRAFTS)
        ]
        prompt = [PERIOD + i % PERIOD for i in range(2 * PERIOD)] if period else list(range(2 * PERIOD))
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        times: tuple[list[float], list[float]] = ([], [])
        for repetition in range(repetitions + 1):
            answers = []
            for engine, taken in zip(engines, times, strict=True):
                generated, first = [], 0.0
                for event in engine.generate(prompt, params):
                    generated.append(event.token)
                    first = first or time.perf_counter()
                if repetition:
                    taken.append((time.perf_counter() - first) / (tokens - 1))
                answers.append(generated)
            assert answers[0] == answers[1], "speculation changed a token"
        repeats = answers[0] == [PERIOD + i % PERIOD for i in range(tokens)]
        assert repeats == bool(period), "the weights do not write the text they are meant to"
        plain, speculating = times
        rows.append(
            {
                "text": text,
                "plain_ms_per_token": 1e3 * median(plain),
                "speculating_ms_per_token": 1e3 * median(speculating),
                "speedup": median(a / b for a, b in zip(plain, speculating, strict=True)),
            }
        )
    return rows


def main() -> int:
    """Measure and print a table, or JSON."""
    parser = ArgumentParser(prog="python -m axon_llm.bench.speculation", description=__doc__)
    parser.add_argument("-m", "--model", default="random:llama-3.2-1b")
    parser.add_argument("-q", "--quantize", choices=("int8", "int4"))
    parser.add_argument("--dtype")
    parser.add_argument("-n", "--tokens", type=int, default=96)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.model, options.quantize, options.dtype, options.tokens, options.repetitions, options.compile)
    about = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if options.json:
        print(json.dumps({"schema": "axon.bench-speculation/1", "model": options.model, **about, "rows": rows}))
        return 0
    print(f"{options.model}, {options.quantize or options.dtype or 'as stored'}, {about['hardware']}\n")
    print(render(rows))
    return 0


def render(rows: list[dict[str, Any]]) -> str:
    """The rows of ``measure`` as a Markdown table."""
    lines = ["| text | plain, ms / token | speculating | faster |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row['text']} | {row['plain_ms_per_token']:.1f} | {row['speculating_ms_per_token']:.1f} | "
        f"{row['speedup']:.2f} × |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    prefer_huge_pages()
    sys.exit(main())
