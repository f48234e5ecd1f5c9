"""API keys: ``axk_<id>_<secret>``, looked up by id; Redis holds a hash of the secret, never the secret.

The secret is 256 random bits, so one round of SHA-256 is enough: there is nothing to guess, and no password to stretch.
A key names its tenant and may carry a rate of its own. Layout: ``axon:key:<id>`` a hash per key, ``axon:keys`` the ids.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from axon_llm.errors import UsageError
from axon_llm.serving.redis_scripts import store_errors
from axon_llm.serving.wire import IDENTIFIER

if TYPE_CHECKING:
    from redis.asyncio import Redis

_KEY = re.compile(r"axk_([0-9a-f]{16})_([A-Za-z0-9_\-]{43})")
_INDEX = "axon:keys"
_NO_HASH = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """What is stored of a key.

    Attributes:
        id: its public part.
        tenant: whose it is.
        label: for people.
        created_unix_s: when.
        revoked_unix_s: when it stopped being accepted; ``None`` while it is.
        rate_per_minute: requests per minute of its tenant; ``None`` for the server's default.
    """

    id: str
    tenant: str
    label: str
    created_unix_s: float
    revoked_unix_s: float | None = None
    rate_per_minute: float | None = None


class KeyStore:
    """The keys in one Redis. Every method raises ``StoreUnavailable`` when it cannot be reached."""

    def __init__(self, client: Redis) -> None:
        self._redis = cast("Any", client)

    async def create(self, tenant: str, label: str = "", rate_per_minute: float | None = None) -> tuple[ApiKey, str]:
        """Makes a key.

        Returns:
            what is stored, and the whole key, which cannot be had again.

        Raises:
            UsageError: the tenant's name cannot be part of a Redis key, or the rate is not positive.
        """
        if not IDENTIFIER.match(tenant):
            raise UsageError("A tenant's name has 1 to 128 of A-Z a-z 0-9 _ . - and begins with a letter or digit.")
        if rate_per_minute is not None and not 0 < rate_per_minute < 1e9:
            raise UsageError(f"The rate must be a positive number of requests per minute, not {rate_per_minute}.")
        secret = secrets.token_urlsafe(32)
        key = ApiKey(
            id=secrets.token_hex(8),
            tenant=tenant,
            label=label,
            created_unix_s=time.time(),
            rate_per_minute=rate_per_minute,
        )
        fields = {"hash": _hash(secret), "tenant": tenant, "label": label, "created": repr(key.created_unix_s)}
        if rate_per_minute is not None:
            fields["rate"] = repr(rate_per_minute)
        with store_errors("reading API keys"):
            await self._redis.hset(f"axon:key:{key.id}", mapping=fields)
            await self._redis.sadd(_INDEX, key.id)
        return key, f"axk_{key.id}_{secret}"

    async def verify(self, presented: str) -> ApiKey | None:
        """The key whose text this is; ``None`` for a malformed, unknown, wrong or revoked one."""
        match = _KEY.fullmatch(presented)
        if match is None:
            return None
        with store_errors("reading API keys"):
            stored = await self._redis.hgetall(f"axon:key:{match[1]}")
        fields = _text(stored)
        # Compared even when there is no such key, so that the time taken does not tell which ids exist.
        same = hmac.compare_digest(_hash(match[2]), fields.get("hash", _NO_HASH))
        if not same or not fields or "revoked" in fields:
            return None
        return _read(match[1], fields)

    async def list(self) -> list[ApiKey]:
        """Every key, revoked ones included, oldest first."""
        with store_errors("reading API keys"):
            ids = [_decoded(raw) for raw in await self._redis.smembers(_INDEX)]
            stored = [(key_id, _text(await self._redis.hgetall(f"axon:key:{key_id}"))) for key_id in ids]
        return sorted((_read(key_id, fields) for key_id, fields in stored if fields), key=lambda k: k.created_unix_s)

    async def revoke(self, key_id: str) -> bool:
        """Stops a key being accepted, from the next request on. False if there is none of that id."""
        name = f"axon:key:{key_id}"
        with store_errors("reading API keys"):
            if not re.fullmatch(r"[0-9a-f]{16}", key_id) or not await self._redis.exists(name):
                return False
            await self._redis.hsetnx(name, "revoked", repr(time.time()))
        return True

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.aclose()


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _decoded(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _text(fields: dict[Any, Any]) -> dict[str, str]:
    return {_decoded(name): _decoded(value) for name, value in fields.items()}


def _read(key_id: str, fields: dict[str, str]) -> ApiKey:
    return ApiKey(
        id=key_id,
        tenant=fields["tenant"],
        label=fields.get("label", ""),
        created_unix_s=float(fields["created"]),
        revoked_unix_s=float(fields["revoked"]) if "revoked" in fields else None,
        rate_per_minute=float(fields["rate"]) if "rate" in fields else None,
    )
