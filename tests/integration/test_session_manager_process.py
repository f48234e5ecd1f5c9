"""``axon session-manager`` as a process of its own: what it imports, how much it holds, how it dies."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from axon_llm.serving.http_settings import SessionManagerSettings
from tests.integration.http_rig import Backend, real_backend
from tests.integration.scripted_worker import MODEL
from tests.integration.servers import RabbitServer, RedisServer, free_port, wait_until
from tests.integration.test_http_jobs import request
from tests.processes import ended

ROOT = Path(__file__).resolve().parents[2]
SECRET = "sk-nobody-must-see-this"
Servers = tuple[RedisServer, RabbitServer]


@pytest.fixture(scope="module")
def worker(real_servers: Servers) -> Iterator[Backend]:
    backend = real_backend(*real_servers)
    running = backend.make_worker()
    running.start()
    yield backend
    running.stop()


class Process:
    """One session manager."""

    def __init__(self, servers: Servers, log_path: Path, **environment: str) -> None:
        redis_server, rabbit = servers
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = log_path
        variables = {
            "PATH": os.environ["PATH"],
            "AXON_REDIS_URL": redis_server.url(),
            "AXON_AMQP_URL": rabbit.url(),
            "AXON_TRUST": "open",
            "AXON_PORT": str(self.port),
            "AXON_DRAIN_S": "2",
            **environment,
        }
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", "session-manager"],
                cwd=ROOT,
                env=variables,
                stdout=log,
                stderr=log,
            )

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log_path.read_text()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(self.url + "/ready").status_code == 200
            return False

        wait_until(ready, 20, "the session manager is ready")

    @property
    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def process(real_servers: Servers, worker: Backend, tmp_path: Path) -> Iterator[Process]:
    running = Process(real_servers, tmp_path / "log")
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


@pytest.mark.parametrize(
    "module", ["axon_llm.serving.session_manager", "axon_llm.serving.http_app", "cli.session_manager", "cli.keys"]
)
def test_neither_torch_nor_what_comes_with_it_is_imported(module: str) -> None:
    code = (
        f"import sys, {module}; print([n for n in ('torch', 'numpy', 'tokenizers', 'safetensors') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_running_session_manager_holds_no_torch_and_little_memory(process: Process) -> None:
    answer = httpx.post(process.url + "/v1/chat/completions", json=request("count 3"))
    assert answer.json()["choices"][0]["message"]["content"] == "w0 w1 w2 "
    assert "libtorch" not in Path(f"/proc/{process.process.pid}/maps").read_text()
    assert process.resident_bytes < 80 << 20


def test_five_hundred_idle_streams_are_open_at_once(process: Process) -> None:
    job_id = _held_job(process)
    with contextlib.ExitStack() as stack:
        streams = []
        for _ in range(500):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", process.port), timeout=30))
            connection.sendall(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            streams.append(connection)
        received = [b""] * 500
        for index, connection in enumerate(streams):
            while b"data: {" not in received[index]:
                data = connection.recv(4096)
                assert data, "a stream was closed"
                received[index] += data
        # All are open, none is served at the expense of another, and a new request is answered among them.
        assert httpx.get(process.url + "/v1/models", timeout=30).json()["data"][0]["id"] == MODEL
        assert process.resident_bytes < 80 << 20
        assert httpx.post(f"{process.url}/v1/jobs/{job_id}/cancel", timeout=30).status_code == 200
        for index, connection in enumerate(streams):
            while b"[DONE]" not in received[index]:
                data = connection.recv(4096)
                assert data, "a stream ended without its end"
                received[index] += data
    told = {tuple(line for line in text.split(b"\n") if line.startswith((b"data: ", b"id: "))) for text in received}
    assert len(told) == 1, "two streams of one job told different stories"


def _held_job(process: Process) -> str:
    body = request("first then hold", stream=True, on_disconnect="continue")
    with httpx.stream("POST", process.url + "/v1/chat/completions", json=body, timeout=20) as response:
        next(response.iter_lines())
        return response.headers["x-axon-job-id"]


def test_killed_with_an_open_stream_it_loses_no_job(
    process: Process, real_servers: Servers, worker: Backend, tmp_path: Path
) -> None:
    seen: list[Any] = []
    with httpx.stream("POST", process.url + "/v1/chat/completions", json=request("slow 40", stream=True)) as response:
        job_id = response.headers["x-axon-job-id"]
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        seen.append(json.loads(next(lines)[6:]))
        process.process.send_signal(signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            seen += [json.loads(line[6:]) for line in lines]
    other = Process(real_servers, tmp_path / "other")
    try:
        other.wait_ready()
        after = seen[-1]["sequence"]
        rest = httpx.get(f"{other.url}/v1/jobs/{job_id}/events?after={after}", timeout=20)
        seen += [json.loads(line[6:]) for line in rest.text.split("\n") if line.startswith("data: {")]
    finally:
        other.stop()
    assert [chunk["sequence"] for chunk in seen] == list(range(1, 42))
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in seen) == "".join(f"w{i} " for i in range(40))
    assert seen[-1]["choices"][0]["finish_reason"] == "stop"


def test_sigterm_lets_open_answers_finish_and_exits_with_0(process: Process) -> None:
    with httpx.stream("POST", process.url + "/v1/chat/completions", json=request("slow 5", stream=True)) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        assert list(lines)[-1] == "data: [DONE]"
    assert process.process.wait(10) == 0


def test_ctrl_c_exits_with_130(process: Process) -> None:
    process.process.send_signal(signal.SIGINT)
    assert process.process.wait(10) == 130


def given_up(process: Process) -> str:
    """What a process logged that ended for want of Redis or the broker, and said no more than it must."""
    with ended(process.process):
        assert process.process.wait(20) == 4
    text = process.log_path.read_text()
    assert SECRET not in text
    assert "Traceback" not in text
    assert text.count("axon: error: ") == 1
    return text


def test_without_redis_and_broker_it_gives_up_with_4_and_one_line(real_servers: Servers, tmp_path: Path) -> None:
    away = {
        "AXON_REDIS_URL": f"redis://:{SECRET}@127.0.0.1:{free_port()}/0",
        "AXON_AMQP_URL": f"amqp://u:{SECRET}@127.0.0.1:{free_port()}/%2F",
        "AXON_START_TIMEOUT_S": "1",
    }
    assert "Redis and the broker could not be reached" in given_up(Process(real_servers, tmp_path / "log", **away))


def test_a_wrong_password_of_redis_is_said_at_once_with_4_and_one_line(real_servers: Servers, tmp_path: Path) -> None:
    redis_server, _ = real_servers
    wrong = {"AXON_REDIS_URL": f"redis://nobody:{SECRET}@127.0.0.1:{redis_server.port}/0", "AXON_START_TIMEOUT_S": "60"}
    assert "Redis refused the login" in given_up(Process(real_servers, tmp_path / "log", **wrong))


def test_nothing_typed_and_no_secret_is_in_log_or_arguments(
    real_servers: Servers, worker: Backend, tmp_path: Path
) -> None:
    redis_server, _ = real_servers
    environment = {"AXON_TRUST": "keys", "AXON_REDIS_URL": redis_server.url()}
    running = Process(real_servers, tmp_path / "log", **environment)
    try:
        running.wait_ready()
        made = subprocess.run(
            [sys.executable, "-m", "cli.main", "keys", "create", "acme", "--json"],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        key = json.loads(made.stdout)["key"]
        headers = {"authorization": f"Bearer {key}"}
        typed = "a-very-private-sentence"
        for body in (request(typed, session_id="s1"), {**request(typed), "temperature": -1}, {"model": typed}):
            httpx.post(running.url + "/v1/chat/completions", json=body, headers=headers)
        httpx.get(running.url + f"/v1/{typed}?q={typed}", headers={"authorization": f"Bearer {typed}"})
        httpx.post(running.url + "/v1/chat/completions", content=typed, headers={**headers, "x-session-id": typed})
        arguments = Path(f"/proc/{running.process.pid}/cmdline").read_text()
    finally:
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(10)
    text = running.log_path.read_text()
    assert "/v1/chat/completions 200" in text
    for secret in (typed, key, key.split("_", 2)[2]):
        assert secret not in text
        assert secret not in arguments


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("AXON_GATEWAY_SECRET", {"AXON_TRUST": "gateway", "AXON_GATEWAY_SECRET": "short"}),
        ("models", {"AXON_TRUST": "open", "AXON_MODELS": "a,b"}),
    ],
)
def test_settings_that_make_no_sense_are_named(name: str, setting: dict[str, str]) -> None:
    environment = {"PATH": os.environ["PATH"], **setting}
    tried = subprocess.run(
        [sys.executable, "-m", "cli.main", "session-manager"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert tried.returncode == 2
    assert name in tried.stderr
    assert "short" not in tried.stderr.replace("AXON_", "")


def test_defaults_listen_on_loopback_and_ask_for_keys() -> None:
    settings = SessionManagerSettings()
    assert (settings.host, settings.trust, settings.max_body_bytes) == ("127.0.0.1", "keys", 65_536)


def test_a_unix_socket_is_for_its_owner_and_group_alone(real_servers: Servers, worker: Backend, tmp_path: Path) -> None:
    path = tmp_path / "sm.sock"
    running = Process(real_servers, tmp_path / "log", AXON_TRUST="gateway", AXON_UDS=str(path))
    try:
        wait_until(lambda: f"on unix:{path}" in running.log_path.read_text(), 20, "it listens")
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://sm", timeout=10) as client:
            wait_until(lambda: client.get("/ready").status_code == 200, 20, "ready")
            assert client.get("/v1/models").status_code == 401  # who may open the socket still says for which tenant
            assert client.get("/v1/models", headers={"x-axon-tenant": "acme"}).status_code == 200
        assert path.stat().st_mode & 0o777 == 0o660
    finally:
        running.stop()
