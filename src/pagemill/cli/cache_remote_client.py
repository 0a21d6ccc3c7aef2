"""A running server as the command line asks it. Owns addresses, keys, and what is said where it cannot be asked; what
the answers mean is the commands' own.

A key is sent to the address that was given and nowhere else: redirects are not followed, proxies are not asked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from pagemill.base.errors import ConfigError, PagemillError

ADMIN_KEY_VARIABLE = "PAGEMILL_ADMIN_KEY"
ADMIN_URL_VARIABLE = "PAGEMILL_ADMIN_URL"
ADMIN_ROUTES = "/admin"
ADMIN_MISSING = (
    "give the server's admin port (`serve --admin-port` tells it in the ready line), and see that its admin API is on "
    "and its version not older than this program's"
)

_TIMEOUT_S = 10.0
_MOST_BYTES = 1 << 26
_MOST_SAID = 300
_MOST_ERROR_BYTES = 1 << 16


class ServerError(PagemillError):
    """A server that cannot be asked, or answers something else. status, body: of its answer, None and empty where there
    was none."""

    exit_code = 2

    def __init__(self, message: str, status: int | None = None, body: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.body = body


class Server:
    """One address of a server, and the key that it is shown.

    option: names the address in messages. key_hint: where a key comes from. missing: what to do where a route is not
    there. Raises ConfigError for what is no address, or no key.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        option: str = "--url",
        what: str = "a server's admin port",
        key_hint: str = f"the operator's key with --key or {ADMIN_KEY_VARIABLE}",
        missing: str = ADMIN_MISSING,
    ) -> None:
        self.url = _address(url, option, what)
        self._headers = {"Accept": "application/json"}
        self._key_hint = key_hint
        self._option = option
        self._what = what
        self._missing = missing
        if key is not None and key.strip():
            self._headers["Authorization"] = f"Bearer {_key(key.strip(), key_hint)}"
        self._opener = build_opener(_NoRedirects, ProxyHandler({}))

    def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, object] | None = None,
        body: object = None,
        timeout_s: float = _TIMEOUT_S,
    ) -> dict[str, Any]:
        """The object that a route answers with. query: of these, None is left out. Raises ServerError."""
        given = {name: str(value) for name, value in (query or {}).items() if value is not None}
        address = self.url + path + (f"?{urlencode(given, quote_via=quote)}" if given else "")
        text = self._read(method, address, None if body is None else json.dumps(body).encode(), timeout_s)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise ServerError(f"{self.url}{path} answers no JSON; give the address of {self._what}") from None
        if not isinstance(found, dict):
            raise ServerError(f"{self.url}{path} answers something else than an object; is it a Pagemill server?")
        return found

    def text(self, path: str, accept: str = "text/plain") -> str:
        """The text that a route answers with. Raises ServerError."""
        return self._read("GET", self.url + path, None, _TIMEOUT_S, accept).decode("utf-8", "replace")

    def health(self) -> dict[str, Any]:
        """What /health says, whatever its status; empty of a server that only answers. Raises ServerError."""
        try:
            text: bytes | str = self._read("GET", f"{self.url}/health", None, _TIMEOUT_S)
        except ServerError as error:
            if error.status != 503:
                raise
            text = error.body
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _read(self, method: str, address: str, body: bytes | None, timeout_s: float, accept: str = "") -> bytes:
        headers = self._headers | ({"Accept": accept} if accept else {})
        if body is not None:
            headers["Content-Type"] = "application/json"
        request = Request(address, data=body, headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                found: bytes = answer.read(_MOST_BYTES + 1)
        except HTTPError as error:
            address, said = address.partition("?")[0], _body_of(error)
            raise ServerError(self._refusal(address, error, said), error.code, said) from None
        except (URLError, OSError, HTTPException) as error:
            raise ServerError(self._silence(address.partition("?")[0], error)) from None
        if len(found) > _MOST_BYTES:
            raise ServerError(f"{address} answers more than {_MOST_BYTES:,} bytes; ask for less with --limit")
        return found

    def _refusal(self, address: str, error: HTTPError, body: bytes) -> str:
        said, field = _told(body)
        words = f": {said}" if said else ""
        if error.code == 403 and field:  # what was asked for is refused, whoever asks
            return f"{address} refuses ({error.code}){words}"
        if error.code in (401, 403):
            return f"{address} refuses ({error.code}{words}); give {self._key_hint}"
        if error.code == 404:
            return f"{address} is not there; {self._missing}"
        return f"{address} answers {error.code} {plain(error.reason)}{words}"

    def _silence(self, address: str, error: Exception) -> str:
        reason = getattr(error, "reason", error)
        said = plain(reason) or type(reason).__name__
        if "CERTIFICATE_VERIFY" in said:
            return f"{address}: its certificate is not trusted ({said}); name its authority's file in SSL_CERT_FILE"
        if "SSL" in said:
            return f"{address}: {said}; is it http:// without TLS, or does it ask for a certificate of yours?"
        if isinstance(error, HTTPException) or isinstance(reason, ConnectionResetError):
            return f"{address} does not speak HTTP ({said}); is it https://, or another program's port?"
        return f"no server answers at {address}: {said}; start one, or give another {self._option}"


def admin_server(url: str | None, key: str | None) -> Server:
    """The admin port that a command is to ask; what is not given comes from the environment. Raises ConfigError."""
    url = url if url is not None else os.environ.get(ADMIN_URL_VARIABLE) or None
    if url is None:
        raise ConfigError(
            f"whose cache? give --url with a server's admin port, such as --url http://127.0.0.1:8001, or set "
            f"{ADMIN_URL_VARIABLE} (`pagemill serve --admin-port 8001` opens one)"
        )
    return Server(url, key if key is not None else os.environ.get(ADMIN_KEY_VARIABLE))


def plain(value: object) -> str:
    """What somebody else says, as one line without control characters."""
    words = " ".join(str(value).split())
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in words)


def _body_of(error: HTTPError) -> bytes:
    try:
        with error:
            return error.read(_MOST_ERROR_BYTES)
    except (OSError, HTTPException):
        return b""


def _told(body: bytes) -> tuple[str, str]:
    """What a server says of an error, in OpenAI's shape, and the field that it names; empty where it says nothing."""
    try:
        error = json.loads(body)["error"]
        message, field = error["message"], error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", ""
    said = plain(message)[:_MOST_SAID] if isinstance(message, str) else ""
    return said, field if isinstance(field, str) else ""


class _NoRedirects(HTTPRedirectHandler):
    """The key is for the address that was given."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _address(url: str, option: str, what: str) -> str:
    wrong = ConfigError(f"{option} {plain(url)}: give the address of {what}, such as http://127.0.0.1:8001")
    try:
        parts = urlsplit(url.strip() if "//" in url else f"http://{url.strip()}")
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc or parts.query or parts.fragment:
        raise wrong
    path = parts.path.partition(f"{ADMIN_ROUTES}/")[0].rstrip("/")
    found = f"{parts.scheme}://{parts.netloc}{path}"
    if not found.isascii() or not found.isprintable() or " " in found:
        raise wrong
    return found


def _key(key: str, hint: str) -> str:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"the key holds letters that no key has; give {hint}")
    return key
