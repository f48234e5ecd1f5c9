import asyncio
from typing import Any

import pytest

from axon_llm.serving.http_capacity import Capacity
from axon_llm.serving.http_errors import ApiError
from axon_llm.serving.ports import QueueUnavailable, StoreUnavailable
from axon_llm.serving.wire import ModelCard, WorkerCard


def worker(model: str = "m", name: str = "w", **more: Any) -> WorkerCard:
    card = ModelCard(id=model, created_unix_s=0, max_seq_len=64, vocab_size=10, has_chat_template=True)
    fields = {"slots": 2, "running": 0, "waiting": 0, "started_at_unix_s": 0.0, **more}
    return WorkerCard(worker_id=f"{name}-{model}", models=(card,), **fields)


class World:
    """Store and queue at once, saying what a test wants."""

    def __init__(self, *workers: WorkerCard, depth: int = 0) -> None:
        self.cards, self.waiting = list(workers), depth
        self.away = False
        self.asked = 0

    async def workers(self) -> list[WorkerCard]:
        self.asked += 1
        if self.away:
            raise StoreUnavailable("away")
        return self.cards

    async def depth(self, model: str) -> int:
        if self.away:
            raise QueueUnavailable("away")
        return self.waiting


def capacity(world: Any, *accepted: str) -> Capacity:
    return Capacity(world, world, accepted)


def test_a_model_that_no_worker_serves_is_not_found() -> None:
    with pytest.raises(ApiError) as caught:
        asyncio.run(capacity(World(worker("m"))).model("other"))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_before_any_worker_has_come_every_model_is_a_503() -> None:
    with pytest.raises(ApiError) as caught:
        asyncio.run(capacity(World()).model("m"))
    assert (caught.value.status, caught.value.code) == (503, "no_worker")
    assert caught.value.retry_after_s is not None


def test_a_model_named_in_the_settings_is_accepted_without_a_worker() -> None:
    assert asyncio.run(capacity(World(), "m").model("m")) is None


def test_a_model_stays_known_when_its_last_worker_goes() -> None:
    async def run() -> None:
        world = World(worker("m"))
        known = capacity(world)
        assert await known.model("m") is not None
        world.cards = []
        known._read_at = float("-inf")
        assert await known.model("m") is not None
        assert await known.models() == []

    asyncio.run(run())


def test_a_store_that_is_away_leaves_what_was_known() -> None:
    async def run() -> None:
        world = World(worker("m"))
        known = capacity(world)
        await known.workers()
        world.away = True
        known._read_at = float("-inf")
        assert [card.id for card in await known.models()] == ["m"]

    asyncio.run(run())


def test_announcements_are_not_read_for_every_request() -> None:
    async def run() -> None:
        world = World(worker("m"))
        known = capacity(world)
        for _ in range(50):
            await known.model("m")
        assert world.asked == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("workers", "depth", "seconds"),
    [
        ([worker(mean_job_s=0.5)], 40, 10.0),  # two slots, half a second a job: four a second
        ([worker(mean_job_s=0.5), worker(name="v", mean_job_s=0.5)], 40, 5.0),
        ([worker(mean_job_s=0.5), worker(name="v", mean_job_s=0.5, draining=True)], 40, 10.0),
        ([worker(mean_job_s=0.5), worker("n", mean_job_s=0.5)], 40, 10.0),  # who serves another model is no help
        ([worker(jobs_per_s=20.0, mean_job_s=0.5)], 40, 2.0),
        ([worker(mean_job_s=0.5)], 0, 1.0),  # never less than a second
        ([worker(mean_job_s=60.0)], 1000, 120.0),  # nor so long that nobody would come back
        ([worker()], 40, 1.0),  # nothing was measured yet
    ],
)
def test_the_time_to_wait_is_depth_over_measured_rate(workers: list[WorkerCard], depth: int, seconds: float) -> None:
    assert asyncio.run(capacity(World(*workers, depth=depth)).retry_after_s("m")) == pytest.approx(seconds)


def test_a_broker_that_is_away_does_not_hold_up_the_answer() -> None:
    async def run() -> None:
        world = World(worker(mean_job_s=0.5), depth=40)
        known = capacity(world)
        await known.workers()
        world.away = True
        assert await known.retry_after_s("m") == 1.0

    asyncio.run(run())
