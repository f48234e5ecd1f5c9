"""Users for Redis and RabbitMQ: ``python -m deploy.backends --folder DIR`` writes what their servers load.

Passwords are made here and written to one file per role, readable by its owner alone, for ``AXON_REDIS_URL_FILE`` and
``AXON_AMQP_URL_FILE``; the servers' files hold hashes only. So is the secret that gateway and session managers share,
for ``AXON_GATEWAY_SECRET_FILE``. Running it again makes new passwords.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
REDIS_ROLES = ("worker", "session_manager", "keys")
RABBITMQ_ROLES = ("worker", "session_manager")
SCALER = "keda"  # asks RabbitMQ's management API how long the queues are; no part of Axon


def redis_acl(passwords: Mapping[str, str]) -> str:
    """Return the ACL file, given a password per role."""
    text = (FOLDER / "redis" / "users.acl.template").read_text()
    for role in REDIS_ROLES:
        text = text.replace(f"{{{role}}}", hashlib.sha256(passwords[role].encode()).hexdigest())
    return text


def rabbitmq_definitions(passwords: Mapping[str, str]) -> str:
    """Return the definitions file, given a password per role; without one the scaler gets one that nobody knows."""
    passwords = {SCALER: secrets.token_urlsafe(24), **passwords}
    text = (FOLDER / "rabbitmq" / "definitions.json.template").read_text()
    for role in (*RABBITMQ_ROLES, SCALER):
        salt = secrets.token_bytes(4)
        digest = hashlib.sha256(salt + passwords[role].encode()).digest()
        text = text.replace(f"{{{role}}}", base64.b64encode(salt + digest).decode())
    return text


def main() -> int:
    """Write both files, the passwords and the gateway's secret."""
    parser = argparse.ArgumentParser(prog="python -m deploy.backends", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--redis", default="redis:6379", help="host and port, for the URL files")
    parser.add_argument("--rabbitmq", default="rabbitmq:5672", help="host and port, for the URL files")
    parser.add_argument("--management", default="rabbitmq:15672", help="RabbitMQ's management API, for the URL file")
    parser.add_argument("--tls", action="store_true", help="write rediss://, amqps:// and https:// URLs")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    passwords = {role: secrets.token_urlsafe(24) for role in (*REDIS_ROLES, SCALER)}
    for name, text in (("users.acl", redis_acl(passwords)), ("definitions.json", rabbitmq_definitions(passwords))):
        _write(options.folder / name, text)
    s = "s" if options.tls else ""
    for role in REDIS_ROLES:
        user = f"axon-{role.replace('_', '-')}"
        _write(options.folder / f"{user}.redis-url", f"redis{s}://{user}:{passwords[role]}@{options.redis}/0\n")
        if role in RABBITMQ_ROLES:
            _write(options.folder / f"{user}.amqp-url", f"amqp{s}://{user}:{passwords[role]}@{options.rabbitmq}/axon\n")
    # Without an end of line: KEDA takes the whole file for the URL.
    scaler = f"http{s}://axon-{SCALER}:{passwords[SCALER]}@{options.management}/axon"
    _write(options.folder / f"axon-{SCALER}.management-url", scaler)
    _write(options.folder / "gateway-secret", secrets.token_urlsafe(24) + "\n")
    sys.stderr.write(f"wrote {options.folder}\n")
    return 0


def _write(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(main())
