"""Who is asking: the tenant behind a request, from the gateway's word, an API key, or the lack of any need to know.

The tenant never comes from anything the client can write. Behind nginx it is an identity header that nginx overwrites,
believed only together with the gateway's secret (or on a Unix socket that only nginx can open). ``check`` is what
nginx asks through ``auth_request``, which passes on nothing but 2xx, 401 and 403: other refusals travel as a 403 with a
reason in a header, and nginx turns them back into the status they are.
"""

from __future__ import annotations

import hmac
import math
from dataclasses import dataclass
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from axon_llm.serving.http_errors import ApiError, unauthenticated, unavailable
from axon_llm.serving.keys import KeyStore
from axon_llm.serving.ports import StoreUnavailable
from axon_llm.serving.rate_limit import RateLimit
from axon_llm.serving.wire import IDENTIFIER

TENANT_HEADER = "x-axon-tenant"
SECRET_HEADER = "x-axon-gateway-secret"
REFUSAL_HEADER = "x-axon-refusal"
RETRY_HEADER = "x-axon-retry-after"
STORE_RETRY_S = (
    2.0  # how soon Redis is usually back: it restarts in well under a second, and clients should not pile up
)


class Identify(Protocol):
    """Returns the tenant of a request, or raises ``ApiError`` (401, 429, 503)."""

    async def __call__(self, request: Request) -> str:
        """Identify one request."""
        ...


@dataclass(frozen=True)
class Anybody:
    """No authentication: everybody is the same tenant."""

    tenant: str = "default"

    async def __call__(self, request: Request) -> str:
        """The one tenant."""
        return self.tenant


@dataclass(frozen=True)
class OneKey:
    """A single key, given in the environment; one tenant."""

    key: str
    tenant: str = "default"

    async def __call__(self, request: Request) -> str:
        """The one tenant, if the key is right."""
        if not hmac.compare_digest(bearer(request).encode(), self.key.encode()):
            raise unauthenticated()
        return self.tenant


@dataclass(frozen=True)
class Keys:
    """Keys and rates kept in Redis."""

    keys: KeyStore
    rate: RateLimit

    async def __call__(self, request: Request) -> str:
        """The tenant of the key, if its rate allows one more request."""
        presented = bearer(request)
        try:
            key = await self.keys.verify(presented)
            if key is None:
                raise unauthenticated()
            wait_s = await self.rate.wait_s(key.tenant, key.rate_per_minute)
        except StoreUnavailable as error:
            raise unavailable("Keys cannot be checked at the moment.", STORE_RETRY_S) from error
        if wait_s > 0:
            raise ApiError(429, "Too many requests; slow down.", code="rate_limit_exceeded", retry_after_s=wait_s)
        return key.tenant


@dataclass(frozen=True)
class Gateway:
    """The gateway has authenticated the request. An empty secret means that the socket itself is the proof."""

    secret: str

    async def __call__(self, request: Request) -> str:
        """The tenant in the gateway's header."""
        self.verify(request)
        tenants = request.headers.getlist(TENANT_HEADER)
        if len(tenants) != 1 or not IDENTIFIER.match(tenants[0]):
            raise unauthenticated()
        return tenants[0]

    def verify(self, request: Request) -> None:
        """Raises 401 unless the request came through the gateway."""
        presented = request.headers.getlist(SECRET_HEADER)
        if self.secret and not (
            len(presented) == 1 and hmac.compare_digest(presented[0].encode(), self.secret.encode())
        ):
            raise unauthenticated("This address is for the gateway.")


async def check(request: Request, gateway: Gateway, keys: Identify) -> Response:
    """Answers nginx's ``auth_request``: 204 with the tenant, 401, or 403 with the reason for another status."""
    gateway.verify(request)
    try:
        tenant = await keys(request)
    except ApiError as error:
        if error.status == 401:
            raise
        wait = str(max(1, math.ceil(error.retry_after_s or 1)))
        return Response(status_code=403, headers={REFUSAL_HEADER: error.code, RETRY_HEADER: wait})
    return Response(status_code=204, headers={TENANT_HEADER: tenant})


def bearer(request: Request) -> str:
    """The one bearer token of a request.

    Raises:
        ApiError: 401 without one, with two, or with another scheme.
    """
    values = request.headers.getlist("authorization")
    scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not token.strip():
        raise unauthenticated()
    return token.strip()
