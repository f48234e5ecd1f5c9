"""Per-tenant request rate, kept in Redis so that every session manager counts the same requests.

The generic cell rate algorithm (ITU-T I.371): one timestamp per tenant, the moment at which its allowance would be full
again. A request moves it one interval on; one that would move it further ahead than the burst allows is refused, and
the distance is exactly how long to wait. One script, one round trip, on the clock of Redis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from axon_llm.serving.redis_scripts import store_errors

if TYPE_CHECKING:
    from redis.asyncio import Redis

# KEYS[1] the tenant's timestamp, ms · ARGV[1] interval, ms · ARGV[2] burst, requests → ms to wait, 0 = allowed
_SCRIPT = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + clock[2] / 1000
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local full_at = math.max(tonumber(redis.call('GET', KEYS[1]) or now), now) + interval
local wait = full_at - now - interval * burst
if wait > 0 then return math.ceil(wait) end
redis.call('SET', KEYS[1], full_at, 'PX', math.ceil(full_at - now) + 1000)
return 0
"""


class RateLimit:
    """Allows each tenant ``per_minute`` requests in the long run, and those of ``burst_s`` seconds at once.

    Args:
        client: an asyncio Redis client.
        per_minute: the rate of a tenant whose key names none.
        burst_s: how many seconds' worth of its own rate a tenant may send together; never less than one request.
    """

    def __init__(self, client: Redis, *, per_minute: float, burst_s: float) -> None:
        self._script = cast("Any", client.register_script(_SCRIPT))
        self._per_minute = per_minute
        self._burst_s = burst_s

    async def wait_s(self, tenant: str, per_minute: float | None = None) -> float:
        """Counts one request. 0 if it may pass; else the seconds after which one could, and it was not counted.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        interval_ms = 60_000.0 / (per_minute or self._per_minute)
        burst = max(1.0, self._burst_s * 1000.0 / interval_ms)
        with store_errors("counting a request"):
            wait_ms = await self._script(keys=[f"axon:rate:{{{tenant}}}"], args=[interval_ms, burst])
        return float(wait_ms) / 1000.0
