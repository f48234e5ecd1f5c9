"""Several models on one broker, and workers of several versions."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import httpx
import pytest
import redis

from axon_llm.serving.redis_scripts import WORKERS, worker_key
from axon_llm.serving.wire import encode
from tests.integration.http_rig import Backend, Rig, embedded_backend, real_backend
from tests.integration.scripted_worker import CARD, MODEL
from tests.integration.servers import RabbitServer, RedisServer
from tests.integration.test_http_jobs import request

OTHER = "org/another-model"


@pytest.fixture(scope="module")
def two_models(real_servers: tuple[RedisServer, RabbitServer]) -> Iterator[tuple[Rig, Backend]]:
    backend = real_backend(*real_servers)
    workers = [backend.make_worker(), backend.make_worker(OTHER)]
    for worker in workers:
        worker.start()
    running = backend.rig()
    yield running, backend
    running.stop()
    for worker in workers:
        assert {job.model for job in worker.jobs} == {worker.model}
        worker.stop()


def test_every_job_reaches_a_worker_that_serves_its_model(two_models: tuple[Rig, Backend]) -> None:
    rig, _ = two_models
    listed = httpx.get(rig.url + "/v1/models").json()["data"]
    assert [model["id"] for model in listed] == sorted([MODEL, OTHER])
    for number in range(20):
        body = {**request("count 2"), "model": (MODEL, OTHER)[number % 2]}
        answer = httpx.post(rig.url + "/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["model"]) == (200, body["model"])


def test_what_the_authors_recommend_fills_in_what_a_request_leaves_out_and_no_more() -> None:
    backend = embedded_backend()
    recommended = {"temperature": 0.6, "top_k": 20}
    worker = backend.make_worker(CARD.model_copy(update={"generation_defaults": recommended}))
    worker.start()
    rig = backend.rig()
    try:
        for given in ({}, {"temperature": 1.5}, {"temperature": 0, "top_k": 3}):
            answer = httpx.post(rig.url + "/v1/chat/completions", json=request("count 1", **given))
            assert answer.status_code == 200
            sampling = worker.jobs[-1].sampling
            assert {"temperature": sampling.temperature, "top_k": sampling.top_k} == {**recommended, **given}
    finally:
        rig.stop()
        worker.stop()


def test_announcements_of_a_newer_version_are_read_and_unreadable_ones_are_passed_over(
    two_models: tuple[Rig, Backend], caplog: pytest.LogCaptureFixture
) -> None:
    rig, backend = two_models
    assert backend.redis is not None
    client = redis.Redis.from_url(backend.redis.url())
    newer = json.loads(client.get(worker_key(f"scripted-{MODEL}")) or b"")  # type: ignore[arg-type]
    newer |= {"worker_id": "newer", "mood": "good", "models": [{**json.loads(encode(CARD)), "id": "new", "colour": 1}]}
    strange = {"worker_id": "strange", "models": "all of them", "secret": "NOT-FOR-THE-LOG"}
    caplog.set_level(logging.WARNING)
    for card in (newer, strange):
        client.set(worker_key(card["worker_id"]), json.dumps(card), px=20_000)
        client.zadd(WORKERS, {card["worker_id"]: 1e15})
    try:
        rig.ask(_forget(rig))
        listed = httpx.get(rig.url + "/v1/models")
        assert listed.status_code == 200
        assert {model["id"] for model in listed.json()["data"]} == {MODEL, OTHER, "new"}
        assert httpx.post(rig.url + "/v1/chat/completions", json=request("count 1")).status_code == 200
    finally:
        client.zrem(WORKERS, "newer", "strange")
        client.close()
    assert "cannot be read" in caplog.text
    assert "NOT-FOR-THE-LOG" not in caplog.text


async def _forget(rig: Rig) -> None:
    rig.service.capacity._read_at = float("-inf")
