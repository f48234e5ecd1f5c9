"""``axon session-manager``: the OpenAI-compatible HTTP front of the serving path."""

from __future__ import annotations

from typing import Annotated

import typer

from .logs import configure_logging

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def command(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [AXON_HOST; 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 0 for a free one. [AXON_PORT; 8000]")] = None,
    uds: Annotated[str | None, typer.Option(help="Listen on this Unix socket instead. [AXON_UDS]")] = None,
    trust: Annotated[
        str | None,
        typer.Option(
            help="Where the tenant comes from: gateway (nginx says so), keys (API keys are checked here), "
            "open (one tenant, no keys). [AXON_TRUST; keys]"
        ),
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of the Prometheus metrics, 0 for a free one. [AXON_METRICS_PORT; 0]")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve the OpenAI-compatible API on RabbitMQ and Redis, for workers elsewhere.

    Broker and Redis come from AXON_AMQP_URL and AXON_REDIS_URL (or a file named by …_FILE), else those on this machine.
    """
    from axon_llm.serving.http_settings import SessionManagerSettings
    from axon_llm.serving.session_manager import run
    from axon_llm.serving.settings import read_settings

    configure_logging(log_level)
    settings = read_settings(
        SessionManagerSettings, host=host, port=port, uds=uds, trust=trust, metrics_port=metrics_port
    )

    if settings.trust == "open" and settings.uds is None and settings.host not in LOOPBACK:
        typer.echo(
            f"warning: {settings.host} can be reached from outside, and AXON_TRUST=open asks for no key", err=True
        )

    def on_listening(address: str, metrics_port: int) -> None:
        typer.echo(f"axon session-manager on {address} (metrics on port {metrics_port})", err=True)

    ended_by = run(settings, on_listening)
    raise typer.Exit(130 if ended_by == 2 else 0)
