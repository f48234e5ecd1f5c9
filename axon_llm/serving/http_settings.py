"""Settings of the session manager, from ``AXON_*`` variables; ``settings.py`` has what every serving process shares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, model_validator

from axon_llm.serving.settings import Seconds, ServingSettings

MIN_GATEWAY_SECRET = 16


class SessionManagerSettings(ServingSettings):
    """What the session manager needs to know besides broker and Redis.

    ``trust`` says where the tenant comes from. ``gateway``: from the identity header of whoever knows the gateway
    secret (or, with ``uds``, of whoever may open the socket); ``keys``: API keys are checked here; ``open``: there is
    one tenant, ``default``, and no authentication.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    uds: Path | None = None  # listen on this Unix socket instead of a port
    trust: Literal["gateway", "keys", "open"] = "keys"
    gateway_secret: SecretStr = SecretStr("")
    api_key: SecretStr = SecretStr("")  # `axon serve`: the one key that is accepted

    max_body_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024
    max_header_bytes: Annotated[int, Field(ge=1024)] = 32 * 1024
    header_timeout_s: Seconds = 10.0  # from the connection's first moment, or its last answer's, to the end of a head
    body_timeout_s: Seconds = 15.0  # for a whole body
    send_timeout_s: Seconds = 60.0  # a client that takes nothing for so long is gone
    heartbeat_s: Seconds = 15.0  # silence after which an open stream gets a comment line
    keep_alive_s: Annotated[int, Field(ge=1)] = 30
    drain_s: Annotated[int, Field(ge=0)] = 25  # SIGTERM: how long open answers may go on
    max_streams: Annotated[int, Field(ge=1)] = 2000  # generations answered at once by this process; beyond it, 503
    # the same of one tenant, who cannot so take every place in the queue; beyond it, 429
    max_streams_per_tenant: Annotated[int, Field(ge=1)] = 1000

    default_max_tokens: Annotated[int, Field(ge=1)] = (
        512  # where a request names none; lowered to what the context holds
    )
    models: tuple[str, ...] = ()  # accepted although no worker has announced them (scale from zero)

    rate_per_minute: Annotated[float, Field(gt=0)] = 600.0  # requests of a tenant; a key may carry another figure
    rate_burst_s: Seconds = 10.0  # so many seconds' worth of its rate may come at once

    @model_validator(mode="after")
    def _gateway_needs_a_secret_or_a_socket(self) -> SessionManagerSettings:
        length = len(self.gateway_secret.get_secret_value())
        if self.trust == "gateway" and self.uds is None and length < MIN_GATEWAY_SECRET:
            raise ValueError(
                f"AXON_TRUST=gateway needs AXON_GATEWAY_SECRET (at least {MIN_GATEWAY_SECRET} characters) "
                "or a Unix socket (AXON_UDS)"
            )
        return self
