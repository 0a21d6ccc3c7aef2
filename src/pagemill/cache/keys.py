"""What makes two blocks the same, as 32 bytes. Owns keys and namespaces' secrets, not the blocks.

    root key    = HMAC-SHA256(secret of the namespace, domain ‖ typed, length-prefixed fields)
    block key   = SHA-256(key before it ‖ tokens of the block, unsigned 32-bit little-endian)

Each field is written as type ‖ length ‖ bytes, so that no two lists of fields have the same encoding: ("ab", "c") is
not ("a", "bc"), an empty salt is not an unset one, and a salt cannot pass for an adapter. Keys are never cut.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, fields

DOMAIN = b"pagemill/kv-block/1"
KEY_BYTES = 32
TOKEN_BYTES = 4

Field = str | bytes | int | None


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything beside namespace and tokens that changes the bytes of a block.

    weights: digest of the weights as packed, with their source, format and compute dtype. numerics: the kernels' target
    and version. codec, codec_version: of the stored keys and values. positions: rope and position settings. adapter,
    adapter_version: None without one. media: digest of input that is no text, None without.
    """

    weights: str = ""
    weight_format: str = ""
    compute_dtype: str = ""
    numerics: str = ""
    codec: str = ""
    codec_version: int = 1
    positions: str = ""
    block_size: int = 16
    adapter: str | None = None
    adapter_version: str | None = None
    media: bytes | None = None


@dataclass(frozen=True, slots=True)
class Namespace:
    """Who may share: the tenant, or a public name, and the caller's salt, which narrows it (unset is not empty)."""

    tenant: str
    salt: str | None = None
    public: bool = False


def encode_field(value: Field) -> bytes:
    """One field as type (one byte), length (8 bytes, little-endian) and bytes; no other field has this encoding."""
    if value is None:
        return b"n" + bytes(8)
    if isinstance(value, int):
        kind, data = b"i", str(int(value)).encode()
    elif isinstance(value, str):
        kind, data = b"s", value.encode("utf-8", "surrogatepass")
    else:
        kind, data = b"b", value
    return kind + struct.pack("<Q", len(data)) + data


def root_key(secret: bytes, namespace: Namespace, fingerprint: Fingerprint) -> bytes:
    """The key before the first block of every text of a namespace under a fingerprint."""
    parts: list[Field] = [
        "tenant", namespace.tenant, "public", int(namespace.public), "salt", namespace.salt,
    ]  # fmt: skip
    for each in fields(fingerprint):
        parts += [each.name, getattr(fingerprint, each.name)]
    return hmac.digest(secret, DOMAIN + b"".join(map(encode_field, parts)), "sha256")


def child_key(parent: bytes, tokens: bytes) -> bytes:
    """The key of a block whose predecessor's (or root's) key is `parent`. tokens: packed, 4 bytes each."""
    return hashlib.sha256(parent + tokens).digest()


def chain_keys(key: bytes, tokens: Iterable[bytes]) -> list[bytes]:
    """`child_key` of each of a run of blocks, the first of them behind `key`. tokens: of each block, packed."""
    sha256, found = hashlib.sha256, []
    for own in tokens:
        key = sha256(key + own).digest()
        found.append(key)
    return found


class Secrets:
    """The secret of each tenant and public name: random, for the life of the process.

    Mutated by `of`, which draws a secret at its first use, and `forget`.
    """

    __slots__ = ("_secrets",)

    def __init__(self) -> None:
        self._secrets: dict[tuple[str, bool], bytes] = {}

    def __len__(self) -> int:
        return len(self._secrets)

    def of(self, namespace: Namespace) -> bytes:
        """The namespace's secret, 32 bytes."""
        name = (namespace.tenant, namespace.public)
        secret = self._secrets.get(name)
        if secret is None:
            secret = self._secrets[name] = os.urandom(KEY_BYTES)
        return secret

    def forget(self, tenant: str, *, public: bool = False) -> None:
        """Drop a tenant's secret: keys made with it are never made again."""
        self._secrets.pop((tenant, public), None)
