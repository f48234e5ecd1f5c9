"""Every bad input of the reliability page: the status, OpenAI's error shape, nothing enqueued, nothing crashed."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from axon_llm.serving.embedded import EmbeddedStore
from axon_llm.serving.ports import Emit
from axon_llm.serving.wire import LogEntry, Terminal
from tests.integration.backends import make_job
from tests.integration.http_rig import Backend, Rig, embedded_backend
from tests.integration.scripted_worker import CONTEXT, MODEL
from tests.integration.servers import wait_until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "count 1"}]}
JSON = {"content-type": "application/json"}


def chat(**changes: Any) -> bytes:
    """A good request with changes; ``nan`` and friends go out as Python writes them."""
    return json.dumps({**CHAT, **changes}).encode()


def raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


GOOD_TAIL = ', "messages": [{"role": "user", "content": "hi"}]}'


def message(content: str) -> bytes:
    """A request around a message's content as it stands, escapes and all."""
    return raw(f'{{"model": "axon-tiny", "messages": [{{"role": "user", "content": "{content}"}}]}}')


def long_number(digits: int) -> bytes:
    return raw('{"max_tokens": ' + "9" * digits + ', "model": "axon-tiny"' + GOOD_TAIL)


def with_content(content: Any) -> bytes:
    return chat(messages=[{"role": "user", "content": content}])


BAD_BODIES: dict[str, tuple[bytes, int, str]] = {
    "truncated": (chat()[:-5], 400, "invalid_json"),
    "empty": (b"", 400, "invalid_json"),
    "blank": (b" \n", 400, "invalid_json"),
    "array": (b"[1]", 400, "invalid_json"),
    "string": (b'"x"', 400, "invalid_json"),
    "null": (b"null", 400, "invalid_json"),
    "deep": (b"[" * 50_000, 400, "invalid_json"),
    "deep object": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 400, "invalid_json"),
    "duplicate keys": (raw('{"model": "a", "model": "axon-tiny"' + GOOD_TAIL), 400, "invalid_json"),
    "duplicate nested keys": (chat()[:-3] + b', "role": "user"}]}', 400, "invalid_json"),
    "invalid utf-8": (chat()[:-6] + b'\xff"}]}', 400, "invalid_json"),
    "utf-16": (chat().decode().encode("utf-16"), 400, "invalid_json"),
    "lone surrogate": (message("\\ud800"), 400, "invalid_json"),
    "lone surrogate, encoded": (message("\udfff"), 400, "invalid_json"),
    "two objects": (chat() + chat(), 400, "invalid_json"),
    "65 KB": (with_content("x" * 66_000), 413, "request_too_large"),
    "max_tokens 0": (chat(max_tokens=0), 400, "invalid_value"),
    "max_tokens -1": (chat(max_tokens=-1), 400, "invalid_value"),
    "max_tokens 10^9": (chat(max_tokens=10**9), 400, "invalid_value"),
    "max_tokens string": (chat(max_tokens="5"), 400, "invalid_value"),
    "max_tokens true": (chat(max_tokens=True), 400, "invalid_value"),
    "max_tokens 1.5": (chat(max_tokens=1.5), 400, "invalid_value"),
    "max_tokens of 5000 digits": (long_number(5000), 400, "invalid_json"),
    "max_completion_tokens 0": (chat(max_completion_tokens=0), 400, "invalid_value"),
    "temperature NaN": (chat(temperature=float("nan")), 400, "invalid_json"),
    "temperature Infinity": (chat(temperature=float("inf")), 400, "invalid_json"),
    "temperature 1e999": (raw('{"temperature": 1e999, "model": "axon-tiny"' + GOOD_TAIL), 400, "invalid_json"),
    "temperature -1": (chat(temperature=-1), 400, "invalid_value"),
    "temperature 1e308": (chat(temperature=1e308), 400, "invalid_value"),
    "top_p 0": (chat(top_p=0), 400, "invalid_value"),
    "top_p 1.1": (chat(top_p=1.1), 400, "invalid_value"),
    "top_k 2^31": (chat(top_k=2**31), 400, "invalid_value"),
    "min_p 2": (chat(min_p=2), 400, "invalid_value"),
    "seed -2^63 - 1": (chat(seed=-(2**63) - 1), 400, "invalid_value"),
    "seed 2^63": (chat(seed=2**63), 400, "invalid_value"),
    "10^4 stop strings": (chat(stop=["a"] * 10_000), 400, "invalid_value"),
    "empty stop string": (chat(stop=""), 400, "invalid_value"),
    "empty stop string in a list": (chat(stop=["a", ""]), 400, "invalid_value"),
    "logit_bias outside the vocabulary": (chat(logit_bias={"1000": 1}), 400, "invalid_value"),
    "logit_bias not a token": (chat(logit_bias={"x": 1}), 400, "invalid_value"),
    "max_tokens over the context": (chat(max_tokens=CONTEXT), 400, "context_length_exceeded"),
    "prompt over the context": (with_content("fail 400 context_length_exceeded"), 400, "context_length_exceeded"),
    "no messages": (json.dumps({"model": MODEL}).encode(), 400, "missing_required_parameter"),
    "empty messages": (chat(messages=[]), 400, "invalid_value"),
    "unknown role": (chat(messages=[{"role": "wizard", "content": "x"}]), 400, "invalid_value"),
    "an image": (with_content([{"type": "image_url", "image_url": {}}]), 400, "invalid_value"),
    "no model": (json.dumps({"messages": CHAT["messages"]}).encode(), 400, "missing_required_parameter"),
    "model ../../etc": (chat(model="../../etc/passwd"), 404, "model_not_found"),
    "model absolute": (chat(model="/etc/passwd"), 404, "model_not_found"),
    "model percent-encoded": (chat(model="%2e%2e%2fetc"), 404, "model_not_found"),
    "model unknown": (chat(model="gpt-17"), 404, "model_not_found"),
    "session id with braces": (chat(session_id="a{b}"), 400, "invalid_value"),
    "session id with CR LF": (chat(session_id="a\r\nX: y"), 400, "invalid_value"),
    "session id with a final LF": (chat(session_id="a\n"), 400, "invalid_value"),
    "session id with NUL": (chat(session_id="a\x00"), 400, "invalid_value"),
    "session id of 10 KB": (chat(session_id="a" * 10_240), 400, "invalid_value"),
    "session id empty": (chat(session_id=""), 400, "invalid_value"),
    "unknown parameter": (chat(temprature=1), 400, "unknown_parameter"),
    "tools": (chat(tools=[{"type": "function"}]), 400, "unsupported_parameter"),
    "two choices": (chat(n=2), 400, "unsupported_parameter"),
}  # fmt: skip

BAD_HEADERS: dict[str, tuple[dict[str, str], bytes, int, str]] = {
    "text/plain": ({"content-type": "text/plain"}, chat(), 415, "unsupported_media_type"),
    "no content type": ({"content-type": ""}, chat(), 415, "unsupported_media_type"),
    "another charset": ({"content-type": "application/json; charset=latin-1"}, chat(), 415, "unsupported_media_type"),
    "gzip bomb": ({**JSON, "content-encoding": "gzip"}, gzip.compress(b" " * 10**7), 415, "unsupported_media_type"),
    "session header with braces": ({**JSON, "x-session-id": "a{b}"}, chat(), 400, "invalid_value"),
    "two sessions": ({**JSON, "x-session-id": "one"}, chat(session_id="two"), 400, "invalid_value"),
    "idempotency key of 10 KB": ({**JSON, "idempotency-key": "k" * 10_240}, chat(), 400, "invalid_idempotency_key"),
}


def assert_refused(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


def jobs_so_far(rig: Rig) -> float:
    """Jobs this session manager has put into the queue; whatever was refused must leave it as it was."""
    value = rig.service.metrics.registry.get_sample_value("axon_jobs_submitted_total")
    assert value is not None
    return value


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_refused(rig: Rig, name: str) -> None:
    body, status, code = BAD_BODIES[name]
    before = jobs_so_far(rig)
    assert_refused(httpx.post(rig.url + "/v1/chat/completions", content=body, headers=JSON), status, code)
    # Whether a text's tokens fit is known to the worker alone: the one refusal that comes by way of the queue.
    assert jobs_so_far(rig) == before + (name == "prompt over the context")


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_refused(rig: Rig, name: str) -> None:
    headers, body, status, code = BAD_HEADERS[name]
    before = jobs_so_far(rig)
    assert_refused(httpx.post(rig.url + "/v1/chat/completions", content=body, headers=headers), status, code)
    assert jobs_so_far(rig) == before


@pytest.mark.parametrize("prompt", ["", [], [-1], [True], [1, "a"], ["a", "b"], None, 5, [10**9], [[1]]])
def test_a_bad_prompt_is_refused(rig: Rig, prompt: Any) -> None:
    response = httpx.post(rig.url + "/v1/completions", json={"model": MODEL, "prompt": prompt})
    assert_refused(response, 400, "invalid_value")


@pytest.mark.parametrize("after", ["-1", "abc", "", "1.0", "١", "99", "9" * 400, "1&after=1"])
def test_a_bad_resume_point_is_refused(rig: Rig, after: str) -> None:
    job_id = httpx.post(rig.url + "/v1/chat/completions", json=CHAT).json()["id"]
    assert_refused(httpx.get(f"{rig.url}/v1/jobs/{job_id}/events?after={after}"), 400, "invalid_value")


@pytest.mark.parametrize("path", ["/v1/jobs/none", "/v1/jobs/none/events", "/v1/jobs/..%2f..%2fetc", "/v1/jobs/a{b}"])
def test_an_unknown_job_is_not_found(rig: Rig, path: str) -> None:
    assert httpx.get(rig.url + path).status_code == 404


@pytest.mark.parametrize("session_id", ["a%7Bb%7D", "a%0D%0Ab", "a%00", "%2e%2e", "a" * 10_240])
def test_a_bad_session_id_in_a_path_is_refused(rig: Rig, session_id: str) -> None:
    assert_refused(httpx.get(f"{rig.url}/v1/sessions/{session_id}"), 400, "invalid_value")


def test_an_unknown_path_and_a_wrong_method_have_the_error_shape_too(rig: Rig) -> None:
    assert_refused(httpx.get(rig.url + "/v2/nothing"), 404, "unknown_path")
    wrong = httpx.get(rig.url + "/v1/chat/completions")
    assert_refused(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


def exchange(rig: Rig, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Sends raw bytes and returns all that comes back until the server closes."""
    address = urlsplit(rig.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause_s)
        except OSError:
            pass  # the server has closed; what it said before that counts
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(65536):
                answer += data
    return answer


def head(*lines: str) -> bytes:
    return "\r\n".join(("POST /v1/chat/completions HTTP/1.1", "host: x", "connection: close", *lines, "", "")).encode()


BODY = chat()

BAD_HTTP: dict[str, tuple[bytes, bytes]] = {
    "a 40 KB header": (head("x-a: " + "y" * 40_960), b"400"),
    "a folded header": (
        head("x-a: one", "  two", f"content-length: {len(BODY)}", "content-type: application/json") + BODY,
        b"400",
    ),
    "length and chunks": (
        head(f"content-length: {len(BODY)}", "transfer-encoding: chunked", "content-type: application/json")
        + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
        b"400",
    ),
    "two lengths": (head("content-length: 1", "content-length: 2", "content-type: application/json") + b"{}", b"400"),
    "a negative length": (head("content-length: -1", "content-type: application/json"), b"400"),
    "no HTTP at all": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"400"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HTTP)
def test_bad_http_is_refused(rig: Rig, name: str) -> None:
    request, status = BAD_HTTP[name]
    answer = exchange(rig, request)
    assert answer.split(b" ")[1] == status, answer[:200]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_client_that_never_ends_its_head_is_closed(http_backend: Backend) -> None:
    slow = http_backend.rig(header_timeout_s=0.5)
    try:
        assert exchange(slow, b"POST / HTTP/1.1\r\n", b"a: b\r\n", b"c: d\r\n", pause_s=0.2) == b""
    finally:
        slow.stop()


def test_a_body_that_never_ends_is_refused_in_time(http_backend: Backend) -> None:
    slow = http_backend.rig(body_timeout_s=0.5)
    try:
        answer = exchange(
            slow, head("content-length: 100", "content-type: application/json"), b"{", b'"a"', pause_s=0.1
        )
        assert answer.split(b" ")[1] == b"408"
    finally:
        slow.stop()


def test_a_connection_whose_body_was_not_wanted_is_closed(rig: Rig) -> None:
    request = head("content-length: 100").replace(b"connection: close\r\n", b"")
    answer = exchange(rig, request, b"x", pause_s=0.2)
    assert answer.split(b" ")[1] == b"415"
    assert b"connection: close" in answer.lower()


@contextlib.contextmanager
def connected_to_long_answer(rig: Rig, entries: int, length: int) -> Iterator[socket.socket]:
    """A connection with little room, which has asked for the events of a job of as many entries of so many bytes."""
    store, job = rig.service.store, make_job(tenant="default")
    assert isinstance(store, EmbeddedStore)
    rig.ask(store.submit(job))
    writer = store.worker_side()
    stop = Terminal(finish_reason="stop")
    long = [LogEntry(seq=seq, token=1, text="x" * length) for seq in range(1, entries + 1)]
    long[-1] = long[-1].model_copy(update={"terminal": stop})
    writer.emit([Emit(job.ref, writer.claim(job, "w1").fence, tuple(long))])
    address = urlsplit(rig.url)
    with socket.socket() as connection:
        connection.settimeout(20)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((address.hostname, address.port))
        connection.sendall(f"GET /v1/jobs/{job.job_id}/events HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        yield connection


def test_a_client_that_takes_nothing_is_cut_off() -> None:
    impatient = embedded_backend().rig(send_timeout_s=0.5)
    try:
        connections = impatient._server.server_state.connections
        with connected_to_long_answer(impatient, 1000, 20_000):
            wait_until(lambda: len(connections) == 1, 5, "it is there")
            wait_until(lambda: not connections, 10, "it was cut off")
    finally:
        impatient.stop()


def test_a_client_that_is_slow_and_does_not_stand_still_gets_everything() -> None:
    impatient = embedded_backend().rig(send_timeout_s=0.5)
    try:
        with connected_to_long_answer(impatient, 1, 8_000_000) as connection:
            began, answer = time.monotonic(), b""
            while not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                data = connection.recv(65_536)
                assert data, f"cut off after {len(answer):,} bytes"
                answer += data
                time.sleep(0.0002 * len(data) / 1000)
            assert answer.count(b"x") >= 8_000_000
            assert time.monotonic() - began > 1.0
    finally:
        impatient.stop()


def test_made_up_methods_are_counted_as_one(rig: Rig) -> None:
    for number in range(20):
        assert httpx.request(f"M{number}", rig.url + "/health").status_code == 405
    counted = {
        sample.labels["method"]
        for metric in rig.service.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "axon_http_requests_total" and sample.labels["route"] == "/health"
    }
    assert "-" in counted
    assert counted <= {"GET", "-"}


def test_the_server_is_unimpressed_by_all_of_the_above(rig: Rig) -> None:
    assert httpx.post(rig.url + "/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"] == "w0 "
