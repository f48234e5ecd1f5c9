"""``axon serve``: an OpenAI-compatible server in one process, with nothing else to install or start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .logs import configure_logging

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def command(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Folder, shipped name, Hub id or random:SHAPE. [AXON_MODEL]",
            envvar="AXON_MODEL",
            show_envvar=False,
        ),
    ] = "axon-tiny",
    host: Annotated[str | None, typer.Option(help="Address to listen on. [AXON_HOST; 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 0 for a free one. [AXON_PORT; 8000]")] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Ask clients for the key in this file. A key on the command line could be read by every user of the "
            "machine, so there is no option for one. [AXON_API_KEY_FILE, or AXON_API_KEY]"
        ),
    ] = None,
    served_as: Annotated[str | None, typer.Option(help="What clients call the model, if not as you do.")] = None,
    slots: Annotated[int, typer.Option(min=1, max=1024, help="Sequences that run at once.")] = 8,
    max_seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer together; the model's limit, at most 4096.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own.")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8 or int4 weights; fp8 on Nvidia GPUs from Hopper on.")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the decode step; slower to start, faster after.")
    ] = False,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of the Prometheus metrics, 0 for a free one. [AXON_METRICS_PORT; 0]")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
) -> None:
    """Serve a model over HTTP, compatible with OpenAI's API, from this one process.

    Queue and store live in memory: no broker, no Redis, nothing kept after the end. Without a key everybody who can
    reach the address may use it.
    """
    from axon_llm.serving.http_settings import SessionManagerSettings
    from axon_llm.serving.serve import run
    from axon_llm.serving.served_model import ServedModel
    from axon_llm.serving.settings import read_settings

    configure_logging(log_level)
    if api_key_file is not None:
        os.environ["AXON_API_KEY_FILE"] = str(api_key_file)
        os.environ.pop("AXON_API_KEY", None)
    settings = read_settings(SessionManagerSettings, host=host, port=port, metrics_port=metrics_port)
    if settings.host not in LOOPBACK and not settings.api_key.get_secret_value():
        typer.echo(f"warning: {settings.host} can be reached from outside, and no API key is asked for", err=True)

    def build() -> ServedModel:
        from axon_llm.serving.model_loading import load_served_model, settle

        served = load_served_model(
            model,
            served_as=served_as,
            device=device,
            dtype=dtype,
            quantize=quantize,
            slots=slots,
            max_seq_len=max_seq_len,
            compile=compile,
        )
        settle()
        return served

    def on_listening(address: str, metrics_port: int) -> None:
        from axon_llm.serving.model_loading import public_name

        name = served_as or public_name(model)
        typer.echo(f"axon serve: {name} on {address}/v1 (metrics on port {metrics_port}); Ctrl-C ends it", err=True)
        typer.echo(
            f"  curl {address}/v1/chat/completions -H 'content-type: application/json' \\\n"
            f"""    -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}], "stream": true}}'""",
            err=True,
        )

    typer.echo(f"axon serve: loading {model} …", err=True)
    ended_by = run(settings, build, on_listening)
    raise typer.Exit(130 if ended_by == 2 else 0)
