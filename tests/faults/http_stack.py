"""The whole system for the rows that need HTTP.

Nginx, two session managers as processes, and what ``Stack`` has behind them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from redis.asyncio import Redis

from axon_llm.serving.keys import KeyStore
from tests.faults.stack import Pace, Stack, WorkerProcess, environment
from tests.integration.gateway_rig import SECRET, GatewayServer
from tests.integration.servers import free_port, wait_until


class HttpStack(Stack):
    """A ``Stack`` with a front."""

    def __init__(self, folder: Path, pace: Pace, *, session_managers: int = 2) -> None:
        super().__init__(folder, pace)
        env = environment(self.direct_settings) | {"AXON_GATEWAY_SECRET": SECRET, "AXON_POLL_S": "0.5"}
        ports = [free_port() for _ in range(session_managers)]
        self.session_managers = [
            WorkerProcess(
                number,
                [sys.executable, "-m", "cli.main", "session-manager", "--trust", "gateway", "--port", str(port)],
                env,
                folder / f"session-manager{number}.log",
            )
            for number, port in enumerate(ports)
        ]
        self.gateway = GatewayServer(folder / "nginx", [f"127.0.0.1:{port}" for port in ports], slow_client_s=60)
        self.key = ""

    def __enter__(self) -> HttpStack:
        super().__enter__()
        try:
            for process in self.session_managers:
                process.start()
            wait_until(lambda: all("answer" in process.log() for process in self.session_managers), 30, "they started")
            self.key = asyncio.run(self._make_key())
            self.gateway.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.gateway.stop()
            super().__exit__()  # and nobody starts them again
        finally:
            for process in self.session_managers:
                if process.process is not None:
                    process.process.kill()
                    process.process.wait(10)

    def _supervised(self) -> list[WorkerProcess]:
        return self.workers + [process for process in self.session_managers if process.starts]

    async def _make_key(self) -> str:
        keys = KeyStore(Redis(port=self.redis.port))
        try:
            return (await keys.create("acme", rate_per_minute=1e6))[1]
        finally:
            await keys.close()

    def resident_bytes(self) -> list[int]:
        """Return the memory of each session manager."""
        pages = [
            int(Path(f"/proc/{process.process.pid}/statm").read_text().split()[1])
            for process in self.session_managers
            if process.process is not None
        ]
        return [count * os.sysconf("SC_PAGE_SIZE") for count in pages]

    def kill_session_manager(self, number: int) -> None:
        """kill -9; the supervisor starts it again."""
        self.session_managers[number].signal(signal.SIGKILL)
