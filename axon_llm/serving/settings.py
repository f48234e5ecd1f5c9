"""Settings of the serving processes: ``AXON_*`` environment variables, secrets also from files.

A secret (a URL that may hold a password) comes from its variable or from the file that ``<variable>_FILE`` names, as
container platforms mount them; never from the command line, where any user of the machine could read it. Reading
happens when a class is instantiated, not at import.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from axon_llm.errors import UsageError

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ServingSettings(BaseSettings):
    """What every process of the serving path needs to know. Field ``x`` is read from ``AXON_X``."""

    model_config = SettingsConfigDict(env_prefix="AXON_", extra="ignore", frozen=True)

    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    amqp_url: SecretStr = SecretStr("amqp://guest:guest@127.0.0.1:5672/%2F")
    tls_ca_file: Path | None = None  # trusted for rediss:// and amqps://, instead of the system's certificates

    lease_s: Seconds = 15.0  # silence after which a running job may be taken over whoever asks
    takeover_silence_s: Seconds = 3.0  # the same when the broker says that the job's previous consumer went away
    suspect_attempt: Annotated[int, Field(ge=2)] = 3  # from this attempt on a job runs alone
    max_attempts: Annotated[int, Field(ge=2)] = 5  # at this attempt it fails instead

    job_deadline_s: Annotated[float, Field(gt=0, le=1500)] = 300.0  # well under the broker's consumer timeout of 30 min
    job_ttl_s: Annotated[int, Field(ge=60)] = 3600  # log and status live this long after the deadline
    session_ttl_s: Annotated[int, Field(ge=60)] = 7 * 86400  # history lives this long after its last turn
    broker_heartbeat_s: Annotated[int, Field(ge=1, le=60)] = 10  # a peer silent for twice as long is gone
    queue_max_length: Annotated[int, Field(ge=1)] = 10_000
    delivery_limit: Annotated[int, Field(ge=5)] = 20

    publish_timeout_s: Seconds = 5.0
    redis_timeout_s: Seconds = 2.0  # one command, worker and session manager alike
    # a process that reaches neither broker nor Redis for so long at start exits with code 4
    start_timeout_s: Seconds = 30.0
    poll_s: Seconds = 1.0  # how often a stream reads the log although nothing woke it
    # a submitted job nobody claimed for so long is looked at, and published again if lost
    outbox_grace_s: Seconds = 10.0
    reaper: bool = True  # run the dead-letter reader and the outbox sweeper in this process

    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0  # 0: a free port, printed in the log

    @model_validator(mode="before")
    @classmethod
    def _secrets_from_files(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, field in cls.model_fields.items():
            if field.annotation is not SecretStr:
                continue
            variable = f"AXON_{name.upper()}"
            path = os.environ.get(f"{variable}_FILE")
            if not path:
                continue
            if os.environ.get(variable):
                raise ValueError(f"{variable} and {variable}_FILE are both set; keep one")
            try:
                values = {**values, name: Path(path).read_text(encoding="utf-8").strip()}
            except OSError as error:
                raise ValueError(f"{variable}_FILE: cannot read {path}: {error.strerror}") from None
        return values

    @field_validator("redis_url", "amqp_url")
    @classmethod
    def _known_scheme(cls, value: SecretStr, info: Any) -> SecretStr:
        schemes = {"redis_url": ("redis", "rediss", "unix"), "amqp_url": ("amqp", "amqps")}[info.field_name]
        if urlsplit(value.get_secret_value()).scheme not in schemes:
            raise ValueError(f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
        return value

    @model_validator(mode="after")
    def _order(self) -> ServingSettings:
        if self.takeover_silence_s > self.lease_s:
            raise ValueError("takeover_silence_s must not exceed lease_s")
        if self.suspect_attempt > self.max_attempts:
            raise ValueError("suspect_attempt must not exceed max_attempts")
        return self

    @property
    def places(self) -> str:
        """Where Redis and the broker are, without names and passwords; for people to read."""
        return f"Redis at {self.redis_place}, broker at {_place(self.amqp_url)}"

    @property
    def redis_place(self) -> str:
        """Where Redis is, likewise."""
        return _place(self.redis_url)

    @property
    def idempotency_ttl_s(self) -> int:
        """How long an idempotency key is bound: as long as its job is kept, and not a moment longer.

        The key is bound before the job is made, so it goes first. Were it the other way round, a repeated request
        would find the key and no job, and run again what has run already.
        """
        return int(self.job_deadline_s) + self.job_ttl_s


def _place(url: SecretStr) -> str:
    parts = urlsplit(url.get_secret_value())
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def read_settings(kind: type[ServingSettings] = ServingSettings, **overrides: Any) -> Any:
    """Read settings from the environment; keyword arguments that are not None beat it.

    Raises:
        UsageError: a value is out of range or malformed. The message names variables, never secret values.
    """
    try:
        return kind(**{name: value for name, value in overrides.items() if value is not None})
    except SettingsError as error:  # a list that is no JSON
        raise UsageError(str(error), hint="lists and objects are written as JSON") from None
    except ValidationError as error:
        faults = [
            f"AXON_{'_'.join(map(str, fault['loc'])).upper()}: {fault['msg']}" if fault["loc"] else fault["msg"]
            for fault in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise UsageError("; ".join(faults), hint="docs/settings.md describes every setting") from None
