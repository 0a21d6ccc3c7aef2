"""Where the server may listen, what it may be called there, and with which certificate. Owns the refusals at the start.

Without keys only this machine may ask: the server listens on loopback addresses alone, answers only to their names (a
page that a browser shows could have its own name point here), and to no page of another origin.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from pagemill.base.errors import ConfigError

_HOST_NAME: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]{0,251}[a-z0-9_])?", re.ASCII)
LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def check_address(host: str, *, has_keys: bool, insecure: bool = False, what: str = "the server") -> bool:
    """True where `host` is this machine alone. Raises ConfigError for an address that others reach without keys unless
    `insecure` says so, and for one that is none."""
    if is_loopback(host):
        return True
    if not has_keys and not insecure:
        raise ConfigError(
            f"{what} would listen on {host} for everybody, without keys; add one by `pagemill keys add` and give "
            "--keys FILE, listen on 127.0.0.1, or say --insecure"
        )
    return False


def check_admin_address(host: str, *, has_tls: bool, insecure: bool = False) -> bool:
    """True where the admin port's `host` is this machine alone. Raises ConfigError for an address that others reach
    without TLS, where its key would be read on the way, unless `insecure` says so, and for one that is none."""
    if is_loopback(host):
        return True
    if not has_tls and not insecure:
        raise ConfigError(
            f"the admin port would listen on {host} without TLS, and whoever sees what passes would read its key; give "
            "--ssl-certfile and --ssl-keyfile, leave --admin-host at 127.0.0.1, or say --insecure"
        )
    return False


def is_loopback(host: str) -> bool:
    """True where all addresses that `host` stands for are of this machine. Raises ConfigError where it has none."""
    bare = host.removeprefix("[").removesuffix("]")
    if not bare:  # every address
        return False
    try:
        return ipaddress.ip_address(bare.partition("%")[0]).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host!r} is no address to listen on ({error}); give one such as 127.0.0.1") from None
    return all(ipaddress.ip_address(str(each[4][0]).partition("%")[0]).is_loopback for each in found)


@dataclass(frozen=True, slots=True)
class HostCheck:
    """Names under which requests are answered. names: small letters, without ports; None answers to any.

    Stands against DNS rebinding: a page of evil.example whose name points to 127.0.0.1 sends its own name as Host.
    """

    names: frozenset[str] | None = LOOPBACK_NAMES

    @classmethod
    def of(cls, host: str, *, has_keys: bool, insecure: bool, allowed: Iterable[str] = ()) -> HostCheck:
        """Any name where keys are asked for or `insecure` was said, unless names are given; else this machine's own.
        Raises ConfigError for an allowed name that no Host header can be."""
        given = list(allowed)
        extra = frozenset(map(_host_name, given)) if any(map(str.strip, given)) else frozenset[str]()
        if (has_keys or insecure) and not extra:
            return cls(None)
        return cls(LOOPBACK_NAMES | extra | {host.lower().removeprefix("[").removesuffix("]")})

    def allows_host(self, header: str | None) -> bool:
        """True for a Host header of an allowed name, whatever its port. HTTP/1.1 asks for the header."""
        if self.names is None:
            return True
        return header is not None and _name_of(header) in self.names

    def allows_origin(self, header: str | None) -> bool:
        """True without an Origin header, and for one of an allowed name: a page that this machine serves."""
        if self.names is None or header is None:
            return True
        try:
            name = urlsplit(header).hostname
        except ValueError:
            return False
        return name is not None and name in self.names


def _host_name(given: str) -> str:
    """A name as `_name_of` finds it in a header."""
    name = given.strip().lower().removeprefix("[").removesuffix("]").removesuffix(".")
    try:
        if ":" in name:
            return str(ipaddress.IPv6Address(name))
    except ValueError:
        name = ""
    if _HOST_NAME.fullmatch(name) is None:
        raise ConfigError(
            f"allowed_hosts names {given!r:.60}; give names as they stand in an address, without port or path, and one "
            "comma between two"
        )
    return name


def _name_of(header: str) -> str:
    text = header.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].removesuffix(".")


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """Certificate and key in PEM files. client_ca: only clients with a certificate of that authority may connect.

    Raises ConfigError for one file without the other, files that cannot be read or do not fit, and a key that others
    on this machine may read.
    """

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("TLS needs --ssl-certfile and --ssl-keyfile together; give both or none")
        if self.certificate is None or self.key is None:
            if self.client_ca is not None:
                raise ConfigError(
                    "--ssl-ca-certs asks clients for certificates, which needs TLS; give --ssl-certfile too"
                )
            return
        for path in (self.certificate, self.key, self.client_ca):
            if path is not None and not os.access(path, os.R_OK):
                raise ConfigError(f"cannot read {path}; give a PEM file that you may read")
        if self.key.stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise ConfigError(f"others may read the TLS key {self.key}; `chmod 600 {self.key}`")
        self.context()

    @property
    def enabled(self) -> bool:
        return self.certificate is not None

    def context(self) -> ssl.SSLContext | None:
        """What the listeners take, TLS 1.2 or later; None without TLS. Raises ConfigError for files that do not fit."""
        if self.certificate is None or self.key is None:
            return None
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
            if self.client_ca is not None:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(self.client_ca)
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"{self.certificate} and {self.key} are no certificate and its key ({error}); give PEM files that "
                "belong together, the key without a password"
            ) from None
        return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")
