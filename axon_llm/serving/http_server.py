"""The HTTP server around the application: sockets, signals, the edge of uvicorn, metrics on a port of their own.

The same for ``axon session-manager`` and ``axon serve``; knows neither Redis nor the broker nor the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from prometheus_client import CollectorRegistry, start_http_server

from axon_llm.errors import UsageError
from axon_llm.serving.http_app import build_app
from axon_llm.serving.http_protocol import strict_protocol
from axon_llm.serving.http_service import Service
from axon_llm.serving.http_settings import SessionManagerSettings

LAST_WORDS_S = 2.0


class HttpServer(uvicorn.Server):
    """uvicorn, telling the service about its end before connections begin to close.

    Args:
        service: what is served.
        on_listening: called once with the address, such as ``http://127.0.0.1:8000``.
    """

    def __init__(self, service: Service, on_listening: Callable[[str], None] | None = None) -> None:
        settings = service.settings
        config = uvicorn.Config(
            build_app(service),
            http=strict_protocol(settings.header_timeout_s, settings.send_timeout_s),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=settings.max_header_bytes,
            timeout_keep_alive=settings.keep_alive_s,
            timeout_graceful_shutdown=settings.drain_s,
        )
        super().__init__(config)
        self.ended_by: int | None = None
        self._service = service
        self._on_listening = on_listening

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the server; unlike uvicorn, without raising the signal again at the end."""
        loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Begins to end: streams that break from now on were not left by their clients. A second SIGINT is final."""
        self.force_exit = self.force_exit or (self.should_exit and number == signal.SIGINT)
        self._service.stopping = True
        self.ended_by = number
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, and says so."""
        await super().startup(sockets)
        if self._on_listening is not None and sockets and not self.should_exit:
            self._on_listening(_address(sockets[0]))

    async def run_on(self, listener: socket.socket) -> None:
        """Serves until told to stop; then the service is closed."""
        try:
            await self.serve(sockets=[listener])
        finally:
            if self.server_state.tasks:
                # Cancelled by now; those that have not answered yet say that their job goes on.
                await asyncio.wait(self.server_state.tasks, timeout=LAST_WORDS_S)
            await self._service.close()


def listen(settings: SessionManagerSettings) -> socket.socket:
    """Takes the address: the Unix socket where one is named, else host and port (0 for a free one).

    Nobody can connect until the server listens on it: a client that comes early is refused and not left hanging.

    Raises:
        UsageError: the address cannot be had.
    """
    try:
        if settings.uds is not None:
            settings.uds.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(settings.uds))
            settings.uds.chmod(0o660)
        else:
            family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
            # With the protocol named, asyncio recognises TCP and sets TCP_NODELAY; without, an answer costs 40 ms more.
            listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((settings.host, settings.port))
    except OSError as error:
        where = settings.uds or f"{settings.host}:{settings.port}"
        raise UsageError(f"Cannot listen on {where}: {error.strerror}.", "Choose another with --port.") from None
    listener.setblocking(False)
    return listener


def start_metrics(service: Service, *more: CollectorRegistry) -> int:
    """Serves the metrics, and those of other registries, on a port of their own, from a thread; returns the port."""
    settings = service.settings
    together = service.metrics.registry
    if more:
        together = CollectorRegistry()
        for registry in (service.metrics.registry, *more):
            together.register(registry)
    server, _ = start_http_server(settings.metrics_port, settings.metrics_host, registry=together)
    return int(server.server_port)


def _address(listener: socket.socket) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
