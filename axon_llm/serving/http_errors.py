"""Errors as the OpenAI API shapes them: a status, and ``{"error": {message, type, param, code}}``.

Every refusal of the session manager is an ``ApiError``; the constructors below are the ones that more than one route
needs, so that the same mistake reads the same everywhere. This file knows nothing of routes, jobs or stores.
Read ``http_app.py`` next: it is what turns an ``ApiError`` into a response.
"""

from __future__ import annotations

import json
import math

from axon_llm.errors import AxonError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(AxonError):
    """One request refused.

    Args:
        status: the HTTP status.
        message: what is wrong, with the value and the limit; shown to the client.
        code: a stable identifier, ``"context_length_exceeded"`` for instance.
        param: the request field at fault, where there is one.
        retry_after_s: seconds after which a retry makes sense; sent as ``Retry-After``, rounded up.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def type(self) -> str:
        """The error class in OpenAI's words; clients choose their exception by the status, people read this."""
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, object]:
        """The JSON body."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def encoded(self) -> bytes:
        """The JSON body as bytes."""
        return json.dumps(self.body()).encode()

    def headers(self) -> dict[str, str]:
        """Headers beyond content type and length: ``Retry-After`` and, for 401, the scheme that is expected."""
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400: a field that is there and makes no sense."""
    return ApiError(400, message, code=code, param=param)


def invalid_json(message: str) -> ApiError:
    """400: the body is not the JSON object it should be."""
    return ApiError(400, message, code="invalid_json")


def unauthenticated(message: str = "No valid API key was given. Send it as `Authorization: Bearer axk_…`.") -> ApiError:
    """401: the same answer for no key, a wrong one and a revoked one, so that nothing can be learnt by trying."""
    return ApiError(401, message, code="invalid_api_key")


def not_found(what: str, name: str) -> ApiError:
    """404: it does not exist, or belongs to another tenant; the two are not told apart."""
    return ApiError(404, f"The {what} `{name}` does not exist.", code=f"{what}_not_found", param=what)


def conflict(message: str, code: str, param: str | None = None) -> ApiError:
    """409: well formed, and at odds with what is stored."""
    return ApiError(409, message, code=code, param=param)


def unavailable(message: str, retry_after_s: float, code: str = "service_unavailable") -> ApiError:
    """503: nothing wrong with the request; ``retry_after_s`` is an estimate, never a constant out of the air."""
    return ApiError(503, message, code=code, retry_after_s=retry_after_s)
