"""Choosing tokens: the right distribution, transforms in the right order, and chance from seed and position alone."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from axon_llm.engine.chance import BLOCK, draw, uniform
from axon_llm.engine.params import SamplingParams
from axon_llm.engine.sampling import Sampler, top_cutoff
from axon_llm.errors import RequestError

VOCAB = 7
LARGEST_RANDOM = 1 - 2.0**-40  # the most that uniform gives: times a float64 it is less than that float64
LOGITS = torch.tensor([1.0, 2.5, -1.0, 0.3, 2.4, -6.0, 0.0])


def sampler_for(*params: SamplingParams, vocab: int = VOCAB, prompt: tuple[int, ...] = ()) -> Sampler:
    sampler = Sampler(len(params), vocab)
    for slot, p in enumerate(params):
        sampler.set(slot, p, p.seed or 0, prompt, ())
    return sampler


def many_draws(params: SamplingParams, count: int = 20_000, logits: Tensor = LOGITS) -> Tensor:
    """How often each token comes out over ``count`` positions."""
    sampler = sampler_for(*[params] * 100, vocab=len(logits))
    counts = torch.zeros(len(logits))
    for start in range(0, count, 100):
        tokens = sampler.sample(logits.repeat(100, 1), torch.arange(start, start + 100)).tokens
        counts += torch.bincount(torch.tensor(tokens), minlength=len(logits))
    return counts


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    used = expected > 0
    assert counts[~used].sum() == 0, "a token of probability zero came out"
    return float(((counts - expected)[used] ** 2 / expected[used]).sum())


# 99.99 % quantile of chi-square with 6 degrees of freedom: the draws are fixed by their seed, so this never flickers.
CHI_SQUARE_LIMIT = 27.9


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_out_as_often_as_the_softmax_says(temperature: float) -> None:
    counts = many_draws(SamplingParams(temperature=temperature, seed=11))
    assert chi_square(counts, (LOGITS / temperature).softmax(-1)) < CHI_SQUARE_LIMIT


def reference_filter(logits: Tensor, params: SamplingParams) -> Tensor:
    """The documented order, one token at a time."""
    probabilities = (logits.double() / params.temperature).softmax(-1)
    order = probabilities.argsort(descending=True, stable=True).tolist()
    if params.top_k:
        order = order[: params.top_k]
    total, mass, kept = sum(float(probabilities[i]) for i in order), 0.0, []
    for i in order:
        if mass / total < params.top_p:
            kept.append(i)
        mass += float(probabilities[i])
    best = float(probabilities.max())
    kept = [i for i in kept if float(probabilities[i]) >= params.min_p * best]
    result = torch.zeros(len(logits), dtype=torch.float64)
    result[kept] = probabilities[kept]
    return result / result.sum()


FILTERS = [
    SamplingParams(top_k=1, seed=3),
    SamplingParams(top_k=3, seed=3),
    SamplingParams(top_p=0.6, seed=3),
    SamplingParams(top_p=0.95, temperature=1.7, seed=3),
    SamplingParams(min_p=0.2, seed=3),
    SamplingParams(top_k=4, top_p=0.9, min_p=0.05, temperature=1.3, seed=3),
    SamplingParams(top_p=1e-9, seed=3),
]


@pytest.mark.parametrize("params", FILTERS)
def test_filtered_tokens_come_out_as_often_as_the_renormalised_softmax_says(params: SamplingParams) -> None:
    counts = many_draws(params)
    assert chi_square(counts, reference_filter(LOGITS, params).float()) < CHI_SQUARE_LIMIT


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_only_tokens_the_filters_keep_ever_come_out(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    tokens = sampler_for(*[params] * 20, vocab=50).sample(logits.repeat(20, 1), torch.arange(20)).tokens
    # A hair's breadth of slack on the thresholds: the reference works in float64.
    loose = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=min(1.0, top_p + 1e-5), min_p=max(0.0, min_p - 1e-5)
    )
    allowed = reference_filter(logits, loose) > 0
    assert all(allowed[token] for token in tokens)


def test_top_p_looks_beyond_its_first_candidates_when_the_distribution_is_flat() -> None:
    scaled = torch.zeros(2, 5_000)
    scaled[:, 4_999] = -1.0
    top_k, top_p = torch.tensor([[5_000], [5_000]]), torch.tensor([[0.999_95], [0.5]])
    _, enough = top_cutoff(scaled, top_k, top_p, 256)
    assert enough is not None
    assert not enough
    cutoff, enough = top_cutoff(scaled, top_k, top_p, 256 * 16 * 16)
    assert enough is None
    assert cutoff[0] == -1.0
    assert cutoff[1] == 0.0


def test_top_p_never_removes_everything() -> None:
    logits = torch.tensor([[0.0, 0.0, 50.0]])
    assert sampler_for(SamplingParams(top_p=1e-30, seed=1), vocab=3).sample(logits, torch.tensor([5])).tokens == [2]


@pytest.mark.parametrize("temperature", [0.0, 1e-46, 1e-6])
def test_zero_and_vanishing_temperatures_are_greedy(temperature: float) -> None:
    sampler = sampler_for(SamplingParams(temperature=temperature, seed=1))
    assert {sampler.sample(LOGITS[None], torch.tensor([i])).tokens[0] for i in range(20)} == {1}


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    chooser = random.Random(5)

    def some_params() -> SamplingParams:
        return SamplingParams(
            temperature=chooser.choice([0.0, 0.7, 1.0, 3.0]),
            top_k=chooser.choice([0, 0, 2, 5, 40]),
            top_p=chooser.choice([1.0, 0.5, 0.9]),
            min_p=chooser.choice([0.0, 0.1]),
            repetition_penalty=chooser.choice([1.0, 1.3]),
            presence_penalty=chooser.choice([0.0, 0.5]),
            frequency_penalty=chooser.choice([0.0, 0.4]),
            logit_bias=chooser.choice([{}, {3: 2.0}]),
            logprobs=chooser.choice([None, 0, 3]),
            seed=chooser.randrange(2**63),
        )

    for _ in range(60):
        rows = chooser.randrange(1, 6)
        params = [some_params() for _ in range(rows)]
        together = sampler_for(*params, vocab=64, prompt=(1, 2, 3))
        alone = [sampler_for(p, vocab=64, prompt=(1, 2, 3)) for p in params]
        for step in range(5):
            logits = torch.randn(rows, 64) * 3
            positions = torch.tensor([step + 10 * row for row in range(rows)])
            expected = [
                alone[row].sample(logits[row : row + 1], positions[row : row + 1]).tokens[0] for row in range(rows)
            ]
            assert together.sample(logits, positions).tokens == expected


def test_rows_may_begin_at_any_slot() -> None:
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, logit_bias={6: 100.0})]
    assert sampler_for(*params).sample(LOGITS[None], torch.tensor([0]), first=1).tokens == [6]


def test_a_cleared_slot_keeps_nothing_of_its_last_sequence() -> None:
    sampler = sampler_for(SamplingParams(temperature=0.0, logit_bias={6: 100.0}, presence_penalty=50.0))
    assert sampler.sample(LOGITS[None], torch.tensor([0])).tokens == [6]
    sampler.clear(0)
    sampler.set(0, SamplingParams(temperature=0.0), 0, (), ())
    assert sampler.sample(LOGITS[None], torch.tensor([0])).tokens == [1]
    sampler.set(0, SamplingParams(temperature=0.0, presence_penalty=1e-3), 0, (), ())
    assert sampler.sample(LOGITS[None], torch.tensor([0])).tokens == [1]


# -------------------------------------------------------------------------------------------- penalties and bias


def greedy_after(logits: list[float], prompt: tuple[int, ...], generated: tuple[int, ...], **penalties: float) -> int:
    sampler = Sampler(1, len(logits))
    sampler.set(0, SamplingParams(temperature=0.0, **penalties), 0, prompt, generated)  # type: ignore[arg-type]
    return sampler.sample(torch.tensor([logits]), torch.tensor([0])).tokens[0]


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_completion() -> None:
    assert greedy_after([2.0, 1.5, 0.0], (0,), (), repetition_penalty=1.2) == 0
    assert greedy_after([2.0, 1.5, 0.0], (0,), (), repetition_penalty=1.5) == 1
    assert greedy_after([2.0, 1.5, 0.0], (), (0,), repetition_penalty=1.5) == 1
    assert greedy_after([-1.0, -1.5], (0,), (), repetition_penalty=1.4) == 0
    assert greedy_after([-1.0, -1.5], (0,), (), repetition_penalty=1.6) == 1


def test_the_presence_penalty_counts_once_and_the_frequency_penalty_every_time() -> None:
    assert greedy_after([2.0, 1.0], (), (0, 0, 0), presence_penalty=0.9) == 0
    assert greedy_after([2.0, 1.0], (), (0, 0, 0), presence_penalty=1.1) == 1
    assert greedy_after([2.0, 1.0], (), (0, 0), frequency_penalty=0.4) == 0
    assert greedy_after([2.0, 1.0], (), (0, 0, 0), frequency_penalty=0.4) == 1


def test_presence_and_frequency_penalties_leave_the_prompt_out() -> None:
    assert greedy_after([2.0, 1.0], (0, 0, 0), (), presence_penalty=5.0, frequency_penalty=5.0) == 0


def test_chosen_tokens_are_counted_as_they_come() -> None:
    sampler = sampler_for(SamplingParams(temperature=0.0, frequency_penalty=0.2))
    seen = [sampler.sample(LOGITS[None], torch.tensor([i])).tokens[0] for i in range(4)]
    assert seen == [1, 4, 1, 4]  # 2.5 → 2.3 → 2.1, 2.4 → 2.2


def test_penalties_continue_after_an_interruption() -> None:
    params = SamplingParams(frequency_penalty=0.7, repetition_penalty=1.2, seed=9)
    whole = sampler_for(params, prompt=(2,))
    tokens = [whole.sample(LOGITS[None], torch.tensor([i])).tokens[0] for i in range(30)]
    resumed = Sampler(1, VOCAB)
    resumed.set(0, params, 9, (2,), tokens[:13])
    assert [resumed.sample(LOGITS[None], torch.tensor([i])).tokens[0] for i in range(13, 30)] == tokens[13:]


def test_a_bias_of_minus_a_hundred_forbids_and_of_plus_a_hundred_forces() -> None:
    assert many_draws(SamplingParams(logit_bias={1: -100.0}, seed=4), 2_000)[1] == 0
    assert many_draws(SamplingParams(logit_bias={5: 100.0}, seed=4), 2_000)[5] == 2_000


@pytest.mark.parametrize(
    "extreme",
    [
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0},
        {"temperature": 1e-300},
        {"temperature": 100.0},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1.0, "min_p": 1e-300},
        {"temperature": 1.0, "top_k": 2**31 - 1},
        {"logit_bias": {0: 1e4, 1: -1e4}},
        {"frequency_penalty": -100.0, "presence_penalty": -100.0},
    ],
    ids=str,
)
def test_the_ends_of_every_range_still_give_a_token(extreme: dict[str, Any]) -> None:
    logits = LOGITS * 1e4
    sampled = sampler_for(SamplingParams(seed=1, **extreme), prompt=(0, 1)).sample(logits[None], torch.tensor([4]))
    assert 0 <= sampled.tokens[0] < len(LOGITS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 0.0),
        ("logit_bias", {5: 1e39}),
        ("logit_bias", {5: math.nan}),
    ],
)
def test_values_that_would_make_scores_infinite_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**{name: value})
    assert refused.value.param == name


# --------------------------------------------------------------------------------------------- log-probabilities


def test_logprobs_are_those_of_the_model_before_any_transform() -> None:
    params = SamplingParams(temperature=0.1, logit_bias={5: 100.0}, logprobs=3, seed=1)
    sampled = sampler_for(params).sample(LOGITS[None], torch.tensor([0]))
    expected = LOGITS.log_softmax(-1)
    assert sampled.tokens == [5]
    assert sampled.logprobs[0] == pytest.approx(float(expected[5]))
    assert [token for token, _ in sampled.alternatives(0, 3)] == [1, 4, 0]
    assert [value for _, value in sampled.alternatives(0, 2)] == pytest.approx([float(expected[1]), float(expected[4])])


def test_the_logits_given_are_not_changed() -> None:
    logits = LOGITS[None].clone()
    params = SamplingParams(top_k=2, top_p=0.5, min_p=0.1, repetition_penalty=2.0, logit_bias={1: 1.0}, seed=1)
    sampler_for(params, prompt=(1,)).sample(logits, torch.tensor([0]))
    assert torch.equal(logits[0], LOGITS)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_give_no_token_and_leave_other_rows_alone(bad: float, temperature: float) -> None:
    logits = LOGITS.repeat(2, 1)
    logits[0, 3] = bad
    params = SamplingParams(temperature=temperature, top_p=0.9, seed=8)
    good = sampler_for(params).sample(LOGITS[None], torch.tensor([4])).tokens[0]
    assert sampler_for(params, params).sample(logits, torch.tensor([4, 4])).tokens == [-1, good]


# ------------------------------------------------------------------------------------------------ random numbers


def test_random_numbers_are_splitmix64_of_seed_and_position() -> None:
    def reference(seed: int, position: int) -> float:
        mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

        def mix(x: int) -> int:
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
            return x ^ (x >> 31)

        first = mix((mix((seed + golden) & mask) + position * golden) & mask)
        return [(number >> 24) / 2**40 for number in (first, mix((first + golden) & mask))]

    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 123456789):
        for position in (0, 1, 2, 1000, 131_071):
            value = uniform(torch.tensor([seed]), torch.tensor([position]))
            assert value.tolist() == [reference(seed % 2**64, position)]


def test_random_numbers_are_uniform_and_independent_over_seeds_and_positions() -> None:
    seeds, positions = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    values, second = uniform(seeds.reshape(-1), positions.reshape(-1)).T.view(2, 300, 300)
    for numbers in (values, second):
        counts = torch.histc(numbers.float(), bins=64, min=0, max=1)
        assert chi_square(counts, torch.full((64,), 1 / 64)) < 120  # 99.99 % quantile with 63 degrees of freedom: 117
    for other in (values.roll(1, 0), values.roll(1, 1), values.roll((1, -1), (0, 1)), second, second.roll(1, 1)):
        correlation = torch.corrcoef(torch.stack([values.reshape(-1), other.reshape(-1)]))[0, 1]
        assert abs(float(correlation)) < 4 / 300  # four standard deviations


def test_a_draw_stays_the_same_when_weights_differ_by_rounding() -> None:
    """Also among tokens so unlikely that their edges lie closer together than the error of a sum over all of them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 16 * BLOCK, generator=generator)
    logits[:, :3] += 14  # three likely tokens, thousands with a millionth each
    nudged = logits + 1e-5 * torch.randn(logits.shape, generator=generator)
    random_numbers = torch.rand(20_000, 2, dtype=torch.float64, generator=generator)
    one, other = (
        torch.cat([draw(x.softmax(-1).expand(len(part), -1).contiguous(), part) for part in random_numbers.split(500)])
        for x in (logits, nudged)
    )
    assert (one >= 3).sum() > 20, "unlikely tokens were drawn too"
    assert (one != other).sum() <= 1


def test_a_token_of_weight_zero_is_never_drawn() -> None:
    weights = torch.zeros(1, 4 * BLOCK)
    weights[0, [3, 300, 301]] = torch.tensor([0.1, 0.7, 1e-13])
    for first, block in ((0.0, 0), (0.1249, 0), (0.1251, 1), (LARGEST_RANDOM, 1)):
        for second in (0.0, 0.5, LARGEST_RANDOM):
            random_numbers = torch.tensor([[first, second]], dtype=torch.float64)
            assert int(draw(weights, random_numbers)) == (3, 300)[block]
