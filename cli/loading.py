"""From options to a loaded model. Imports torch, so commands import it late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from axon_llm.errors import RequestError, UsageError
from axon_llm.model import Transformer
from axon_llm.tokenizer import Tokenizer

from .render import stderr_console


def load(
    name: str, *, device: str | None, dtype: str | None, quantize: str | None, rows: int = 1, once: bool = False
) -> tuple[Transformer, Tokenizer]:
    """Load a model with the fastest parts for ``rows`` sequences; says so on standard error while it takes time.

    ``once``: for one answer only, so that starting soon is worth more than running fastest.
    """
    with _status(f"loading {name} …"):
        from axon_llm.checkpoint import load as load_checkpoint
        from axon_llm.fast import accelerate
        from axon_llm.fast.threads import fit_threads

        model, tokenizer = load_checkpoint(name, device=device, dtype=dtype, mapped=once)
        model = accelerate(model, quantize, rows=rows, once=once)
        fit_threads(model)
        return model, tokenizer


def cache_length(prompt: int, max_tokens: int, asked: int | None, limit: int) -> int:
    """Positions for a cache: what was asked for, else what prompt and answer need, within the model's limit.

    Raises:
        UsageError: asked for nonsense, or for more than the model's context.
        RequestError: the run needs more than fits.
    """
    if asked is not None and not 1 <= asked <= limit:
        raise UsageError(f"--max-seq-len must be from 1 to {limit}, the model's context, not {asked}")
    needed, room = prompt + max_tokens, limit if asked is None else asked
    if needed > room:
        raise RequestError(
            f"the prompt has {prompt} tokens and --max-tokens asks for {max_tokens} more; the context has {room}",
            code="context_length_exceeded",
            hint="Shorten the prompt or lower --max-tokens." if prompt < room else "Shorten the prompt.",
        )
    return room if asked is not None else needed


@contextmanager
def _status(text: str) -> Iterator[None]:
    console = stderr_console()
    if not console.is_terminal:
        yield
        return
    from rich.text import Text

    with console.status(Text(text, style="dim")):
        yield
