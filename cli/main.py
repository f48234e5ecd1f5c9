"""``axon``: one command per file, imported only when it is called.

``axon --help`` is answered from the table below without importing typer, rich or torch. Whatever goes wrong comes out
as one line and a hint on standard error, with the exit code of its kind: 0 fine, 1 failed or mismatch, 2 usage, 3 model
not found or unreadable, 4 broker or Redis unreachable, 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from axon_llm import __version__
from axon_llm.errors import AxonError
from axon_llm.fast.memory import prefer_huge_pages

# command → (file, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("generate", "Complete a prompt; text on standard output."),
    "chat": ("chat", "Talk to a model; earlier turns stay in the KV cache."),
    "compare": ("compare", "Generate with the cache and without it: same tokens, what each costs."),
    "bench": ("bench", "Measure prefill and decode against this machine's limits."),
    "inspect": ("inspect", "Parameters, bytes, and what the cache will take, without loading weights."),
    "quantize": ("quantize", "Write a checkpoint with packed 8- or 4-bit weights."),
    "serve": ("serve", "OpenAI-compatible server in one process, with nothing else to install."),
    "session-manager": ("session_manager", "The HTTP side of the serving path (RabbitMQ and Redis)."),
    "worker": ("worker", "The inference side of the serving path: takes jobs, decodes, emits tokens."),
    "keys": ("keys", "Create, list and revoke API keys."),
    "load": ("load", "Put load on an OpenAI-compatible server and report latencies."),
}
_NO_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|DefaultCPUAllocator|out of memory")
_NO_MEMORY_HINT = "A smaller --max-seq-len takes less for the cache, --quantize int8 or int4 less for the weights."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; the installed ``axon`` exits with it."""
    _mend_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except SystemExit as end:  # typer makes exit code 1 of a broken pipe
        return _reader_had_enough() if isinstance(end.__context__, BrokenPipeError) else int(end.code or 0)
    except BrokenPipeError:
        return _reader_had_enough()
    except KeyboardInterrupt:
        return 130
    except AxonError as error:
        return _fail(error.message, error.hint, error.exit_code)
    except OSError as error:  # a disk that is full, a folder that may not be written to
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", _NO_MEMORY_HINT if error.errno == errno.ENOMEM else "", 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of typer's
            return _fail(error.format_message(), f"See `axon {words[0]} --help`.", getattr(error, "exit_code", 2))
        if type(error).__name__ == "Abort":
            return 130
        if os.environ.get("AXON_DEBUG"):
            raise
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
            wanted = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
            return _fail(f"not enough memory{f' for {wanted[1]}' if wanted else ''}", _NO_MEMORY_HINT, 1)
        return _fail(f"{type(error).__name__}: {error}", "This is a defect in Axon; AXON_DEBUG=1 shows where.", 1)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        if len(words) > 1 and words[0] == "help":
            return _dispatch([words[1], "--help"])
        print(help_text())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"axon {__version__}")
        return 0
    if words[0] not in COMMANDS:
        near = get_close_matches(words[0], COMMANDS, n=1)
        hint = f"Did you mean `axon {near[0]}`?" if near else "See `axon --help`."
        return _fail(f"there is no command {words[0]!r}", hint, 2)
    return _run(words[0], words[1:])


def _run(name: str, words: list[str]) -> int:
    prefer_huge_pages()  # before anything imports torch
    import typer

    command = import_module(f".{COMMANDS[name][0]}", __package__).command
    if not isinstance(command, typer.Typer):
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        app.command(name)(command)
        command = app
    command.info.context_settings = {"help_option_names": ["-h", "--help"]}  # a group hands it on to its commands
    runner: Any = typer.main.get_command(command)
    result = runner.main(args=words, prog_name=f"axon {name}", standalone_mode=False)
    sys.stdout.flush()
    return result if isinstance(result, int) else 0


def help_text() -> str:
    """What ``axon --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = ["Usage: axon COMMAND [OPTIONS]", "", "LLM serving with its KV cache in plain sight.", "", "Commands:"]
    lines += [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    lines += [
        "",
        "Options:",
        "  -h, --help     This text; `axon COMMAND --help` for a command's options.",
        "  -V, --version  The version.",
        "",
        'Try: axon generate "Once upon a time"',
    ]
    return "\n".join(lines)


def _mend_streams() -> None:
    """Closed standard streams become the null device, and what an encoding lacks becomes a question mark.

    A descriptor from 0 to 2 that stayed free would be given to the next file that is opened, which would then take what
    is printed.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(null, True)  # as the standard streams are
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:
                setattr(sys, name, open(null, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - for good
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _reader_had_enough() -> int:
    """``axon generate … | head`` is not a failure; what is still buffered must not fail either, at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fail(message: str, hint: str, code: int) -> int:
    sys.stdout.flush()
    print(f"axon: error: {' '.join(str(message).split())}", file=sys.stderr)
    if hint:
        print(f"axon: hint: {hint}", file=sys.stderr)
    return code


def run() -> None:
    """Entry point of the installed ``axon``."""
    sys.exit(main())


if __name__ == "__main__":
    run()
