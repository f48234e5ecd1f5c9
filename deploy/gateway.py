"""Fills in the gateway's configuration: ``python -m deploy.gateway FOLDER`` writes one that ``nginx -c`` takes.

AXON_GATEWAY_SECRET(_FILE)  shared with the session managers; written to a file that only its owner can read
AXON_GATEWAY_LISTEN         comma-separated addresses; default 127.0.0.1:8080
AXON_GATEWAY_PROBES         the same for /health and /ready, away from clients; default none
AXON_GATEWAY_PROCESSES      worker processes; default auto, one per core
AXON_SESSION_MANAGERS       comma-separated host:port or unix:/path; default 127.0.0.1:8000
AXON_MAX_BODY_BYTES         the session managers' limit; default 65536
AXON_SLOW_CLIENT_S          time for a head, and between two pieces of a body; default 10
AXON_TLS_CERTIFICATE, AXON_TLS_KEY   files, both or neither

In a container ``docker/gateway-entrypoint.sh`` does the same, without Python and without TLS.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_HERE = Path(__file__).parent / "nginx"
_VARIABLE = re.compile(r"\$\{(AXON_[A-Z_]+)\}")
# What may stand between the quotes of a header's value, or as an address, without meaning anything to nginx.
_SECRET = re.compile(r"[A-Za-z0-9_\-.~+/=]{16,}")
_ADDRESS = re.compile(r"[A-Za-z0-9_\-.:/\[\]]+")


def write_gateway(
    folder: Path,
    *,
    secret: str,
    listen: str = "127.0.0.1:8080",
    probes: str = "",
    processes: str = "auto",
    session_managers: Sequence[str] = ("127.0.0.1:8000",),
    max_body_bytes: int = 64 * 1024,
    slow_client_s: int = 10,
    certificate: Path | None = None,
    key: Path | None = None,
) -> Path:
    """Writes the configuration into a folder and returns the main file.

    Raises:
        ValueError: a value that nginx could misread, or a certificate without its key.
    """
    if not _SECRET.fullmatch(secret):
        raise ValueError("the gateway secret needs 16 or more of the characters A-Z a-z 0-9 _ - . ~ + / =")
    if not session_managers or not all(_ADDRESS.fullmatch(address) for address in session_managers):
        raise ValueError("session managers are host:port or unix:/path")
    if processes != "auto" and not re.fullmatch("[1-9][0-9]{0,2}", processes):
        raise ValueError("the number of worker processes is a number from 1 to 999, or auto")
    if (certificate is None) != (key is None):
        raise ValueError("a certificate and its key go together")
    values = {
        "AXON_GATEWAY_DIR": str(folder),
        "AXON_GATEWAY_PROCESSES": processes,
        "AXON_LISTEN_LINES": _listen(listen, " ssl http2" if certificate else ""),
        # max_fails=0: with one session manager, marking it as down would turn a hiccup into an outage.
        "AXON_SERVER_LINES": " ".join(f"server {address} max_fails=0;" for address in session_managers),
        "AXON_MAX_BODY_BYTES": str(max_body_bytes),
        "AXON_SLOW_CLIENT_S": str(slow_client_s),
        "AXON_PROBE_LINES": _listen(probes) if probes else "",
    }
    tls = ""
    if certificate and key:
        tls = (
            f"ssl_certificate {certificate};\nssl_certificate_key {key};\nssl_protocols TLSv1.2 TLSv1.3;\n"
            "ssl_session_cache shared:tls:10m;\n"
        )
    folder.mkdir(parents=True, exist_ok=True)
    secret_file = folder / "gateway-secret.conf"
    secret_file.touch(mode=0o600)
    secret_file.chmod(0o600)
    secret_file.write_text(f'proxy_set_header X-Axon-Gateway-Secret "{secret}";\n')
    (folder / "tls.conf").write_text(tls)
    for name in ("proxy.conf", "errors.conf", "headers.conf"):
        (folder / name).write_text((_HERE / name).read_text())
    (folder / "probes.conf").write_text(_filled("probes.conf.template", values) if probes else "")
    main = folder / "nginx.conf"
    main.write_text(_filled("nginx.conf.template", values))
    return main


def _listen(addresses: str, options: str = "") -> str:
    if not all(_ADDRESS.fullmatch(address) for address in addresses.split(",")):
        raise ValueError("addresses to listen on are port, host:port or [host]:port")
    return " ".join(f"listen {address}{options};" for address in addresses.split(","))


def _filled(template: str, values: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda match: values[match[1]], (_HERE / template).read_text())


def main() -> None:
    """Reads the environment and writes the configuration."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m deploy.gateway FOLDER")
    environment = os.environ
    secret = environment.get("AXON_GATEWAY_SECRET", "")
    if path := environment.get("AXON_GATEWAY_SECRET_FILE"):
        secret = Path(path).read_text().strip()
    paths = [
        Path(environment[name]) if environment.get(name) else None for name in ("AXON_TLS_CERTIFICATE", "AXON_TLS_KEY")
    ]
    try:
        written = write_gateway(
            Path(sys.argv[1]).resolve(),
            secret=secret,
            listen=environment.get("AXON_GATEWAY_LISTEN") or "127.0.0.1:8080",
            probes=environment.get("AXON_GATEWAY_PROBES", ""),
            processes=environment.get("AXON_GATEWAY_PROCESSES") or "auto",
            session_managers=(environment.get("AXON_SESSION_MANAGERS") or "127.0.0.1:8000").split(","),
            max_body_bytes=_whole(environment, "AXON_MAX_BODY_BYTES", 64 * 1024),
            slow_client_s=_whole(environment, "AXON_SLOW_CLIENT_S", 10),
            certificate=paths[0],
            key=paths[1],
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    sys.stdout.write(f"{written}\n")


def _whole(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not re.fullmatch("[1-9][0-9]{0,9}", text):
        raise ValueError(f"{name} is a whole number above 0")
    return int(text)


if __name__ == "__main__":
    main()
