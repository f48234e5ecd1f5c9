"""``make stack``: everything at once, as it would run, with the users and the gateway that ship."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration.servers import wait_until
from tests.needs import need

ROOT = Path(__file__).resolve().parents[2]
MODEL = "random:tiny"


class Stack:
    def __init__(self, folder: Path) -> None:
        self.log_path = folder / "stack.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploy.stack", "--model", MODEL, "--folder", str(folder / "data")],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

        def ready() -> bool:
            assert self.process.poll() is None, self.log
            return "Ctrl-C stops" in self.log

        try:
            wait_until(ready, 240, "the stack is up")
            self.base_url, self.key = re.findall(r"OPENAI_BASE_URL=(\S+) OPENAI_API_KEY=(\S+)", self.log)[0]
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """As Ctrl-C does; with force should that not be enough."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def pids(self, name: str) -> list[int]:
        return [int(pid) for pid in re.findall(rf"{name}-\d+ +(?:is )?process (\d+)", self.log)]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, api_key=self.key, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    need("redis-server", "rabbitmq-server", "nginx", "bash", "curl")
    running = Stack(tmp_path_factory.mktemp("stack"))
    yield running
    running.stop()


def sampled(**more: Any) -> dict[str, Any]:
    return {
        "model": MODEL, "messages": [{"role": "user", "content": "tell me"}], "max_tokens": 200, "temperature": 1.0,
        "seed": 5, "extra_body": {"ignore_eos": True}, **more,
    }  # fmt: skip


def test_the_printed_curl_line_works(stack: Stack) -> None:
    line = re.search(r"curl -N .*?true\}'", stack.log, re.DOTALL)
    assert line is not None
    ran = subprocess.run(["bash", "-c", line[0]], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.startswith("data: {")
    assert ran.stdout.endswith("data: [DONE]\n\n")


def test_five_turns_of_a_session_each_see_those_before(stack: Stack) -> None:
    lengths = []
    for turn in range(5):
        answer = stack.client().chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"turn {turn}"}],
            max_tokens=8,
            seed=1,
            extra_body={"session_id": "five"},
        )
        assert answer.usage is not None
        lengths.append(answer.usage.prompt_tokens)
    assert lengths == sorted(set(lengths))
    headers = {"authorization": f"Bearer {stack.key}"}
    turns = httpx.get(f"{stack.base_url}/sessions/five", headers=headers).json()["turns"]
    assert [turn["messages"][0]["content"] for turn in turns] == [f"turn {turn}" for turn in range(5)]


def test_workers_killed_in_a_sampled_answer_are_a_pause_and_nothing_else(stack: Stack) -> None:
    whole = stack.client().chat.completions.create(**sampled(max_tokens=1000))
    seen: list[Any] = []
    for chunk in stack.client().chat.completions.create(**sampled(max_tokens=1000), stream=True):
        seen.append(chunk)
        if len(seen) == 20:
            # All of them, and so whoever has the job; the stack starts others.
            for pid in stack.pids("worker"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in seen) == whole.choices[0].message.content
    wait_until(lambda: "starting it again" in stack.log, 30, "the stack noticed")
    headers = {"authorization": f"Bearer {stack.key}"}
    assert httpx.get(f"{stack.base_url}/jobs/{seen[0].id}", headers=headers).json()["attempts"] == 2


def test_no_secret_is_among_the_arguments_of_any_process(stack: Stack) -> None:
    users = (stack.log_path.parent / "data" / "redis" / "users.acl").read_text()
    assert "#" in users
    assert ">" not in users  # hashes alone
    for name in ("session-manager", "worker"):
        assert stack.pids(name)
        for pid in stack.pids(name):
            path = Path(f"/proc/{pid}/cmdline")
            if path.exists():
                assert re.search(r"redis://|amqp://|axk_|secret", path.read_text()) is None


def test_only_session_managers_are_told_the_gateways_secret(stack: Stack) -> None:
    told = {}
    for name in ("session-manager", "worker"):
        environments = [
            Path(f"/proc/{pid}/environ").read_text() for pid in stack.pids(name) if Path(f"/proc/{pid}").exists()
        ]
        assert environments
        told[name] = ["AXON_GATEWAY_SECRET" in text for text in environments]
    assert all(told["session-manager"])
    assert not any(told["worker"])


def test_ctrl_c_stops_everything(stack: Stack) -> None:
    group = stack.process.pid
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(90) == 0
    assert stack.log.rstrip().endswith("stopped")
    folder = str(stack.log_path.parent)
    left = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "cmdline").read_text() + (path / "environ").read_text(errors="replace")
        except OSError:
            continue
        if folder in text and int(path.name) != os.getpid():
            left.append(json.dumps(text[:80]))
    assert left == [], f"left by {group}"
