"""The whole system on this machine: ``python -m deploy.stack`` (or ``make stack``).

RabbitMQ, Redis, nginx, a session manager and workers, on free ports and with files of their own; prints how to ask it
something, and stops everything on Ctrl-C. A session manager or worker that dies is started again, so ``kill -9`` one
in the middle of an answer and watch the answer go on. The workers compute in float32, in which the continued answer is
the uninterrupted one to the last token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from axon_llm.serving.keys import KeyStore
from deploy.backends import REDIS_ROLES, rabbitmq_definitions, redis_acl
from deploy.gateway import write_gateway
from tests.integration.servers import NginxServer, RabbitServer, RedisServer, free_port, missing_programs

ROOT = Path(__file__).resolve().parents[1]
START_S = 180.0
STOP_S = 30.0


class Process:
    """One of Axon's own processes: started, watched, started again when it dies, ended by SIGTERM."""

    def __init__(self, name: str, arguments: list[str], environment: dict[str, str], folder: Path) -> None:
        self.name = name
        self.log_path = folder / f"{name}.log"
        self._arguments = [sys.executable, "-m", "cli.main", *arguments]
        self._environment = environment
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                self._arguments,
                env=self._environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for the stack, which then ends them in order
            )

    def revive(self) -> None:
        """Starts it again if it has died."""
        status = self.process.poll()
        if status is not None:
            say(f"{self.name} ended with status {status}; starting it again (log: {self.log_path})")
            self.process = self._start()
            say(f"{self.name} is process {self.process.pid}")

    def stop(self) -> None:
        """SIGTERM, patience, SIGKILL."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            say(f"{self.name} did not end within {STOP_S:g} s; killing it")
            self.process.kill()
            self.process.wait()


def main() -> int:
    """Starts everything, waits, stops everything."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.stack", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--model", default="axon-tiny", help="what the workers serve")
    # In bfloat16 a continued answer may differ from the uninterrupted one, in which no token was lost either.
    parser.add_argument("--dtype", default="float32", help="what the workers compute in")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--session-managers", type=int, default=1)
    parser.add_argument("--port", type=int, default=0, help="the gateway's port; 0 for a free one")
    parser.add_argument("--folder", type=Path, help="where data and logs go; a temporary folder by default")
    options = parser.parse_args()
    missing = missing_programs("redis-server", "rabbitmq-server", "nginx")
    if missing:
        say(f"error: not installed: {', '.join(missing)} (`make services` installs them)")
        return 1
    asked_to_stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked_to_stop.set())
    with contextlib.ExitStack() as stack:
        folder = options.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="axon-stack-")))
        try:
            return _run(stack, folder.resolve(), options, asked_to_stop)
        finally:
            say("stopping …")
            stack.close()
            say("stopped")


def _run(stack: contextlib.ExitStack, folder: Path, options: argparse.Namespace, asked_to_stop: threading.Event) -> int:
    passwords = {role: secrets.token_urlsafe(24) for role in REDIS_ROLES}
    folder.mkdir(parents=True, exist_ok=True)
    definitions = folder / "definitions.json"
    definitions.touch(mode=0o600)
    definitions.write_text(rabbitmq_definitions(passwords))
    redis_server = RedisServer(folder / "redis", acl=redis_acl(passwords))
    rabbit = RabbitServer(folder / "rabbitmq", conf=f"load_definitions = {definitions}\n")
    for server in (redis_server, rabbit):
        stack.callback(server.stop)
        say(f"starting {server.name} …")
        server.start()
    secret = secrets.token_urlsafe(24)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AXON_GATEWAY_SECRET")}
    # Workers that share a machine share its cores: with more threads than cores, each waits for the others.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, options.workers))))
    ports = [free_port() for _ in range(options.session_managers)]

    def environment_of(role: str) -> dict[str, str]:
        """What a process of this role may know: its own user of each server, and a session manager the secret."""
        user = f"axon-{role.replace('_', '-')}"
        return {
            **environment,
            **({"AXON_GATEWAY_SECRET": secret} if role == "session_manager" else {}),
            "AXON_REDIS_URL": redis_server.url(user, passwords[role]),
            "AXON_AMQP_URL": f"amqp://{user}:{passwords[role]}@127.0.0.1:{rabbit.port}/axon",
        }

    processes: list[Process] = []
    for index, port in enumerate(ports, 1):
        arguments = ["session-manager", "--trust", "gateway", "--port", str(port)]
        processes.append(Process(f"session-manager-{index}", arguments, environment_of("session_manager"), folder))
        stack.callback(processes[-1].stop)
    for index in range(1, options.workers + 1):
        arguments = ["worker", "--model", options.model, "--dtype", options.dtype]
        processes.append(Process(f"worker-{index}", arguments, environment_of("worker"), folder))
        stack.callback(processes[-1].stop)
    gateway = NginxServer(folder / "nginx", "")
    gateway.port = options.port or gateway.port
    write_gateway(
        folder / "nginx",
        secret=secret,
        listen=f"127.0.0.1:{gateway.port}",
        session_managers=[f"127.0.0.1:{port}" for port in ports],
    )
    stack.callback(gateway.stop)
    gateway.start()
    url = f"http://127.0.0.1:{gateway.port}"
    key = asyncio.run(_make_key(redis_server.url("axon-keys", passwords["keys"])))
    say(f"starting {options.session_managers} session manager(s) and {options.workers} worker(s) …")
    if not _wait_for_model(url, key, options.model, processes, asked_to_stop):
        return 0 if asked_to_stop.is_set() else 1
    _introduce(url, key, options.model, processes, folder)
    while not asked_to_stop.wait(0.5):
        for process in processes:
            process.revive()
    return 0


async def _make_key(redis_url: str) -> str:
    from redis.asyncio import Redis

    store = KeyStore(Redis.from_url(redis_url))
    try:
        return (await store.create("local", "made by the stack", rate_per_minute=1e6))[1]
    finally:
        await store.close()


def _wait_for_model(url: str, key: str, model: str, processes: list[Process], asked_to_stop: threading.Event) -> bool:
    """Until a worker has announced the model; False if that does not come, with the log of whoever is to blame."""
    request = urllib.request.Request(url + "/v1/models", headers={"authorization": f"Bearer {key}"})
    end = time.monotonic() + START_S
    while time.monotonic() < end and not asked_to_stop.wait(0.2):
        dead = [process for process in processes if process.process.poll() is not None]
        if dead:
            tail = dead[0].log_path.read_text(errors="replace")[-2000:]
            say(f"error: {dead[0].name} did not start:\n{tail}")
            return False
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(request, timeout=5) as answer:
            if b'"object":"model"' in answer.read():
                return True
    if not asked_to_stop.is_set():
        say(f"error: no worker announced {model} within {START_S:g} s; logs are in {processes[-1].log_path.parent}")
    return False


def _introduce(url: str, key: str, model: str, processes: list[Process], folder: Path) -> None:
    say(f"\nready: {url}/v1, logs and data in {folder}")
    for process in processes:
        say(f"  {process.name:20} process {process.process.pid}")
    say(
        f"\nexport OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}\n\n"
        f"curl -N {url}/v1/chat/completions -H 'authorization: Bearer {key}' \\\n"
        "  -H 'content-type: application/json' \\\n"
        f"""  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}], "stream": true}}'\n\n"""
        "Ctrl-C stops everything."
    )


def say(text: str) -> None:
    """One line on standard error, at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
