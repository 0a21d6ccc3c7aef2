"""Where the server may listen, under which names it answers, with which certificate (S15)."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest

from pagemill.base.errors import ConfigError
from pagemill.server.access_listen import HostCheck, TlsOptions, check_address, check_admin_address, is_loopback
from tests.fixtures.certificate import make_certificate


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "[::1]", "localhost", "::1%lo"])
def test_loopback_needs_no_key(host: str) -> None:
    assert check_address(host, has_keys=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.4", "10.0.0.1", "fe80::1", "::ffff:8.8.8.8"])
def test_other_addresses_are_refused_without_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="pagemill keys add"):
        check_address(host, has_keys=False)
    assert not check_address(host, has_keys=True)
    assert not check_address(host, has_keys=False, insecure=True)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4"])
def test_an_admin_port_that_others_reach_needs_tls(host: str) -> None:
    with pytest.raises(ConfigError, match=r"without TLS.*--ssl-certfile.*--insecure"):
        check_admin_address(host, has_tls=False)
    assert not check_admin_address(host, has_tls=True)
    assert not check_admin_address(host, has_tls=False, insecure=True)
    assert check_admin_address("127.0.0.1", has_tls=False), "nobody else sees what passes"


@pytest.mark.parametrize("host", ["no.such.name.invalid", "999.1.1.1", "a b", "\udcff", "x" * 300])
def test_what_is_no_address_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="no address to listen on"):
        is_loopback(host)


@pytest.mark.parametrize(
    "header", ["127.0.0.1", "127.0.0.1:8000", "localhost:1", "LOCALHOST", "[::1]:8000", "localhost."]
)
def test_this_machine_s_names_are_answered(header: str) -> None:
    assert HostCheck.of("127.0.0.1", has_keys=False, insecure=False).allows_host(header)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "127.0.0.1@evil",
    ],
)
def test_other_names_are_not_answered_without_keys(header: str | None) -> None:
    check = HostCheck.of("127.0.0.1", has_keys=False, insecure=False)
    assert not check.allows_host(header)
    assert HostCheck.of("0.0.0.0", has_keys=True, insecure=False).allows_host(header), "a key is enough"


def test_names_that_the_operator_gives_are_answered_and_then_no_others() -> None:
    check = HostCheck.of("0.0.0.0", has_keys=True, insecure=False, allowed=["llm.example", " [2001:db8::1]"])
    assert check.allows_host("LLM.example:443")
    assert check.allows_host("[2001:db8::1]:443")
    assert not check.allows_host("evil.example")
    assert HostCheck.of("0.0.0.0", has_keys=True, insecure=False, allowed=[""]).allows_host("evil.example")


@pytest.mark.parametrize("allowed", ["a b", "a,", "a,,b", "llm.example:8000", "http://a", "*", "a/b", "-a", "abc:80"])
def test_names_that_no_host_has_are_refused(allowed: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed_hosts names .*one comma between two"):
        HostCheck.of("127.0.0.1", has_keys=False, insecure=False, allowed=allowed.split(","))


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        ("http://localhost:3000", True),
        ("http://127.0.0.1:8000", True),
        ("https://[::1]", True),
        ("https://evil.example", False),
        ("null", False),
        ("", False),
        ("http://[", False),
        ("http://localhost@evil.example", False),
    ],
)
def test_pages_of_other_origins_are_refused_without_keys(origin: str | None, allowed: bool) -> None:
    assert HostCheck.of("127.0.0.1", has_keys=False, insecure=False).allows_origin(origin) is allowed


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def test_a_certificate_and_its_key_are_taken(certificate: tuple[Path, Path]) -> None:
    options = TlsOptions(*certificate, certificate[0])
    assert options.enabled
    context = options.context()
    assert context is not None
    assert context.verify_mode is ssl.CERT_REQUIRED, "clients are asked for a certificate"
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    without = TlsOptions(*certificate).context()
    assert without is not None
    assert without.verify_mode is ssl.CERT_NONE
    assert TlsOptions().context() is None


def test_half_of_a_pair_is_refused(certificate: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="together"):
        TlsOptions(certificate[0], None)
    with pytest.raises(ConfigError, match="needs TLS"):
        TlsOptions(None, None, certificate[0])


def test_a_key_that_others_may_read_is_refused(certificate: tuple[Path, Path]) -> None:
    certificate[1].chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        TlsOptions(*certificate)
    certificate[1].chmod(0o600)


def test_files_that_do_not_fit_are_refused(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        TlsOptions(tmp_path / "none.pem", certificate[1])
    other = tmp_path / "other.pem"
    other.write_text("no key")
    other.chmod(0o600)
    with pytest.raises(ConfigError, match="no certificate and its key"):
        TlsOptions(certificate[0], other)
    with pytest.raises(ConfigError, match="no certificate and its key"):
        TlsOptions(other, certificate[1])


def test_a_key_with_a_password_is_refused_and_asks_nobody(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    locked = tmp_path / "locked.pem"
    command = ["openssl", "pkcs8", "-topk8", "-in", str(certificate[1]), "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    locked.chmod(0o600)
    with pytest.raises(ConfigError, match="without a password"):
        TlsOptions(certificate[0], locked)
