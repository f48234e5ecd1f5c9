"""nginx as shipped, in front of a session manager: keys, tenants, rates, limits, streams."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.integration.gateway_rig import SECRET, Front
from tests.integration.http_rig import Rig, real_backend
from tests.integration.scripted_worker import MODEL
from tests.integration.servers import RabbitServer, RedisServer, free_port
from tests.integration.test_http_bad_input import BAD_BODIES, BAD_HEADERS, BAD_HTTP, CHAT, JSON, exchange, head
from tests.integration.test_http_jobs import request, until
from tests.needs import need

CHATS = "/v1/chat/completions"
ROOT = Path(__file__).resolve().parents[2]


PROBES = free_port()


@pytest.fixture(scope="module")
def front(real_servers: tuple[RedisServer, RabbitServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    need("nginx", "openssl")
    backend = real_backend(*real_servers, trust="gateway", gateway_secret=SECRET)
    worker = backend.make_worker()
    worker.start()
    running = Front(
        tmp_path_factory.mktemp("gateway"), backend, slow_client_s=1, probes=f"127.0.0.1:{PROBES}", processes="2"
    )
    yield running
    running.stop()
    worker.stop()


@pytest.fixture(scope="module")
def acme(front: Front) -> dict[str, str]:
    return front.headers("acme")


@pytest.fixture(scope="module")
def rival(front: Front) -> dict[str, str]:
    return front.headers("rival")


def address(front: Front) -> Any:
    """What ``exchange`` needs of a rig."""
    return type("Address", (), {"url": front.url})()


# ------------------------------------------------------------------------------------------------------------ keys


def test_a_request_with_a_key_is_answered(front: Front, acme: dict[str, str]) -> None:
    client = openai.OpenAI(base_url=front.url + "/v1", api_key=acme["authorization"].split()[1], max_retries=0)
    assert [model.id for model in client.models.list()] == [MODEL]
    answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "count 2"}])
    assert answer.choices[0].message.content == "w0 w1 "
    stream = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "count 2"}], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "w0 w1 "
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


BAD_KEYS = {
    "none": {},
    "empty": {"authorization": ""},
    "another scheme": {"authorization": "Basic YTpi"},
    "malformed": {"authorization": "Bearer sk-something"},
    "unknown": {"authorization": f"Bearer axk_{'0' * 16}_{'x' * 43}"},
    "of 5 KB": {"authorization": "Bearer axk_" + "y" * 5000},
    "with NUL": {"authorization": "Bearer axk_\x01"},
}


@pytest.mark.parametrize("name", BAD_KEYS)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/jobs/x", CHATS])
def test_a_bad_key_is_a_401_in_the_error_shape(front: Front, name: str, path: str) -> None:
    response = httpx.request("POST" if path == CHATS else "GET", front.url + path, headers=BAD_KEYS[name])
    if name == "with NUL":  # a control character is no header at all
        assert response.status_code in (400, 401)
        return
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_wrong_secret_with_a_known_id_is_a_401(front: Front) -> None:
    key = front.key("acme")
    wrong = key[:-1] + ("A" if key[-1] != "A" else "B")
    assert httpx.get(front.url + "/v1/models", headers={"authorization": f"Bearer {wrong}"}).status_code == 401


def test_the_client_raises_its_authentication_error(front: Front) -> None:
    client = openai.OpenAI(base_url=front.url + "/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_revoked_key_is_refused_from_the_next_request_on(front: Front) -> None:
    key = front.key("acme")
    headers = {"authorization": f"Bearer {key}"}
    assert httpx.get(front.url + "/v1/models", headers=headers).status_code == 200
    assert front.rigs[0].ask(front.keys.revoke(key.split("_")[1])) is True
    assert httpx.get(front.url + "/v1/models", headers=headers).status_code == 401


def test_two_keys_at_once_are_refused(front: Front, acme: dict[str, str], rival: dict[str, str]) -> None:
    both = f"{acme['authorization']}, {rival['authorization']}"
    assert httpx.get(front.url + "/v1/models", headers={"authorization": both}).status_code == 401
    twice = [("authorization", acme["authorization"]), ("authorization", rival["authorization"])]
    # nginx takes the same header twice for a malformed request and answers before asking anybody.
    assert httpx.get(front.url + "/v1/models", headers=twice).status_code == 400
    direct = [*twice, ("x-axon-gateway-secret", SECRET)]
    assert httpx.get(front.rigs[0].url + "/internal/auth", headers=direct).status_code == 401


# --------------------------------------------------------------------------------------------------------- tenants


def test_a_tenant_header_from_outside_changes_nothing(
    front: Front, acme: dict[str, str], rival: dict[str, str]
) -> None:
    spoof = {"x-axon-tenant": "rival", "X_Axon_Tenant": "rival", "x-axon-gateway-secret": "guess"}
    job_id = httpx.post(front.url + CHATS, json=CHAT, headers={**acme, **spoof}).json()["id"]
    assert httpx.get(f"{front.url}/v1/jobs/{job_id}", headers=acme).status_code == 200
    assert httpx.get(f"{front.url}/v1/jobs/{job_id}", headers=rival).status_code == 404


def test_the_session_manager_believes_nobody_without_the_gateways_secret(front: Front) -> None:
    direct = front.rigs[0].url
    for headers in ({}, {"x-axon-tenant": "acme"}, {"x-axon-tenant": "acme", "x-axon-gateway-secret": "guess"}):
        assert httpx.get(direct + "/v1/models", headers=headers).status_code == 401
        assert httpx.get(direct + "/internal/auth", headers=headers).status_code == 401


def ask_raw(front: Front, path: str, *lines: str, method: str = "GET", version: str = "HTTP/1.1") -> tuple[int, Any]:
    """Status and JSON body of a request whose path nobody tidies up on its way."""
    asked = "\r\n".join((f"{method} {path} {version}", "host: x", "connection: close", *lines, "", ""))
    answer_head, _, body = exchange(address(front), asked.encode()).partition(b"\r\n\r\n")
    assert b"content-type: application/json" in answer_head.lower()
    return int(answer_head.split(b" ")[1]), json.loads(body)


@pytest.mark.parametrize("path", ["/internal/auth", "/_auth", "/ready", "/_error/bad_request", "/metrics"])
def test_what_is_internal_cannot_be_reached_from_outside(front: Front, path: str) -> None:
    assert ask_raw(front, path)[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../internal/auth",
        "/internal/auth/../../v1/models",
        "/v1/%2e%2E/v1/models",
        "/internal%2f..%2fv1/models",
        "/v1/sessions/..",
        "/v1/sessions/..#x",
        "/v1/sessions/.%2e?x=1",
        "/x/../health",
        "/..",
    ],
)
def test_a_path_that_climbs_is_refused(front: Front, acme: dict[str, str], path: str) -> None:
    status, answer = ask_raw(front, path, f"authorization: {acme['authorization']}")
    assert (status, answer["error"]["code"]) == (400, "bad_request")


def test_dots_elsewhere_in_a_request_are_no_climbing(front: Front, acme: dict[str, str]) -> None:
    for path in ("/v1/jobs/a..b", "/v1/jobs/...", "/v1/jobs/x?next=/../y"):
        status, answer = ask_raw(front, path, f"authorization: {acme['authorization']}")
        assert (status, answer["error"]["code"]) == (404, "job_not_found")


@pytest.mark.parametrize(
    ("line", "version", "status", "code"),
    [
        ("transfer-encoding: xchunked", "HTTP/1.1", 501, "not_implemented"),
        ("accept: */*", "HTTP/3.0", 505, "http_version_not_supported"),
    ],
)
def test_what_nginx_does_not_speak_is_refused_in_the_error_shape(
    front: Front, acme: dict[str, str], line: str, version: str, status: int, code: str
) -> None:
    credentials = f"authorization: {acme['authorization']}"
    answered, answer = ask_raw(front, CHATS, credentials, line, method="POST", version=version)
    assert (answered, answer["error"]["code"]) == (status, code)


@pytest.mark.parametrize(("method", "tail"), [("GET", ""), ("GET", "/events"), ("DELETE", ""), ("POST", "/cancel")])
def test_another_tenants_job_does_not_exist(
    front: Front, acme: dict[str, str], rival: dict[str, str], method: str, tail: str
) -> None:
    job_id = httpx.post(front.url + CHATS, json=CHAT, headers=acme).json()["id"]
    response = httpx.request(method, f"{front.url}/v1/jobs/{job_id}{tail}", headers=rival)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "job_not_found"


def test_another_tenants_session_does_not_exist_and_its_name_is_free(
    front: Front, acme: dict[str, str], rival: dict[str, str]
) -> None:
    session_id = f"shared-{time.time_ns()}"
    address = f"{front.url}/v1/sessions/{session_id}"
    for text in ("one", "two"):
        assert httpx.post(front.url + CHATS, json=request(text, session_id=session_id), headers=acme).is_success
    assert httpx.get(address, headers=rival).status_code == 404
    assert httpx.delete(address, headers=rival).status_code == 404
    assert httpx.post(front.url + CHATS, json=request("three", session_id=session_id), headers=rival).is_success
    assert len(httpx.get(address, headers=acme).json()["turns"]) == 2
    assert len(httpx.get(address, headers=rival).json()["turns"]) == 1


def test_another_tenants_idempotency_key_is_another_key(
    front: Front, acme: dict[str, str], rival: dict[str, str]
) -> None:
    key = {"idempotency-key": f"shared-{time.time_ns()}"}
    one = httpx.post(front.url + CHATS, json=CHAT, headers=acme | key).json()["id"]
    assert httpx.post(front.url + CHATS, json=CHAT, headers=rival | key).json()["id"] != one
    assert httpx.post(front.url + CHATS, json=CHAT, headers=acme | key).json()["id"] == one


# ----------------------------------------------------------------------------------------------------------- rates


def test_a_tenant_over_its_rate_gets_a_429_with_the_time_to_wait_and_others_do_not(
    front: Front, rival: dict[str, str]
) -> None:
    key = front.key("busy", rate_per_minute=6)
    headers = {"authorization": f"Bearer {key}"}
    statuses = [httpx.get(front.url + "/v1/models", headers=headers).status_code for _ in range(3)]
    assert statuses == [200, 429, 429]  # ten seconds' worth of its rate may come at once, which is one
    refused = httpx.get(front.url + "/v1/models", headers=headers)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 10  # one request every ten seconds
    client = openai.OpenAI(base_url=front.url + "/v1", api_key=key, max_retries=0)
    with pytest.raises(openai.RateLimitError):
        client.models.list()
    assert httpx.get(front.url + "/v1/models", headers=rival).status_code == 200


def test_an_address_that_asks_too_much_is_refused_before_anybody_is_asked(front: Front, tmp_path: Path) -> None:
    alone = Front(tmp_path / "flooded", front.backend)
    try:
        alone.rigs[0].stop()  # so that no answer takes long enough for the limit to recover
        where = urlsplit(alone.url)
        with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
            ask = "GET /health HTTP/1.1\r\nhost: x\r\n"
            connection.sendall((ask + "\r\n").encode() * 799 + (ask + "connection: close\r\n\r\n").encode())
            received = b""
            while data := connection.recv(65536):
                received += data
        assert received.count(b"HTTP/1.1 503 ") >= 200  # the burst was let through, to a session manager that is dead
        assert received.count(b"HTTP/1.1 429 ") >= 100
        assert received.count(b"Too many requests from this address") == received.count(b"HTTP/1.1 429 ")
    finally:
        alone.gateway.stop()


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_refused_through_the_gateway_too(front: Front, acme: dict[str, str], name: str) -> None:
    body, status, code = BAD_BODIES[name]
    response = httpx.post(front.url + CHATS, content=body, headers=JSON | acme)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_refused_through_the_gateway_too(front: Front, acme: dict[str, str], name: str) -> None:
    headers, body, status, code = BAD_HEADERS[name]
    response = httpx.post(front.url + CHATS, content=body, headers=headers | acme)
    if name == "idempotency key of 10 KB":  # one header is larger than nginx takes
        code = "bad_request"
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("name", BAD_HTTP)
def test_bad_http_is_refused_by_the_gateway(front: Front, acme: dict[str, str], name: str) -> None:
    bad, status = BAD_HTTP[name]
    line, _, rest = bad.partition(b"\r\n")
    authorization = f"authorization: {acme['authorization']}\r\n".encode()
    answer = exchange(address(front), line + b"\r\n" + authorization + rest)
    assert answer.split(b" ")[1] == status, answer[:300]


def test_a_body_over_the_limit_is_refused_by_its_announced_length_alone(front: Front, acme: dict[str, str]) -> None:
    lines = ("content-length: 66000", "content-type: application/json", f"authorization: {acme['authorization']}")
    answer = exchange(address(front), head(*lines))
    assert answer.split(b" ")[1] == b"413"
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_too_large"


def test_a_head_that_never_ends_is_closed(front: Front) -> None:
    answer = exchange(address(front), b"GET /v1/models HTTP/1.1\r\n", *[b"a: b\r\n"] * 4, pause_s=0.4)
    assert answer == b"" or answer.split(b" ")[1] == b"408"


def test_a_body_that_never_ends_is_closed_and_reaches_nobody(front: Front, acme: dict[str, str]) -> None:
    lines = ("content-length: 100", "content-type: application/json", f"authorization: {acme['authorization']}")
    answer = exchange(address(front), head(*lines), b"{")
    assert answer == b"" or answer.split(b" ")[1] == b"408"


def assert_headers(response: httpx.Response) -> None:
    assert response.headers["server"] == "nginx"
    for name, value in (
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("referrer-policy", "no-referrer"),
        ("content-security-policy", "default-src 'none'"),
    ):
        assert response.headers.get_list(name) == [value]
    [request_id] = response.headers.get_list("x-request-id")
    assert len(request_id) == 32


def test_every_answer_carries_security_headers_an_id_and_no_version(front: Front, acme: dict[str, str]) -> None:
    slow = {"authorization": f"Bearer {front.key('slow', rate_per_minute=1)}"}
    answers = [
        httpx.get(front.url + "/v1/models", headers=acme),
        httpx.get(front.url + "/v1/jobs/unknown", headers=acme),  # an error of the session manager's
        httpx.get(front.url + "/nothing", headers=acme),
        httpx.get(front.url + "/v1/models"),
        httpx.get(front.url + "/v1/models", headers=slow),
        httpx.get(front.url + "/v1/models", headers=slow),
        httpx.get(front.url + "/v1/models", headers={**acme, "x-long": "y" * 10_000}),
        httpx.post(front.url + CHATS, content=b" " * 66_000, headers=JSON | acme),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 404, 401, 200, 429, 400, 413]
    for answer in answers:
        assert_headers(answer)


def test_one_id_joins_all_logs_and_is_not_the_clients(
    front: Front, acme: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    answer = httpx.post(front.url + CHATS, json=CHAT, headers={**acme, "x-request-id": "words-of-a-user"})
    request_id = answer.headers["x-request-id"]
    until(lambda: f"trace={request_id}" in caplog.text, "the session manager logged it")
    until(lambda: f'"id":"{request_id}"' in front.gateway.log_path.read_text(), "the gateway logged it")
    assert "words-of-a-user" not in caplog.text + front.gateway.log_path.read_text()


# --------------------------------------------------------------------------------------------------------- streams


def data_of(lines: Iterator[str]) -> Iterator[Any]:
    return (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {"))


def test_an_event_arrives_while_the_job_still_runs(front: Front, acme: dict[str, str]) -> None:
    # This job never ends by itself: were anything on the way buffering, its only event would never come.
    body = request("first then hold", stream=True)
    with httpx.stream("POST", front.url + CHATS, json=body, headers=acme, timeout=20) as response:
        events = data_of(response.iter_lines())
        job_id = next(events)["id"]
        assert httpx.get(f"{front.url}/v1/jobs/{job_id}", headers=acme).json()["state"] == "running"
    status = until(
        lambda: (s := httpx.get(f"{front.url}/v1/jobs/{job_id}", headers=acme).json())["state"] == "done" and s,
        "leaving through the gateway cancelled the job",
    )
    assert status["finish_reason"] == "cancelled"


def test_open_streams_survive_a_reload_of_the_gateway(front: Front, acme: dict[str, str]) -> None:
    body = request("slow 40", stream=True)
    with httpx.stream("POST", front.url + CHATS, json=body, headers=acme, timeout=20) as response:
        events = data_of(response.iter_lines())
        next(events)
        front.gateway.reload()
        rest = list(events)
    assert rest[-1]["choices"][0]["finish_reason"] == "stop"
    assert rest[-1]["sequence"] == 41
    assert httpx.get(front.url + "/v1/models", headers=acme).status_code == 200


def test_a_slow_reader_loses_nothing_and_holds_up_nobody(front: Front, acme: dict[str, str]) -> None:
    body = json.dumps(request("count 1500", max_tokens=1600, stream=True)).encode()
    lines = (
        f"content-length: {len(body)}",
        "content-type: application/json",
        f"authorization: {acme['authorization']}",
    )
    where = urlsplit(front.url)
    with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.sendall(head(*lines) + body)
        received = connection.recv(1)
        assert httpx.post(front.url + CHATS, json=CHAT, headers=acme).status_code == 200
        for _ in range(20):
            received += connection.recv(1)
            time.sleep(0.02)
        while data := connection.recv(65536):
            received += data
    assert received.count(b"data: {") == 1501


def test_clients_may_ask_for_health_and_monitoring_for_readiness(front: Front) -> None:
    assert httpx.get(front.url + "/health").json() == {"status": "ok"}
    probes = f"http://127.0.0.1:{PROBES}"
    assert httpx.get(probes + "/health").json() == {"status": "ok"}
    assert httpx.get(probes + "/ready").json() == {"status": "ok", "store": "ok", "queue": "ok"}
    for path in ("/v1/models", "/internal/auth", "/_auth"):
        assert httpx.get(probes + path).status_code == 404


# -------------------------------------------------------------------------------------------------------- failures


def test_without_redis_keys_cannot_be_checked_and_the_answer_is_a_503(
    front: Front, acme: dict[str, str], real_servers: tuple[RedisServer, RabbitServer]
) -> None:
    redis_server, _ = real_servers
    redis_server.kill()
    try:
        refused = httpx.get(front.url + "/v1/models", headers=acme, timeout=20)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "server_error"
        assert httpx.get(front.url + "/health").status_code == 200
        probes = f"http://127.0.0.1:{PROBES}"
        assert httpx.get(probes + "/ready", timeout=20).json()["store"] == "does not answer"
        assert httpx.get(probes + "/health").status_code == 200
    finally:
        redis_server.start()
    until(lambda: httpx.get(front.url + "/v1/models", headers=acme).status_code == 200, "Redis was found again")


def test_with_two_session_managers_any_of_them_serves_any_stream(
    front: Front, acme: dict[str, str], tmp_path: Path
) -> None:
    pair = Front(tmp_path / "pair", front.backend, session_managers=2)
    try:
        ids = [httpx.post(pair.url + CHATS, json=request("count 3"), headers=acme).json()["id"] for _ in range(6)]
        for job_id in ids:
            for rig in pair.rigs:
                headers = {"x-axon-tenant": "acme", "x-axon-gateway-secret": SECRET}
                text = httpx.get(f"{rig.url}/v1/jobs/{job_id}/events", headers=headers).text
                assert [w in text for w in ("w0", "w1", "w2", "[DONE]")] == [True] * 4
        taken = [jobs_of(rig) for rig in pair.rigs]
        assert min(taken) > 0, "nginx gave all requests to one of them"
    finally:
        pair.stop()


def test_a_dead_session_manager_is_a_503(front: Front, acme: dict[str, str], tmp_path: Path) -> None:
    port = free_port()
    alone = Front(tmp_path / "alone", front.backend, probes=f"127.0.0.1:{port}")
    try:
        alone.rigs[0].stop()
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        assert httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 503
        refused = httpx.get(alone.url + "/v1/models", headers=acme)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert refused.json()["error"]["code"] == "service_unavailable"
        assert_headers(refused)
    finally:
        alone.gateway.stop()


def test_the_gateways_logs_hold_nothing_that_a_client_wrote(front: Front, tmp_path: Path) -> None:
    alone = Front(tmp_path / "private", front.backend)
    path = "/v1/sessions/a-private-name?prompt=secret+words&api_key=axk_0123"
    try:
        headers = {"authorization": f"Bearer {front.key('acme')}", "x-session-id": "another-name"}
        assert httpx.get(alone.url + path, headers=headers).status_code == 404
        alone.rigs[0].stop()
        refused = [httpx.get(alone.url + path, headers=headers) for _ in range(3)]
        assert [answer.status_code for answer in refused] == [503] * 3
        last = refused[-1].headers["x-request-id"]
        until(lambda: last in alone.gateway.log_path.read_text(), "it is logged")
        log = alone.gateway.log_path.read_text()
        for word in ("private-name", "secret", "axk_", "another-name", "GET /"):
            assert word not in log
        [line] = [json.loads(line) for line in log.splitlines() if last in line]
        assert (line["status"], line["key_status"]) == (503, "502")  # what an operator needs is there
    finally:
        alone.gateway.stop()


def jobs_of(rig: Rig) -> float:
    return rig.service.metrics.registry.get_sample_value("axon_jobs_submitted_total") or 0.0


# ----------------------------------------------------------------------------------------------- the configuration


def write_by(
    program: str, folder: Path, secret: str = SECRET, **variables: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Writes a configuration into a folder with ``gateway.py`` or the container's script, which must not matter.

    Instead of becoming nginx, the script has nginx judge what it wrote.
    """
    tools, written = folder / "tools", folder / "written"
    tools.mkdir(parents=True, exist_ok=True)
    (tools / "secret").write_text(f"{secret}\n")
    (tools / "nginx").write_text(f'#!/bin/sh\nexec {shutil.which("nginx")} -t "$@"\n')
    (tools / "nginx").chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "AXON_GATEWAY_SECRET_FILE": str(tools / "secret"),
        "AXON_GATEWAY_SOURCE": str(ROOT / "deploy" / "nginx"),
        "AXON_GATEWAY_DIR": str(written),
        **variables,
    }
    container = ["sh", "deploy/docker/gateway-entrypoint.sh"]
    command = container if program == "container" else [sys.executable, "-m", "deploy.gateway", str(written)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return ran, {path.name: path.read_text() for path in written.glob("*.conf")}


PROGRAMS = ("container", "gateway.py")


def test_the_container_and_the_program_write_the_same_configuration(tmp_path: Path) -> None:
    need("nginx", "envsubst")
    variables = {
        "AXON_GATEWAY_LISTEN": "127.0.0.1:8080,[::1]:8080",
        "AXON_GATEWAY_PROBES": "8081",
        "AXON_GATEWAY_PROCESSES": "3",
        "AXON_SESSION_MANAGERS": "127.0.0.1:8000,unix:/run/axon.sock,[::1]:8000",
        "AXON_MAX_BODY_BYTES": "1000000",
        "AXON_SLOW_CLIENT_S": "7",
    }
    by_container, by_program = (write_by(program, tmp_path, **variables) for program in PROGRAMS)
    for ran, written in (by_container, by_program):
        assert ran.returncode == 0, ran.stderr
        assert "worker_processes 3;" in written["nginx.conf"]
        assert "server unix:/run/axon.sock max_fails=0;" in written["nginx.conf"]
        assert "${AXON_G" not in "".join(written.values())
    assert by_container[1] == by_program[1]


def test_nginx_takes_the_containers_defaults(tmp_path: Path) -> None:
    need("nginx", "envsubst")
    ran, written = write_by("container", tmp_path, AXON_SESSION_MANAGERS="127.0.0.1:8000")
    assert ran.returncode == 0, ran.stderr
    assert "worker_processes 2;" in written["nginx.conf"]
    assert "listen 8080;" in written["nginx.conf"]
    assert "listen 8081;" in written["probes.conf"]


BAD_GATEWAYS = {
    "a quote in the secret": ({"secret": 'sixteen-or-more";'}, "secret"),
    "two lines of secret": ({"secret": "sixteen-or-more-0\nsixteen-or-more-1"}, "secret"),
    "a short secret": ({"secret": "short"}, "secret"),
    "no secret": ({"secret": ""}, "secret"),
    "a directive as an address": ({"AXON_SESSION_MANAGERS": "server a:1;"}, "host:port or unix:/path"),
    "an empty address": ({"AXON_SESSION_MANAGERS": "a:1,,b:1"}, "address|host:port"),
    "a final comma": ({"AXON_SESSION_MANAGERS": "a:1,"}, "address|host:port"),
    "options after an address": ({"AXON_GATEWAY_LISTEN": "8080 ssl"}, "host:port"),
    "a size with a unit": ({"AXON_MAX_BODY_BYTES": "64k"}, "AXON_MAX_BODY_BYTES is a whole number"),
    "no time at all": ({"AXON_SLOW_CLIENT_S": "0"}, "AXON_SLOW_CLIENT_S is a whole number"),
    "half a process": ({"AXON_GATEWAY_PROCESSES": "0.5"}, "number"),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", BAD_GATEWAYS)
def test_what_nginx_could_misread_is_refused_and_nothing_is_written(tmp_path: Path, name: str, program: str) -> None:
    need("nginx", "envsubst")
    options, said = BAD_GATEWAYS[name]
    ran, written = write_by(program, tmp_path, **options)
    assert ran.returncode != 0
    assert re.search(said, ran.stderr)
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    assert not options.get("secret") or options["secret"] not in ran.stderr
    assert written == {}


# ------------------------------------------------------------------------------------------------------------- TLS


def test_with_a_certificate_the_gateway_speaks_tls(front: Front, acme: dict[str, str], tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}".split(),
        capture_output=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr.decode()[-300:]
    secure = Front(tmp_path / "tls", front.backend, certificate=certificate, key=key)
    try:
        trust = ssl.create_default_context(cafile=str(certificate))
        answer = httpx.post(secure.url + CHATS, json=CHAT, headers=acme, verify=trust)
        assert answer.json()["choices"][0]["message"]["content"] == "w0 "
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
        assert "strict-transport-security" in httpx.get(secure.url + "/v1/models", verify=trust).headers
    finally:
        secure.stop()
