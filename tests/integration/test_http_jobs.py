"""Jobs over HTTP: status, resumption by any session manager, cancellation, idempotency, refusals with a delay."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis

from axon_llm.serving.ports import QueueFull, QueueUnavailable, StoreUnavailable
from axon_llm.serving.wire import Job
from tests.integration.http_rig import Backend, Rig
from tests.integration.scripted_worker import MODEL
from tests.integration.test_http_openai import events


def request(text: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


def until(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + 15
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"never: {what}")


def state(rig: Rig, job_id: str) -> dict[str, Any]:
    status: dict[str, Any] = httpx.get(f"{rig.url}/v1/jobs/{job_id}").json()
    return status


def texts(raw: bytes) -> list[tuple[int, str]]:
    return [(chunk["sequence"], chunk["choices"][0]["delta"]["content"]) for chunk in events(raw)]


def read_until_first_event(rig: Rig, body: dict[str, Any]) -> Iterator[Any]:
    with httpx.stream("POST", rig.url + "/v1/chat/completions", json={**body, "stream": True}, timeout=20) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def begin(rig: Rig, body: dict[str, Any]) -> dict[str, Any]:
    """Starts a stream, takes its first event, and goes away."""
    stream = read_until_first_event(rig, body)
    first: dict[str, Any] = next(stream)
    stream.close()  # type: ignore[attr-defined]
    return first


def test_a_job_tells_its_state_and_its_usage(rig: Rig) -> None:
    answer = httpx.post(rig.url + "/v1/chat/completions", json=request("count 3"))
    assert answer.headers["x-axon-job-id"] == answer.json()["id"]
    status = state(rig, answer.json()["id"])
    assert (status["object"], status["state"], status["finish_reason"]) == ("job", "done", "stop")
    assert status["last_sequence"] == 4
    assert status["usage"]["completion_tokens"] == 4
    assert status["error"] is None


def test_a_failed_job_tells_why(rig: Rig) -> None:
    answer = httpx.post(rig.url + "/v1/chat/completions", json=request("fail 400 some_code"))
    assert answer.status_code == 400
    # The job's id is not in an error's body; what failed can be followed only by who was told it.
    assert answer.json()["error"]["code"] == "some_code"
    job_id = begin(rig, request("break"))["id"]
    status = until(lambda: (found := state(rig, job_id))["state"] == "done" and found, "it ended")
    assert status["finish_reason"] == "error"
    assert status["error"]["code"] == "broken"
    assert status["error"]["message"]


@pytest.mark.parametrize("after", range(5))
def test_events_resumed_anywhere_are_the_rest_of_the_same_stream(rig: Rig, http_backend: Backend, after: int) -> None:
    whole = httpx.post(rig.url + "/v1/chat/completions", json=request("count 3", stream=True))
    expected = texts(whole.content)
    assert [sequence for sequence, _ in expected] == [1, 2, 3, 4]
    job_id = whole.headers["x-axon-job-id"]
    other = http_backend.rig()
    try:
        for session_manager in (rig, other):
            resumed = httpx.get(f"{session_manager.url}/v1/jobs/{job_id}/events?after={after}")
            assert texts(resumed.content) == expected[after:]
            by_header = httpx.get(
                f"{session_manager.url}/v1/jobs/{job_id}/events", headers={"last-event-id": str(after)}
            )
            assert by_header.content == resumed.content
            ids = [line for line in resumed.text.split("\n") if line.startswith("id: ")]
            assert ids == [f"id: {sequence}" for sequence, _ in expected[after:]]
    finally:
        other.stop()


@pytest.mark.parametrize("after", [3, 4])
def test_usage_is_told_to_whoever_lost_the_connection_before_the_end(rig: Rig, after: int) -> None:
    job_id = httpx.post(rig.url + "/v1/chat/completions", json=request("count 3")).json()["id"]
    resumed = httpx.get(f"{rig.url}/v1/jobs/{job_id}/events?after={after}&include_usage=1")
    last = events(resumed.content)[-1]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)
    assert resumed.content.endswith(b"data: [DONE]\n\n")


def test_a_stream_that_is_still_growing_can_be_followed_from_its_beginning(rig: Rig) -> None:
    started = begin(rig, request("slow 20", on_disconnect="continue"))
    followed = httpx.get(f"{rig.url}/v1/jobs/{started['id']}/events?include_usage=1", timeout=20)
    *chunks, last = events(followed.content)
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == "".join(f"w{i} " for i in range(20))
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 21


def test_a_client_that_leaves_in_mid_stream_cancels_its_job(rig: Rig) -> None:
    first = begin(rig, request("first then hold"))
    status = until(lambda: (s := state(rig, first["id"]))["state"] == "done" and s, "the job ended")
    assert status["finish_reason"] == "cancelled"


def test_a_client_that_leaves_before_the_first_token_cancels_its_job(rig: Rig, http_backend: Backend) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(rig.url + "/v1/chat/completions", json=request("hold", session_id="leaver"), timeout=0.5)
    # The session is free again as soon as the job has been cancelled.
    until(
        lambda: httpx.post(rig.url + "/v1/chat/completions", json=request("count 1", session_id="leaver")).is_success,
        "the session became free",
    )


def test_a_client_that_said_so_leaves_its_job_running(rig: Rig) -> None:
    first = begin(rig, request("slow 10", on_disconnect="continue"))
    status = until(lambda: (s := state(rig, first["id"]))["state"] == "done" and s, "the job ended")
    assert (status["finish_reason"], status["last_sequence"]) == ("stop", 11)


def test_one_who_only_follows_does_not_cancel_by_leaving(rig: Rig) -> None:
    first = begin(rig, request("slow 10", on_disconnect="continue"))
    with httpx.stream("GET", f"{rig.url}/v1/jobs/{first['id']}/events") as response:
        next(response.iter_lines())
    status = until(lambda: (s := state(rig, first["id"]))["state"] == "done" and s, "the job ended")
    assert status["finish_reason"] == "stop"


@pytest.mark.parametrize(("method", "tail"), [("POST", "/cancel"), ("DELETE", "")])
def test_a_cancelled_job_ends_its_stream_with_the_reason(rig: Rig, method: str, tail: str) -> None:
    stream = read_until_first_event(rig, request("first then hold"))
    first = next(stream)
    answer = httpx.request(method, f"{rig.url}/v1/jobs/{first['id']}{tail}")
    assert answer.status_code == 200
    *_, last = stream
    assert last["choices"][0]["finish_reason"] == "cancelled"
    again = httpx.request(method, f"{rig.url}/v1/jobs/{first['id']}{tail}").json()
    assert (again["state"], again["finish_reason"]) == ("done", "cancelled")


def test_a_session_manager_that_stops_leaves_jobs_running(rig: Rig, http_backend: Backend) -> None:
    dying = http_backend.rig(drain_s=0)
    stream = read_until_first_event(dying, request("slow 40"))
    first = next(stream)
    dying.stop()
    with pytest.raises(httpx.RemoteProtocolError):
        list(stream)
    rest = httpx.get(f"{rig.url}/v1/jobs/{first['id']}/events?after=1", timeout=20)
    assert [text for _, text in texts(rest.content)] == [*(f"w{i} " for i in range(1, 40)), ""]


def test_a_session_manager_that_stops_before_the_first_token_says_that_the_job_goes_on(
    rig: Rig, http_backend: Backend
) -> None:
    dying = http_backend.rig(drain_s=0)
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(dying.url + "/v1/chat/completions", json=request("slow 40")))
    )
    asking.start()
    until(lambda: dying.service.streams, "the job was taken")
    dying.stop()
    asking.join()
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "server_stopping"
    job_id = answers[0].json()["error"]["message"].split()[-1].rstrip(".")
    status = until(lambda: (s := state(rig, job_id))["state"] == "done" and s, "the job ended")
    assert status["finish_reason"] == "stop"


def first_tokens(rig: Rig) -> float:
    """How many times to a first token were measured."""
    return rig.service.metrics.registry.get_sample_value("axon_session_manager_ttft_seconds_count") or 0.0


def test_the_same_idempotency_key_gives_the_same_job(rig: Rig) -> None:
    body, key = request("count 2"), {"idempotency-key": f"same {time.time_ns()}".replace(" ", "-")}
    one = httpx.post(rig.url + "/v1/chat/completions", json=body, headers=key).json()
    counted = first_tokens(rig)
    two = httpx.post(rig.url + "/v1/chat/completions", json=body, headers=key).json()
    assert one == two
    assert first_tokens(rig) == counted > 0, "who asks again does not wait for a first token"
    reordered = dict(reversed(body.items()))
    assert httpx.post(rig.url + "/v1/chat/completions", json=reordered, headers=key).json() == one


def test_an_idempotency_key_is_forgotten_no_later_than_its_job(rig: Rig, http_backend: Backend) -> None:
    if http_backend.redis is None:
        pytest.skip("looks at what expires in Redis")
    key = {"idempotency-key": f"expires-{time.time_ns()}"}
    job_id = httpx.post(rig.url + "/v1/chat/completions", json=request("count 2"), headers=key).json()["id"]
    client = redis.Redis.from_url(http_backend.redis.url())
    bound = next(name for name in client.scan_iter("axon:idem:*") if job_id.encode() in client.get(name))  # type: ignore[operator]
    [job] = client.scan_iter(f"axon:{{*}}:job:{job_id}")
    [log] = client.scan_iter(f"axon:{{*}}:tok:{job_id}")
    at = {name: client.execute_command("PEXPIRETIME", name) for name in (bound, job, log)}  # type: ignore[no-untyped-call]
    client.close()
    # Else a repeated request would find the key and no job, and run again what has run already. At most two seconds
    # early: what is kept can be had again.
    assert 0 <= at[job] - at[bound] < 2000
    assert at[log] >= at[bound]


def test_the_same_idempotency_key_with_another_body_is_a_conflict(rig: Rig) -> None:
    key = {"idempotency-key": f"other-{time.time_ns()}"}
    assert httpx.post(rig.url + "/v1/chat/completions", json=request("count 2"), headers=key).is_success
    refused = httpx.post(rig.url + "/v1/chat/completions", json=request("count 3"), headers=key)
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "idempotency_conflict"


def test_requests_with_one_idempotency_key_at_once_make_one_job(rig: Rig) -> None:
    body, key = request("slow 10"), {"idempotency-key": f"at-once-{time.time_ns()}"}
    answers: list[Any] = []

    def ask() -> None:
        answers.append(httpx.post(rig.url + "/v1/chat/completions", json=body, headers=key, timeout=20).json())

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer["id"] for answer in answers}) == 1
    assert {answer["choices"][0]["message"]["content"] for answer in answers} == {"".join(f"w{i} " for i in range(10))}


def test_a_client_with_an_idempotency_key_may_come_back(rig: Rig) -> None:
    body, key = request("slow 10", stream=True), {"idempotency-key": f"back-{time.time_ns()}"}
    with httpx.stream("POST", rig.url + "/v1/chat/completions", json=body, headers=key) as response:
        next(response.iter_lines())
    again = httpx.post(rig.url + "/v1/chat/completions", json=body, headers=key, timeout=20)
    assert [text for _, text in texts(again.content)] == [*(f"w{i} " for i in range(10)), ""]


@pytest.mark.parametrize(
    ("error", "code"), [(QueueFull("full"), "queue_full"), (QueueUnavailable("away"), "queue_unavailable")]
)
def test_a_queue_that_takes_nothing_is_a_503_and_a_retry_with_the_same_key_is_a_new_job(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    submitted = []

    async def refuse(job: Any) -> None:
        submitted.append(job.ref)
        raise error

    key = {"idempotency-key": f"full-{time.time_ns()}"}
    with monkeypatch.context() as patch:
        patch.setattr(rig.service.queue, "publish", refuse)
        refused = httpx.post(rig.url + "/v1/chat/completions", json=request("count 2"), headers=key)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == code
    assert int(refused.headers["retry-after"]) >= 1
    status = rig.ask(rig.service.store.status(submitted[0]))
    assert status.terminal is not None
    assert status.terminal.finish_reason == "cancelled"
    again = httpx.post(rig.url + "/v1/chat/completions", json=request("count 2"), headers=key)
    assert again.status_code == 200
    assert again.json()["id"] != submitted[0].job_id


def test_retry_after_is_the_time_the_queue_needs_at_the_measured_rate(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def depth(model: str) -> int:
        return 96

    async def full(job: Any) -> None:
        raise QueueFull("full")

    monkeypatch.setattr(rig.service.queue, "depth", depth)
    monkeypatch.setattr(rig.service.queue, "publish", full)
    rig.service.capacity._depths.clear()
    refused = httpx.post(rig.url + "/v1/chat/completions", json=request("count 2"))
    rig.service.capacity._depths.clear()
    # Four slots at half a second a job serve eight jobs a second: 96 jobs take 12 s.
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "12")


def test_a_queue_longer_than_a_jobs_deadline_is_refused_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def depth(model: str) -> int:
        return 100_000

    monkeypatch.setattr(rig.service.queue, "depth", depth)
    rig.service.capacity._depths.clear()
    refused = httpx.post(rig.url + "/v1/chat/completions", json=request("count 2"))
    rig.service.capacity._depths.clear()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")


def test_a_job_that_was_stored_though_the_store_did_not_say_so_is_cancelled(
    http_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlucky = http_backend.rig()
    try:
        store, stored = unlucky.service.store, []
        submit = store.submit

        async def submit_unheard(job: Job) -> bool:
            await submit(job)
            stored.append(job)
            raise StoreUnavailable("no reply")

        monkeypatch.setattr(store, "submit", submit_unheard)
        body = request("hold", session_id=f"s-{uuid.uuid4().hex[:8]}")
        assert httpx.post(unlucky.url + "/v1/chat/completions", json=body).status_code == 503
        [job] = stored
        until(lambda: unlucky.ask(store.status(job.ref)).state == "done", "it was cancelled")
        key = {"idempotency-key": uuid.uuid4().hex}
        body = request("count 2")
        assert httpx.post(unlucky.url + "/v1/chat/completions", json=body, headers=key).status_code == 503
        monkeypatch.undo()
        job = stored[-1]
        unlucky.ask(unlucky.service.queue.publish(job))
        answer = httpx.post(unlucky.url + "/v1/chat/completions", json=body, headers=key).json()
        assert (answer["id"], answer["choices"][0]["finish_reason"]) == (job.job_id, "stop")
    finally:
        unlucky.stop()


def test_many_requests_at_once_get_no_more_places_than_there_are(
    http_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = http_backend.rig(max_streams=2)
    try:
        publish = small.service.queue.publish
        statuses: list[int] = []

        async def when_the_others_are_refused(job: Job) -> None:
            while len(statuses) < 6:
                await asyncio.sleep(0.01)
            await publish(job)

        monkeypatch.setattr(small.service.queue, "publish", when_the_others_are_refused)

        def ask(_: int) -> None:
            answer = httpx.post(small.url + "/v1/chat/completions", json=request("count 1"), timeout=20)
            statuses.append(answer.status_code)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(8)))
        assert statuses == [503] * 6 + [200] * 2
        until(lambda: small.service.streams == 0, "all places are left")
    finally:
        small.stop()


@pytest.mark.parametrize(
    ("limit", "status", "code"),
    [
        ({"max_streams": 1}, 503, "service_unavailable"),
        ({"max_streams_per_tenant": 1}, 429, "too_many_open_requests"),
    ],
)
def test_more_answers_at_once_than_the_limit_are_refused(
    http_backend: Backend, limit: dict[str, int], status: int, code: str
) -> None:
    small = http_backend.rig(**limit)
    try:
        stream = read_until_first_event(small, request("first then hold"))
        next(stream)
        refused = httpx.post(small.url + "/v1/chat/completions", json=request("count 1"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
        assert "retry-after" in refused.headers
        stream.close()  # type: ignore[attr-defined]
    finally:
        small.stop()
