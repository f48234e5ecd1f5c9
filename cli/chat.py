"""``axon chat``: a conversation in the terminal, or a message per line from standard input."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from axon_llm.errors import AxonError, TokenizerError, UsageError

from . import options
from .sampling import given, sampling

if TYPE_CHECKING:
    from .conversation import Conversation

MOST_POSITIONS = 4096  # of the cache, if --max-seq-len does not say: it is allocated at the start
HELP = """\
/help           this list
/reset          forget the conversation (the system message stays)
/system TEXT    set the system message and begin anew; without TEXT, none
/stats          tokens, reuse and the cache's memory
/exit           leave; so does Ctrl-D
Ctrl-C stops an answer; what was said so far stays in the conversation.
A line that ends with a backslash goes on in the next; // begins a message with a slash."""


def command(
    model: options.Model = options.DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option("--system", "-s", help="The system message.")] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    compile: options.Compile = False,
    speculate: options.Speculate = False,
    max_seq_len: options.MaxSeqLen = None,
) -> None:
    """Talk to a model. Answers go to standard output, everything else to standard error.

    Earlier turns stay in the KV cache; after each answer you see how many tokens of the prompt came from it. Reads
    one message per line. /help lists the commands.
    """
    from axon_llm.engine.engine import Engine
    from axon_llm.engine.speculate import DEFAULT_DRAFTS

    from .conversation import Conversation
    from .loading import cache_length, load

    wanted = given(
        max_tokens,
        stop,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    loaded, tokenizer = load(model, device=device, dtype=dtype, quantize=quantize)
    if not tokenizer.has_chat_template:
        raise TokenizerError(f"{model} has no chat template", "Use `axon generate`, or a chat (instruct) model.")
    params = sampling(tokenizer, wanted)
    context = loaded.config.max_position_embeddings
    length = cache_length(1, 1, min(context, MOST_POSITIONS) if max_seq_len is None else max_seq_len, context)
    engine = Engine(
        loaded, tokenizer, max_seq_len=length, compile=compile, speculate=DEFAULT_DRAFTS if speculate else 0
    )
    chat = Conversation(engine, params, system or "")
    if sys.stdin.isatty():
        _note(f"{model}, {length} tokens of context. Type a message; /help for commands, Ctrl-D to leave.")
    for line in _lines():
        if line.startswith("/") and not line.startswith("//"):
            if not _obey(chat, line):
                return
        else:
            _turn(chat, line.removeprefix("/") if line.startswith("//") else line)


def _turn(chat: Conversation, text: str) -> None:
    """One message and its answer."""
    forgotten, failed = chat.forgotten, None
    try:
        with _ctrl_c_cancels(chat) as started:
            for event in chat.answer(text, started):
                sys.stdout.write(event.text)
                sys.stdout.flush()
                failed = event.error
    except AxonError as error:
        if not sys.stdin.isatty():
            raise
        _note(f"axon: error: {error.message} {error.hint}")
        return
    print(flush=True)
    if failed and not sys.stdin.isatty():
        raise AxonError(failed)
    if failed:
        _note(f"axon: error: {failed}")
    if chat.forgotten > forgotten:
        _note(f"the context was full: the oldest {chat.forgotten - forgotten} messages were dropped")
    last = chat.turns[-1]
    if last.usage and last.timings:
        from .generate import stats_line

        _note(stats_line(last.usage, last.timings, last.finish_reason))


@contextmanager
def _ctrl_c_cancels(chat: Conversation) -> Iterator[Any]:
    """Inside, the first Ctrl-C asks the engine to end the answer, the second ends the program.

    An exception out of the middle of a step would cost the turn its usage and timings, and could leave the engine and
    its cache with different ideas of what is in it.
    """
    running: list[str] = []

    def interrupted(*_: object) -> None:
        if not running:
            raise KeyboardInterrupt
        chat.engine.cancel(running.pop())

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield running.append
    finally:
        signal.signal(signal.SIGINT, before)


def _obey(chat: Conversation, line: str) -> bool:
    """Carry out a command; False to leave."""
    name, _, argument = line.partition(" ")
    if name in ("/exit", "/quit"):
        return False
    if name == "/reset":
        chat.reset()
        _note("forgotten")
    elif name == "/system":
        chat.system = argument.strip()
        chat.reset()
        _note("system message set" if chat.system else "no system message")
    elif name == "/stats":
        _note(_stats(chat))
    else:
        _note(HELP if name == "/help" else f"no command {name}\n{HELP}")
    return True


def _stats(chat: Conversation) -> str:
    from .render import human_bytes

    usages = [turn.usage for turn in chat.turns if turn.usage]
    prompt, cached = sum(usage.prompt_tokens for usage in usages), sum(usage.cached_tokens for usage in usages)
    share = f" ({100 * cached / prompt:.0f} %)" if prompt else ""
    stats = chat.engine.stats()
    return (
        f"turns: {len(chat.turns)}, {sum(usage.completion_tokens for usage in usages)} tokens generated\n"
        f"prompt tokens: {prompt}, of which {cached} were in the cache already{share}\n"
        f"cache: {human_bytes(stats.cache_bytes)}, of which {human_bytes(stats.cache_bytes_resident)} are in use"
    )


def _lines() -> Iterator[str]:
    """What is typed or piped in, message by message; blank ones left out."""
    lines = _typed() if sys.stdin.isatty() else _piped()
    for line in lines:
        while line.endswith("\\"):
            line = line[:-1] + "\n" + next(lines, "")
        if line.strip():
            yield line


def _typed() -> Iterator[str]:
    """Lines from a terminal, with history and editing where Python has them. Ctrl-C drops the line, twice it leaves."""
    with suppress(ImportError):
        import readline  # input() uses it once it is imported

        readline.parse_and_bind("set enable-bracketed-paste on")  # several lines pasted are one message
    interrupted = False
    while True:
        try:
            if sys.stdout.isatty():
                line = input("› ")
            else:  # input() would write its prompt among the answers
                print("› ", end="", file=sys.stderr, flush=True)
                line = input()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            _note("\nCtrl-D, /exit or Ctrl-C again leaves")
            continue
        interrupted = False
        yield line


def _piped() -> Iterator[str]:
    """Lines of standard input, as they come."""
    for number, data in enumerate(iter(sys.stdin.buffer.readline, b""), start=1):
        try:
            yield data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"line {number} of standard input is not UTF-8 (byte {error.start})", "Convert it, e.g. with iconv."
            ) from None


def _note(text: str) -> None:
    from rich.text import Text

    from .render import stderr_console

    console = stderr_console()
    console.print(Text(text, style="dim"), soft_wrap=not console.is_terminal)  # a terminal breaks lines within words
