"""RabbitMQ, Redis and workers as processes that can be hurt: the machine room of the fault tests.

Worker 0 reaches Redis and the broker through proxies of its own, the client side through others, the rest of the
workers directly. A supervisor restarts workers that die, as a container platform would.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from axon_llm.serving import broker
from axon_llm.serving.settings import ServingSettings
from tests.faults.tiny_engine import MODEL
from tests.integration.servers import RabbitServer, RedisServer, TcpProxy

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Pace:
    """How long things take. ``quick`` squeezes a fault into seconds, ``real`` uses the defaults of the product."""

    lease_s: float
    silence_s: float
    grace_s: float
    heartbeat_s: int
    zombie_s: float
    hang_s: float

    @classmethod
    def quick(cls) -> Pace:
        return cls(lease_s=3.0, silence_s=0.7, grace_s=1.5, heartbeat_s=2, zombie_s=8.0, hang_s=2.5)

    @classmethod
    def real(cls) -> Pace:
        return cls(lease_s=15.0, silence_s=3.0, grace_s=10.0, heartbeat_s=10, zombie_s=25.0, hang_s=6.0)

    def settings(self, redis_port: int, amqp_port: int) -> ServingSettings:
        """Return settings for servers on these ports."""
        return ServingSettings(
            redis_url=SecretStr(f"redis://127.0.0.1:{redis_port}/0"),
            amqp_url=SecretStr(f"amqp://guest:guest@127.0.0.1:{amqp_port}/%2F"),
            lease_s=self.lease_s,
            takeover_silence_s=self.silence_s,
            outbox_grace_s=self.grace_s,
            broker_heartbeat_s=self.heartbeat_s,
            redis_timeout_s=1.5,
            publish_timeout_s=3.0,
            poll_s=0.5,
            start_timeout_s=60.0,
        )


def environment(settings: ServingSettings) -> dict[str, str]:
    """Return settings as the environment of a process."""
    result = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}
    for name, value in settings:
        if value is None:
            continue
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        result[f"AXON_{name.upper()}"] = text
    return result


class WorkerProcess:
    """One worker; ``slot`` numbers it, its process may change."""

    def __init__(self, slot: int, command: list[str], env: dict[str, str], log_path: Path) -> None:
        self.slot = slot
        self._command, self._env, self._log_path = command, env, log_path
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self) -> None:
        with self._log_path.open("ab") as output:
            self.process = subprocess.Popen(
                self._command, env=self._env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self.starts += 1

    def signal(self, number: int) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    @property
    def dead(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def log(self, after: int = 0) -> str:
        """What it wrote, from a character on."""
        return self._log_path.read_text(errors="replace")[after:] if self._log_path.exists() else ""


class Stack:
    """Everything behind the session manager. Use as a context manager."""

    def __init__(
        self,
        folder: Path,
        pace: Pace,
        *,
        workers: int = 2,
        slots: int = 4,
        step_s: float = 0.015,
        worker_command: list[str] | None = None,
        redis_extra: str = "",
    ) -> None:
        self.folder, self.pace = folder, pace
        self.redis = RedisServer(folder / "redis", extra=redis_extra)
        self.rabbit = RabbitServer(folder / "rabbit")
        self.worker_redis, self.worker_amqp = TcpProxy(self.redis.port), TcpProxy(self.rabbit.port)
        self.client_redis, self.client_amqp = TcpProxy(self.redis.port), TcpProxy(self.rabbit.port)
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        command = worker_command or [sys.executable, "-m", "tests.faults.tiny_worker"]
        extra = {"TINY_SLOTS": str(slots), "TINY_STEP_S": str(step_s)}
        self.workers = []
        for slot in range(workers):
            ports = (
                (self.worker_redis.port, self.worker_amqp.port) if slot == 0 else (self.redis.port, self.rabbit.port)
            )
            env = environment(pace.settings(*ports)) | extra
            self.workers.append(WorkerProcess(slot, command, env, folder / f"worker{slot}.log"))

    @property
    def client_settings(self) -> ServingSettings:
        """Settings of the session manager's side."""
        return self.pace.settings(self.client_redis.port, self.client_amqp.port)

    @property
    def direct_settings(self) -> ServingSettings:
        """Settings that avoid the proxies, for the checker."""
        return self.pace.settings(self.redis.port, self.rabbit.port)

    def __enter__(self) -> Stack:
        try:
            self.redis.start()
            self.rabbit.start()
            broker.reach(self.direct_settings, 30, broker.jobs_queue(MODEL), broker.suspects_queue(MODEL))
            # RabbitMQ writes the names of new quorum queues to disk after half a second, confirmed or not
            time.sleep(1.0)
            for worker in self.workers:
                worker.start()
            self._supervisor.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        if self._supervisor.is_alive():
            self._supervisor.join(5)
        for worker in self.workers:
            if worker.process is not None:
                worker.signal(signal.SIGCONT)
                worker.process.kill()
                worker.process.wait(10)
        for proxy in (self.worker_redis, self.worker_amqp, self.client_redis, self.client_amqp):
            proxy.close()
        self.redis.stop()
        self.rabbit.stop()

    def _supervise(self) -> None:
        while not self._stopping.wait(0.1):
            for worker in self._supervised():
                if worker.dead:
                    worker.start()

    def _supervised(self) -> list[WorkerProcess]:
        return self.workers

    def heal(self) -> None:
        """Undo whatever a fault may have left behind, so that the end of a test is fair."""
        for proxy in (self.worker_redis, self.worker_amqp, self.client_redis, self.client_amqp):
            proxy.delay_s = 0.0
            proxy.heal()
        for worker in self.workers:
            worker.signal(signal.SIGCONT)

    def queue_lengths(self) -> dict[str, int]:
        """Return messages per queue, ready and unacknowledged together."""
        lines = self.rabbit.ctl("list_queues", "name", "messages", "--no-table-headers").splitlines()
        return {name: int(count) for name, count in (line.split() for line in lines if line.strip())}

    def wait_queues_empty(self, timeout_s: float) -> dict[str, int]:
        """Wait until every queue is empty; returns the lengths last seen."""
        end = time.monotonic() + timeout_s
        while any((lengths := self.queue_lengths()).values()) and time.monotonic() < end:
            time.sleep(0.3)
        return lengths
