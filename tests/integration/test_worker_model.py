"""The worker with a real engine: what only a model can get wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from axon_llm.serving.embedded import EmbeddedQueue, EmbeddedStore
from axon_llm.serving.model_loading import load_served_model
from axon_llm.serving.served_model import ServedModel
from axon_llm.serving.wire import Job, LogEntry, Sampling
from axon_llm.serving.worker import Worker
from tests.integration.backends import in_event_loop, make_job
from tests.integration.conftest import settings_for

SETTINGS = settings_for("redis://unused", "amqp://unused")
PROMPT = "Once upon a time there was a little house at the end of a long road, and in it lived an old man"


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return load_served_model("axon-tiny", dtype="float32", slots=2, max_seq_len=128)


class Bench:
    """One worker on an embedded store and queue."""

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.store, self.queue = EmbeddedStore(SETTINGS), EmbeddedQueue(SETTINGS, prefetch=2)
        self.worker = Worker(
            SETTINGS,
            served.engine,
            self.store.worker_side(),
            self.queue.source(),
            encode=served.encode,
            spell=served.spell,
            models=served.models,
            worker_id="w1",
        )
        self._thread = threading.Thread(target=self.worker.run)
        self._thread.start()

    async def answer(self, job: Job) -> list[LogEntry]:
        await self.store.submit(job)
        await self.queue.publish(job)
        return [entry async for entry in self.store.stream(job.ref) if entry is not None]

    def stop(self) -> None:
        self.worker.stop()
        self._thread.join(20)


@pytest.fixture
def bench(served: ServedModel) -> Iterator[Bench]:
    running = Bench(served)
    yield running
    running.stop()


def cached_tokens(entries: list[LogEntry]) -> int:
    terminal = entries[-1].terminal
    assert terminal is not None
    assert terminal.usage is not None
    return terminal.usage.cached_tokens


@in_event_loop
async def test_a_prompt_that_another_tenant_sent_is_not_taken_from_the_cache(bench: Bench) -> None:
    [model] = bench.served.models
    found = [
        cached_tokens(await bench.answer(make_job(tenant=tenant, model=model.id, prompt=PROMPT, max_tokens=2)))
        for tenant in ("alice", "alice", "mallory", "mallory")
    ]
    assert found[0] == 0
    assert found[1] > 10
    assert found[2] == 0
    assert found[3] == found[1]


@in_event_loop
async def test_logprobs_name_the_tokens_themselves_where_the_text_lags_behind(bench: Bench) -> None:
    [model] = bench.served.models
    greedy = Sampling(max_tokens=20, temperature=0, logprobs=1, seed=5, ignore_eos=True)
    [_, second, *_] = await bench.answer(make_job(model=model.id, prompt=PROMPT, sampling=greedy))
    # Begins as the second token's text does and never goes on as the answer does: that text is held for a while.
    sampling = greedy.model_copy(update={"stop": (f"{second.token_text}never said",)})
    entries = await bench.answer(make_job(model=model.id, prompt=PROMPT, sampling=sampling))
    assert len(entries) == 20
    for entry in entries:
        assert entry.token is not None
        assert entry.token_text == bench.served.spell(entry.token)[0]
    assert [entry.token_text for entry in entries] != [entry.text for entry in entries]
    plain = sampling.model_copy(update={"logprobs": None})
    unscored = await bench.answer(make_job(model=model.id, prompt=PROMPT, sampling=plain))
    assert {entry.token_text for entry in unscored} == {None}
