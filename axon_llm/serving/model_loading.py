"""A model as a worker decodes with it: loaded, in an engine, warmed up. The only file of this folder that loads one.

Imported late, by ``axon worker`` and ``axon serve`` alone: with it comes torch. Next: ``worker.py``.
"""

from __future__ import annotations

import gc
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import axon_llm
from axon_llm.engine.params import SamplingParams
from axon_llm.errors import RequestError, TokenizerError
from axon_llm.fast import accelerate
from axon_llm.fast.threads import fit_threads
from axon_llm.serving.served_model import ServedModel
from axon_llm.serving.wire import Job, ModelCard

DEFAULT_SLOTS = 8
DEFAULT_MAX_SEQ_LEN = 4096


def load_served_model(
    model_name: str,
    *,
    served_as: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    slots: int = DEFAULT_SLOTS,
    max_seq_len: int | None = None,
    compile: bool = False,
) -> ServedModel:
    """Loads a model and makes an engine of it.

    Args:
        model_name: folder, shipped name, Hub id or ``random:SHAPE``.
        served_as: what clients call it; by default the name given, or a folder's own name.
        device: as in ``axon_llm.load``, as are ``dtype`` and ``quantize``.
        dtype: of the weights.
        quantize: ``int8``, ``int4`` or (on a GPU) ``fp8``.
        slots: sequences that run at once.
        max_seq_len: positions per slot; by default the model's limit, at most ``DEFAULT_MAX_SEQ_LEN``.
        compile: compile the decode step.

    Raises:
        ModelError: it cannot be found or loaded.
        UsageError: an argument makes no sense.
    """
    model, tokenizer = axon_llm.load(model_name, device=device, dtype=dtype)
    model = accelerate(model, quantize, rows=slots)
    fit_threads(model)
    recommended: dict[str, Any] = dict(tokenizer.generation_defaults)
    SamplingParams(**recommended)  # every request will use them: what is wrong shows now
    limit = model.config.max_position_embeddings
    engine = axon_llm.Engine(
        model, tokenizer, slots=slots, max_seq_len=max_seq_len or min(limit, DEFAULT_MAX_SEQ_LEN), compile=compile
    )
    engine.warm_up()

    def encode(job: Job) -> tuple[int, ...]:
        if job.prompt_tokens is not None:
            return job.prompt_tokens
        if job.prompt is not None:
            return tuple(tokenizer.encode(job.prompt))
        messages = [message.model_dump(exclude_none=True) for message in job.messages or ()]
        try:
            # The same time on every worker: what one has written, another goes on with after the same prompt.
            now = datetime.fromtimestamp(job.created_at_unix_s, UTC)
            return tuple(tokenizer.encode_chat(messages, now=now))
        except TokenizerError as error:
            raise RequestError(error.message, code="chat_template_failed", param="messages") from error

    card = ModelCard(
        id=served_as or public_name(model_name),
        created_unix_s=int(time.time()),
        max_seq_len=engine.max_seq_len,
        vocab_size=model.config.vocab_size,
        has_chat_template=tokenizer.has_chat_template,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        parameters=model.config.num_parameters,
        generation_defaults=recommended,
    )

    def spell(token: int) -> tuple[str, bytes]:
        return tokenizer.token_text(token), tokenizer.token_bytes(token)

    return ServedModel(engine=engine, encode=encode, spell=spell, models=(card,))


def settle() -> None:
    """Tell Python's garbage collector that what is there now stays. For a process that loads once and then serves.

    Looking all of torch through again would stop every stream for a tenth of a second, now and then.
    """
    gc.collect()
    gc.freeze()


def public_name(model_name: str) -> str:
    """What clients call a model: its name, and of a folder the last part, because paths are nobody's business."""
    return Path(model_name).expanduser().resolve().name if Path(model_name).expanduser().is_dir() else model_name
