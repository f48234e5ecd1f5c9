"""Running the command line inside the test's own process: quick, and with its streams at hand."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from cli.main import main

TINY = ("-m", "random:tiny", "--device", "cpu")


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output."""
        found: dict[str, Any] = json.loads(self.out)
        return found


class Piped(io.TextIOWrapper):
    """Standard input that comes from a pipe."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")


def axon(*words: str, stdin: bytes | str = b"") -> Result:
    """Run ``axon`` with these words."""
    out, err = io.StringIO(), io.StringIO()
    data = stdin.encode() if isinstance(stdin, str) else stdin
    with patch.object(sys, "stdin", Piped(data)), redirect_stdout(out), redirect_stderr(err):
        code = main(list(words))
    return Result(code, out.getvalue(), err.getvalue())
