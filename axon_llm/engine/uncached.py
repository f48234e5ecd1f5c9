"""Generation without a cache, with everything else as in the engine: what the cache is compared with.

Every step runs the model over the whole sequence again. Sampling, stop strings, text and events are the engine's own,
so that the same seed gives the same tokens and nothing but the cache is different.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from axon_llm.engine.completion import Completion
from axon_llm.engine.events import Request, TokenEvent
from axon_llm.engine.params import SamplingParams
from axon_llm.engine.sampling import Sampler
from axon_llm.model import Transformer
from axon_llm.tokenizer import Tokenizer


@torch.inference_mode()
def generate_uncached(
    model: Transformer, tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams
) -> Iterator[TokenEvent]:
    """Complete a prompt, recomputing every key and value for every token.

    Args:
        model: the decoder.
        tokenizer: of the same checkpoint.
        prompt: token ids, at least one.
        params: how to choose tokens and when to stop.
    """
    device = model.embed_tokens.weight.device
    sequence = Completion.of(Request(id="uncached", prompt=tuple(prompt), params=params), tokenizer)
    sampler = Sampler(1, model.config.vocab_size, device)
    sequence.start()
    sampler.set(0, params, sequence.seed, prompt, ())
    while sequence.finish_reason is None:
        length = len(sequence.tokens)
        logits = model(
            torch.tensor([sequence.tokens], device=device),
            torch.arange(length, device=device)[None],
            None,
            logits_at=torch.tensor([length - 1], device=device),
        )
        sampled = sampler.sample(logits[:, 0], torch.tensor([length], device=device))
        if sampled.tokens[0] < 0:
            yield sequence.end("error", "the model's output is not a number")
            return
        yield sequence.take(sampled.tokens[0], sampled, 0)
