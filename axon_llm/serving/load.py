"""Load on any OpenAI-compatible server: requests that arrive by chance, or a fixed number of users.

Open loop: arrivals are a Poisson process (or steadier or burstier, by ``burstiness``) that does not wait for answers,
as the public does not. Closed loop: so many users, each asking again when answered. The same seed makes the same
prompts and the same arrivals. Next: ``load_report.py``.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from axon_llm.serving.load_client import Sample, Target, measure

# Common words, so that any tokenizer makes about one token of each.
_WORDS = """
    the of and to in a is that for it as was with be by on not he his but at are this have from or had an they
    which one you were her all she there would their we him been has when who will more no if out so said what up
    its about into than them can only other new some could time these two may then do first any my now such like
    our over man me even most made after also did many before must through back years where much your way well
    down should because each just those people how too little state good very make world still own see men work
    long get here between both life being
""".split()  # a list of 160 literals is no easier to read


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked, and how often.

    Attributes:
        model: its name.
        num_prompts: requests in all.
        input_words: words of each prompt, about as many tokens.
        output_tokens: tokens of each answer.
        shared_words: of the prompt, the first ones, which all requests have in common (a system prompt).
        chat: chat completions, else text completions.
        ignore_eos: have every answer be as long as asked for; Axon and vLLM know the parameter, others may not.
        temperature: of sampling.
        seed: of prompts, arrivals and sampling.
        timeout_s: after which a request has failed.
    """

    model: str
    num_prompts: int = 100
    input_words: int = 128
    output_tokens: int = 64
    shared_words: int = 0
    chat: bool = True
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int = 0
    timeout_s: float = 300.0

    @property
    def path(self) -> str:
        """The route, after ``/v1``."""
        return "/chat/completions" if self.chat else "/completions"

    def bodies(self) -> list[dict[str, Any]]:
        """The requests, all different beyond what they share."""
        chance = random.Random(self.seed)
        shared = " ".join(chance.choices(_WORDS, k=self.shared_words))
        return [self._body(shared, chance) for _ in range(self.num_prompts)]

    def _body(self, shared: str, chance: random.Random) -> dict[str, Any]:
        text = " ".join(chance.choices(_WORDS, k=max(1, self.input_words - self.shared_words)))
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.temperature > 0:
            body["seed"] = chance.getrandbits(31)
        if self.ignore_eos:
            body["ignore_eos"] = True
        if not self.chat:
            return {**body, "prompt": f"{shared} {text}".strip()}
        messages = [{"role": "system", "content": shared}] if shared else []
        return {**body, "messages": [*messages, {"role": "user", "content": text}]}


@dataclass
class Run:
    """What happened.

    Attributes:
        workload: what was asked.
        request_rate: arrivals per second; infinite in a closed loop.
        max_concurrency: users at once; ``None`` in an open loop.
        began: ``time.monotonic()`` of the first arrival.
        duration_s: first arrival → last end.
        samples: one for each request, in the order of arrival.
        lag_s: the most that the client itself was late in sending; figures beyond the noise need this to be small.
    """

    workload: Workload
    request_rate: float
    max_concurrency: int | None
    burstiness: float
    began: float
    duration_s: float
    samples: list[Sample]
    lag_s: float


def arrivals(number: int, per_s: float, burstiness: float, seed: int) -> list[float]:
    """Seconds after the start at which each request arrives, the first at 0.

    Gaps are gamma-distributed with the shape ``burstiness``: 1 is Poisson, below is burstier, above steadier. They are
    scaled so that the last one arrives when it should, whatever chance made of the sum.
    """
    if math.isinf(per_s):
        return [0.0] * number
    chance = random.Random(seed + 1)
    gaps = [chance.gammavariate(burstiness, 1.0 / burstiness) for _ in range(number - 1)]
    total = sum(gaps)
    scale = (number - 1) / per_s / total if total else 0.0
    moments = [0.0]
    for gap in gaps:
        moments.append(moments[-1] + gap * scale)
    return moments


async def run_load(
    target: Target,
    workload: Workload,
    *,
    request_rate: float = math.inf,
    max_concurrency: int | None = None,
    burstiness: float = 1.0,
    on_done: Callable[[Sample], None] | None = None,
) -> Run:
    """Sends the whole workload and returns what happened.

    Args:
        target: the server.
        workload: what is asked.
        request_rate: arrivals per second; infinite for all at once.
        max_concurrency: never more requests at once than this; those that had to wait count from when they were sent
            where there is no rate (a closed loop), and from when they were due where there is one.
        burstiness: see ``arrivals``.
        on_done: called after each request, for a progress bar.
    """
    bodies = workload.bodies()
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    closed = math.isinf(request_rate)
    moments = arrivals(len(bodies), request_rate, burstiness, workload.seed)
    lag_s = 0.0
    began = time.monotonic()

    async def one(body: dict[str, Any], after_s: float) -> Sample:
        nonlocal lag_s
        due = began + after_s
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        lag_s = max(lag_s, time.monotonic() - due) if not closed else 0.0
        if places is not None:
            await places.acquire()
        try:
            sent = time.monotonic() if closed else due
            sample = await measure(target, workload.path, body, sent, workload.timeout_s)
        finally:
            if places is not None:
                places.release()
        if on_done is not None:
            on_done(sample)
        return sample

    samples = await asyncio.gather(*(one(body, moment) for body, moment in zip(bodies, moments, strict=True)))
    ended = max(sample.ended for sample in samples)
    return Run(workload, request_rate, max_concurrency, burstiness, began, ended - began, list(samples), lag_s)
