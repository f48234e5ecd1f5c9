"""nginx with the shipped configuration, in front of session managers of the test process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axon_llm.serving.http_auth import Keys
from axon_llm.serving.keys import KeyStore
from deploy.gateway import write_gateway
from tests.integration.http_rig import Backend
from tests.integration.servers import NginxServer

SECRET = "a-secret-of-the-tests-only"


class GatewayServer(NginxServer):
    """nginx on a free port, with ``deploy/nginx`` as its configuration."""

    def __init__(self, folder: Path, session_managers: Sequence[str], **options: Any) -> None:
        super().__init__(folder, "")
        self._options = options
        self.point_at(session_managers)

    def point_at(self, session_managers: Sequence[str]) -> None:
        """Writes the configuration; takes effect at start or reload."""
        write_gateway(
            self.folder,
            secret=SECRET,
            listen=f"127.0.0.1:{self.port}",
            session_managers=[address.removeprefix("http://") for address in session_managers],
            **self._options,
        )

    @property
    def url(self) -> str:
        scheme = "https" if self._options.get("certificate") else "http"
        return f"{scheme}://127.0.0.1:{self.port}"


class Front:
    """The whole front: nginx, one or more session managers that trust it, a worker; and keys at hand."""

    def __init__(self, folder: Path, backend: Backend, session_managers: int = 1, **gateway: Any) -> None:
        self.backend = backend
        self.rigs = [backend.rig() for _ in range(session_managers)]
        self.gateway = GatewayServer(folder, [rig.url for rig in self.rigs], **gateway)
        self.gateway.start()
        self.url = self.gateway.url

    @property
    def keys(self) -> KeyStore:
        keys = self.rigs[0].service.keys
        assert isinstance(keys, Keys)
        return keys.keys

    def key(self, tenant: str, rate_per_minute: float = 1e6) -> str:
        """Makes a key; its rate is no hindrance unless a test wants one."""
        text: str = self.rigs[0].ask(self.keys.create(tenant, rate_per_minute=rate_per_minute))[1]
        return text

    def headers(self, tenant: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key(tenant)}"}

    def stop(self) -> None:
        self.gateway.stop()
        for rig in self.rigs:
            rig.stop()
