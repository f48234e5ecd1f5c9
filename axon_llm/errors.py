"""Every error Axon raises on purpose.

    AxonError                    exit code 1
    ├── UsageError               2   an option or argument that makes no sense
    ├── RequestError             2   one generation request that cannot be served as asked (HTTP 400)
    ├── ModelError               3   a model that cannot be found or read
    │   ├── ModelNotFound
    │   ├── ConfigError              config.json is malformed or asks for something unsupported
    │   ├── CheckpointError          tensors missing, extra, wrongly shaped, truncated, or not safetensors
    │   └── TokenizerError           tokenizer or chat template missing, malformed or not matching the model
    └── ServiceUnavailable       4   the broker or Redis cannot be reached

A message names the value, the limit and, in ``hint``, what to do about it. The command line prints both and exits with
``exit_code``; nothing here prints or logs.
"""

from __future__ import annotations


class AxonError(Exception):
    """Base class: a problem Axon understands and can explain in one line.

    Args:
        message: what is wrong, with the offending value.
        hint: what the user can do about it; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(AxonError):
    """An option or argument that makes no sense, alone or together with another."""

    exit_code = 2


class RequestError(AxonError):
    """One generation request that cannot be served as asked.

    Args:
        message: what is wrong, with the numbers.
        code: a stable identifier such as ``"context_length_exceeded"``.
        param: the name of the offending request field, where there is one.
        hint: what to do about it.
    """

    exit_code = 2

    def __init__(
        self, message: str, *, code: str = "invalid_request", param: str | None = None, hint: str = ""
    ) -> None:
        super().__init__(message, hint)
        self.code = code
        self.param = param


class ModelError(AxonError):
    """A model that cannot be found, read or understood."""

    exit_code = 3


class ModelNotFound(ModelError):
    """No folder, shipped model or downloadable repository of that name."""


class ConfigError(ModelError):
    """``config.json`` is malformed, or asks for something that would change the numbers and is not supported."""


class CheckpointError(ModelError):
    """The weights cannot be loaded: missing, extra or wrongly shaped tensors, a damaged or unsafe file."""


class TokenizerError(ModelError):
    """The tokenizer or chat template is missing, malformed, or does not belong to the model."""


class ServiceUnavailable(AxonError):
    """The message broker or Redis cannot be reached."""

    exit_code = 4
