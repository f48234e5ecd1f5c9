"""The asyncio client of the session manager: a bounded pool that callers wait for.

redis-py's own pool refuses the hundred-and-first command at once; five hundred streams that look at their logs in the
same moment must wait a few milliseconds for each other instead. Next: ``session_store.py``, ``keys.py``.
"""

from __future__ import annotations

from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from axon_llm.serving.redis_scripts import connection_options
from axon_llm.serving.settings import ServingSettings

MAX_CONNECTIONS = 32
# Waiting one's turn is not Redis being away: that is for the time-out of each command to find.
TURN_TIMEOUT_S = 10.0


def asyncio_client(settings: ServingSettings) -> Any:
    """A client for one event loop; ``aclose`` closes its connections too.

    Any, because redis-py's annotations allow for decoded and undecoded replies at once; these are bytes.
    """
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        settings.redis_url.get_secret_value(),
        max_connections=MAX_CONNECTIONS,
        timeout=TURN_TIMEOUT_S,
        retry=Retry(NoBackoff(), 1),
        **connection_options(settings),
    )
    return redis.asyncio.Redis.from_pool(pool)
