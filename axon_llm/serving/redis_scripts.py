"""What the two Redis clients of the serving path share: key names, the Lua scripts, and which errors mean "not now".

Every key of one job or session carries the hash tag ``{tenant:session}`` (or ``{tenant:job}`` without a session), so
that a script touches one slot of a cluster:

    axon:{s}:job:<j>   hash    state of the job               axon:{s}:tok:<j>   stream  its log, ids 1-0, 2-0 …
    axon:{s}:ch:<j>    channel live entries                   axon:{s}:hist      list    committed turns
    axon:{s}:turn      string  the running turn's job id      axon:ref:<t>:<j>   string  which session a job belongs to
    axon:idem:<t>:<k>  string  idempotency key → job          axon:workers       zset    ids; axon:worker:<w> their
    cards axon:outbox        zset    submitted, not yet confirmed   axon:watch         zset    confirmed, not yet
    ended

Next: ``token_log.py`` (the worker's side), ``session_store.py`` (the session manager's).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha1, sha256
from importlib.resources import files
from typing import Any, Literal

import redis.exceptions
from redis.driver_info import DriverInfo

from axon_llm.serving.ports import StoreRefused, StoreUnavailable
from axon_llm.serving.settings import ServingSettings
from axon_llm.serving.wire import Job, JobRef

OUTBOX = "axon:outbox"
WATCH = "axon:watch"
WORKERS = "axon:workers"

ScriptName = Literal["submit", "claim", "emit", "finish", "release", "look", "again", "due", "forget", "unreserve"]

# Replies that say "not now": memory full, disk full, a replica, still loading. All leave the data as it was.
_NOT_NOW = ("OOM", "MISCONF", "READONLY", "LOADING", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "NOREPLICAS", "BUSY")


@dataclass(frozen=True)
class Script:
    """A Lua script and the SHA-1 under which Redis caches it."""

    source: str
    sha: str


@cache
def script(name: ScriptName) -> Script:
    """Read a script of this package, with the common part in front."""
    folder = files("axon_llm.serving") / "lua"
    parts = [(folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("common", name)]
    source = "#!lua\n" + "\n".join(parts)
    return Script(source, sha1(source.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True)
class Keys:
    """The keys of one session, or of one job that has none."""

    tag: str

    @classmethod
    def of(cls, ref: JobRef) -> Keys:
        """Return the keys for a job."""
        return cls(f"axon:{{{ref.tenant}:{ref.session_id or ref.job_id}}}")

    @classmethod
    def of_session(cls, tenant: str, session_id: str) -> Keys:
        """Return the keys for a session."""
        return cls(f"axon:{{{tenant}:{session_id}}}")

    @property
    def history(self) -> str:
        """List of committed turns."""
        return f"{self.tag}:hist"

    @property
    def turn(self) -> str:
        """Id of the job that is the running turn."""
        return f"{self.tag}:turn"

    @property
    def job_prefix(self) -> str:
        """What precedes a job id in the key of its state."""
        return f"{self.tag}:job:"

    def job(self, job_id: str) -> str:
        """Hash with the job's state."""
        return f"{self.tag}:job:{job_id}"

    def log(self, job_id: str) -> str:
        """Stream with the job's entries."""
        return f"{self.tag}:tok:{job_id}"

    def channel(self, job_id: str) -> str:
        """Pub/Sub channel with the job's live entries."""
        return f"{self.tag}:ch:{job_id}"


def ref_key(tenant: str, job_id: str) -> str:
    """Return the key that says to which session a job belongs."""
    return f"axon:ref:{tenant}:{job_id}"


def idempotency_key(tenant: str, key: str) -> str:
    """Return the key of an idempotency key; hashed, because clients choose it freely."""
    return f"axon:idem:{tenant}:{sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"


def worker_key(worker_id: str) -> str:
    """Return the key of a worker's card."""
    return f"axon:worker:{worker_id}"


def schedule_member(ref: JobRef) -> str:
    """Return how a job is written in the outbox and the watch list."""
    return json.dumps([ref.tenant, ref.job_id, ref.session_id], separators=(",", ":"))


def read_schedule_member(member: bytes) -> JobRef:
    """Return the job that a member of the outbox or the watch list stands for."""
    tenant, job_id, session_id = json.loads(member)
    return JobRef(tenant=tenant, job_id=job_id, session_id=session_id)


def job_fields(job: Job, body: bytes, settings: ServingSettings) -> list[Any]:
    """Return what a job is stored with: body, model, trace id, creation, deadline and expiry in ms since 1970."""
    deadline_ms = round(job.deadline_unix_s * 1000)
    return [
        body,
        job.model,
        job.trace_id,
        round(job.created_at_unix_s * 1000),
        deadline_ms,
        deadline_ms + settings.job_ttl_s * 1000,
    ]


def milliseconds(seconds: float) -> int:
    """Return a duration as Redis wants it."""
    return max(1, round(seconds * 1000))


@contextmanager
def store_errors(doing: str) -> Iterator[None]:
    """Turn "cannot be reached" and "not now" into ``StoreUnavailable``; let everything else through."""
    try:
        yield
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
        if isinstance(error, redis.exceptions.AuthenticationError | redis.exceptions.AuthorizationError):
            raise StoreRefused("Redis refused the login", hint="check AXON_REDIS_URL") from error
        raise StoreUnavailable(
            f"Redis did not answer while {doing} ({type(error).__name__})", hint="check AXON_REDIS_URL"
        ) from error
    except redis.exceptions.ResponseError as error:
        if not is_not_now(error):
            raise
        raise StoreUnavailable(f"Redis refuses writes while {doing} ({type(error).__name__})") from error


def is_not_now(error: Exception) -> bool:
    """Whether an error reply means that the same command will work later."""
    if isinstance(error, redis.exceptions.OutOfMemoryError | redis.exceptions.ReadOnlyError):
        return True
    if isinstance(error, redis.exceptions.BusyLoadingError | redis.exceptions.TryAgainError):
        return True
    text = str(error)
    return text.startswith(_NOT_NOW) or "OOM command not allowed" in text


def connection_options(settings: ServingSettings) -> dict[str, Any]:
    """Return the options that every client of this package connects with."""
    options: dict[str, Any] = {
        "socket_timeout": settings.redis_timeout_s,
        "socket_connect_timeout": settings.redis_timeout_s,
        "socket_keepalive": True,
        "health_check_interval": 15,
        # A new connection does not say which library it is: redis-py sends that as two commands before it reads a
        # reply, and a health check that falls due between them takes the first one's reply for its own.
        "driver_info": DriverInfo(name="", lib_version=""),
        "protocol": 2,
    }
    if settings.tls_ca_file is not None and settings.redis_url.get_secret_value().startswith("rediss://"):
        options["ssl_ca_certs"] = str(settings.tls_ca_file)
    return options
