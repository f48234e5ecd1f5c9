"""Settings of the serving path: secrets from files, certificates, and what is refused."""

from __future__ import annotations

import ssl
from pathlib import Path

import certifi
import pytest

from axon_llm.errors import UsageError
from axon_llm.serving.amqp import parameters
from axon_llm.serving.http_settings import SessionManagerSettings
from axon_llm.serving.redis_scripts import connection_options
from axon_llm.serving.settings import ServingSettings, read_settings


@pytest.mark.parametrize("name", ["REDIS_URL", "AMQP_URL", "GATEWAY_SECRET", "API_KEY"])
def test_a_secret_may_be_in_a_file_and_its_last_line_may_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = {"REDIS_URL": "redis://u:p@h/0", "AMQP_URL": "amqp://u:p@h/"}.get(name, "s3cret" * 8)
    (tmp_path / "secret").write_text(f"{secret}\n")
    monkeypatch.delenv(f"AXON_{name}", raising=False)
    monkeypatch.setenv(f"AXON_{name}_FILE", str(tmp_path / "secret"))
    settings = read_settings(SessionManagerSettings)
    assert getattr(settings, name.lower()).get_secret_value() == secret
    assert secret not in repr(settings)
    monkeypatch.setenv(f"AXON_{name}", secret)
    with pytest.raises(UsageError, match="both set; keep one") as refused:
        read_settings(SessionManagerSettings)
    assert secret not in str(refused.value)


def test_a_secrets_file_that_is_not_there_is_said_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AXON_REDIS_URL", raising=False)
    monkeypatch.setenv("AXON_REDIS_URL_FILE", "/nowhere/secret")
    with pytest.raises(UsageError, match="cannot read /nowhere/secret: No such file"):
        read_settings()


def test_certificates_are_checked_against_the_file_named_and_only_where_there_is_tls() -> None:
    ca_file = Path(certifi.where())
    for redis_url, amqp_url, encrypted in (
        ("rediss://h/0", "amqps://u:p@h/", True),
        ("redis://h/0", "amqp://u:p@h/", False),
    ):
        settings = ServingSettings(redis_url=redis_url, amqp_url=amqp_url, tls_ca_file=ca_file)
        options = connection_options(settings)
        assert options.get("ssl_ca_certs") == (str(ca_file) if encrypted else None)
        assert "ssl_cert_reqs" not in options  # redis-py checks unless told otherwise
        tls = parameters(settings).ssl_options
        assert (tls is not None) is encrypted
        if tls is not None:
            assert tls.context.verify_mode == ssl.CERT_REQUIRED
            assert tls.context.check_hostname
            assert tls.context.cert_store_stats()["x509_ca"] > 0
