"""Sampling on a GPU chooses what it chooses on the CPU."""

from __future__ import annotations

import pytest
import torch

from axon_llm.engine.chance import uniform
from axon_llm.engine.params import SamplingParams
from axon_llm.engine.sampling import Sampler

VOCAB = 5_000
PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "sampled": SamplingParams(temperature=0.9),
    "filtered": SamplingParams(temperature=1.2, top_k=40, top_p=0.9, min_p=0.01),
    "many candidates": SamplingParams(temperature=5.0, top_p=0.99),
    "penalties": SamplingParams(temperature=0.7, repetition_penalty=1.3, frequency_penalty=0.5, logit_bias={3: 4.0}),
}


def test_random_numbers_are_those_of_the_cpu() -> None:
    seeds, positions = torch.arange(-500, 500), torch.arange(1000)
    assert torch.equal(uniform(seeds.cuda(), positions.cuda()).cpu(), uniform(seeds, positions))


@pytest.mark.parametrize("name", PARAMS)
def test_tokens_and_log_probabilities_are_those_of_the_cpu(name: str) -> None:
    logits = torch.randn(20, 2, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    samplers = {device: Sampler(2, VOCAB, device) for device in ("cpu", "cuda")}
    for sampler in samplers.values():
        sampler.set(0, PARAMS[name], 7, [1, 2, 3], [4])
        sampler.set(1, SamplingParams(temperature=0.0, logprobs=3), 8, [1], [])
    same = 0
    for step, rows in enumerate(logits):
        found = {d: s.sample(rows.to(d), torch.tensor([9 + step] * 2, device=d)) for d, s in samplers.items()}
        same += found["cpu"].tokens == found["cuda"].tokens
        assert found["cpu"].top_tokens == found["cuda"].top_tokens
        assert found["cpu"].logprobs[1] == pytest.approx(found["cuda"].logprobs[1], abs=1e-4)
    # A sum in another order may move the edge between two tokens, which is what a random number very rarely hits.
    assert same >= 19
