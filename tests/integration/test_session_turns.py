"""Sessions: history kept by the server, one turn at a time, a tenant's own."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import openai
import pytest

from tests.integration.http_rig import Rig
from tests.integration.scripted_worker import MODEL
from tests.integration.test_http_jobs import read_until_first_event, request, until


@pytest.fixture
def session_id() -> str:
    return f"s-{time.time_ns()}"


def turn(client: openai.OpenAI, session_id: str, text: str, **more: Any) -> str:
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text}], extra_body={"session_id": session_id}, **more
    )
    return answer.choices[0].message.content or ""


def test_the_fifth_turn_knows_the_first(rig: Rig, session_id: str) -> None:
    client = rig.client()
    answers = [turn(client, session_id, "the code is 7 4 1"), *(turn(client, session_id, "count 2") for _ in range(3))]
    assert turn(client, session_id, "repeat") == "the code is 7 4 1 "
    history = httpx.get(f"{rig.url}/v1/sessions/{session_id}").json()
    assert [entry["turn"] for entry in history["turns"]] == [0, 1, 2, 3, 4]
    first = history["turns"][0]["messages"]
    assert [message["role"] for message in first] == ["user", "assistant"]
    assert first[1]["content"] == answers[0]


def test_a_session_answers_as_the_same_conversation_sent_whole(rig: Rig, session_id: str) -> None:
    client = rig.client()
    first = turn(client, session_id, "hello")
    second = turn(client, session_id, "and now?")
    whole = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "and now?"},
        ],
    )
    assert whole.choices[0].message.content == second


def test_a_session_may_be_named_in_a_header(rig: Rig, session_id: str) -> None:
    headers = {"x-session-id": session_id}
    for _ in range(2):
        assert httpx.post(rig.url + "/v1/chat/completions", json=request("count 1"), headers=headers).is_success
    both = httpx.post(rig.url + "/v1/chat/completions", json=request("count 1", session_id=session_id), headers=headers)
    assert both.is_success
    assert len(httpx.get(f"{rig.url}/v1/sessions/{session_id}").json()["turns"]) == 3


def test_a_second_turn_at_once_is_a_conflict(rig: Rig, session_id: str) -> None:
    stream = read_until_first_event(rig, request("first then hold", session_id=session_id))
    next(stream)
    with pytest.raises(openai.ConflictError) as caught:
        turn(rig.client(), session_id, "count 1")
    assert caught.value.code == "session_conflict"
    assert httpx.delete(f"{rig.url}/v1/sessions/{session_id}").status_code == 409
    stream.close()  # type: ignore[attr-defined]
    until(
        lambda: httpx.post(rig.url + "/v1/chat/completions", json=request("count 1", session_id=session_id)).is_success,
        "the session became free",
    )


def test_of_many_first_turns_at_once_exactly_one_is_taken(rig: Rig, session_id: str) -> None:
    statuses: list[int] = []

    def ask() -> None:
        response = httpx.post(
            rig.url + "/v1/chat/completions", json=request("slow 10", session_id=session_id), timeout=20
        )
        statuses.append(response.status_code)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [409] * 5


def test_a_cancelled_turn_leaves_no_trace_in_the_history(rig: Rig, session_id: str) -> None:
    turn(rig.client(), session_id, "count 1")
    stream = read_until_first_event(rig, request("first then hold", session_id=session_id))
    first = next(stream)
    httpx.post(f"{rig.url}/v1/jobs/{first['id']}/cancel")
    list(stream)
    assert len(httpx.get(f"{rig.url}/v1/sessions/{session_id}").json()["turns"]) == 1


def test_a_deleted_session_is_gone_and_may_begin_again(rig: Rig, session_id: str) -> None:
    address = f"{rig.url}/v1/sessions/{session_id}"
    assert httpx.get(address).status_code == 404
    assert httpx.delete(address).status_code == 404
    turn(rig.client(), session_id, "count 1")
    assert httpx.delete(address).json() == {"id": session_id, "object": "session.deleted", "deleted": True}
    assert httpx.get(address).status_code == 404
    turn(rig.client(), session_id, "count 1")
    assert len(httpx.get(address).json()["turns"]) == 1


def test_a_text_completion_has_no_session(rig: Rig, session_id: str) -> None:
    with pytest.raises(openai.BadRequestError):
        rig.client().completions.create(model=MODEL, prompt="x", extra_body={"session_id": session_id})
