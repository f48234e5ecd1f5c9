"""``axon worker``: takes jobs from RabbitMQ, decodes them, writes their tokens to Redis."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer


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
    served_as: Annotated[str | None, typer.Option(help="What clients call the model, if not as you do.")] = None,
    slots: Annotated[
        int, typer.Option(min=1, max=1024, help="Sequences that run at once; as many jobs are taken from the queue.")
    ] = 8,
    max_seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer together; the model's limit, at most 4096.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; a GPU if there is one.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; the checkpoint's own. "
            "Only in float32 is an answer that another worker continues the uninterrupted one to the last token."
        ),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8 or int4 weights; fp8 on Nvidia GPUs from Hopper on.")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the decode step; slower to start, faster after.")
    ] = False,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of metrics and health, 0 for a free one. [AXON_METRICS_PORT; 0]")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Decode jobs from the queue until SIGTERM, then hand unfinished ones back for other workers to continue.

    Broker and Redis come from AXON_AMQP_URL and AXON_REDIS_URL (or a file named by …_FILE), else those on this machine.
    Exits with code 4 if one of them is out of reach at the start for AXON_START_TIMEOUT_S; later it waits for them.
    """
    from axon_llm.serving.served_model import ServedModel
    from axon_llm.serving.settings import read_settings
    from axon_llm.serving.worker_process import serve

    level = logging.getLevelNamesMapping().get(log_level.upper(), logging.INFO)
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # what matters of it is said by axon.broker, in one line
    settings = read_settings(metrics_port=metrics_port)

    def build() -> ServedModel:
        from axon_llm.serving.model_loading import load_served_model, settle

        typer.echo(f"axon worker: loading {model} …", err=True)
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
        typer.echo(f"axon worker: {served_as or model} with {slots} slots; SIGTERM hands jobs back", err=True)
        return served

    serve(settings, build)
