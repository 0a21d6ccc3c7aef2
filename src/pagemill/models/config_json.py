"""A checkpoint directory's JSON files, read as hostile text. Owns size bounds and typed access; does not know what the
settings mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pagemill.base.errors import ModelError

MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """Settings of one JSON object. A key whose value is null counts as missing.

    Every accessor raises ModelError, naming file and key, where a value without default is missing, of another type,
    or outside its range.
    """

    origin: str
    values: Mapping[str, Any]

    def has(self, key: str) -> bool:
        """Whether `key` is there and not null."""
        return self.values.get(key) is not None

    def get_int(self, key: str, default: int | None = None, *, minimum: int = 0, maximum: int = (1 << 31) - 1) -> int:
        """A whole number in minimum .. maximum."""
        value = self._find(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self._refuse(key, f"is {_shown(value)}, not a whole number")
        if not minimum <= value <= maximum:
            self._refuse(key, f"is {value}, outside {minimum} to {maximum}")
        return value

    def get_float(
        self, key: str, default: float | None = None, *, minimum: float = -math.inf, maximum: float = math.inf
    ) -> float:
        """A finite number in minimum .. maximum."""
        value = self._find(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._refuse(key, f"is {_shown(value)}, not a number")
        if not (math.isfinite(value) and minimum <= value <= maximum):
            self._refuse(key, f"is {value}, outside {minimum} to {maximum}")
        return float(value)

    def get_bool(self, key: str, default: bool | None = None) -> bool:
        """true or false."""
        value = self._find(key, default)
        if not isinstance(value, bool):
            self._refuse(key, f"is {_shown(value)}, not true or false")
        return value

    def get_str(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._find(key, default)
        if not isinstance(value, str):
            self._refuse(key, f"is {_shown(value)}, not a string")
        return value

    def get_object(self, key: str) -> ConfigFile:
        """The settings of a nested object; empty where the key is missing."""
        value = self.values.get(key)
        if value is None:
            return ConfigFile(f"{self.origin}, {key}", {})
        if not isinstance(value, dict):
            self._refuse(key, f"is {_shown(value)}, not an object")
        return ConfigFile(f"{self.origin}, {key}", value)

    def get_ids(self, key: str, maximum: int) -> tuple[int, ...]:
        """Token ids below `maximum`: a whole number, a list of them, or nothing."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for item in ids:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < maximum:
                self._refuse(key, f"is {_shown(value)}, not token ids from 0 to {maximum - 1}")
        return tuple(ids)

    def refuse_unless(self, allowed: Mapping[str, tuple[object, ...]], family: str) -> None:
        """Raise ModelError for every key that is there with a value other than those allowed."""
        wrong = [
            f"{key} is {_shown(self.values[key])}, supported: {', '.join(map(_shown, values)) or 'none, leave it out'}"
            for key, values in allowed.items()
            if self.has(key) and not any(type(self.values[key]) is type(v) and self.values[key] == v for v in values)
        ]
        if wrong:
            raise ModelError(
                f"{self.origin}: settings that Pagemill's {family} does not support: {'; '.join(wrong)}. "
                "Use a checkpoint without them"
            )

    def _find(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            self._refuse(key, "is missing")
        return value

    def _refuse(self, key: str, problem: str) -> NoReturn:
        raise ModelError(f"{self.origin}: {key!r} {problem}. Fetch the file again from where the model came from")


def read_config(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> ConfigFile:
    """Read a JSON object. Raises ModelError where the file is missing, larger than max_bytes, or no JSON object."""
    return ConfigFile(str(path), parse_object(read_bounded(path, max_bytes), str(path)))


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file of at most max_bytes. Raises ModelError."""
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; fetch the whole checkpoint") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error
    if len(content) > max_bytes:
        raise ModelError(f"{path} is larger than {max_bytes} bytes, more than such a file can need; fetch it again")
    return content


def parse_object(content: bytes, origin: str) -> dict[str, Any]:
    """A JSON object. Raises ModelError."""
    import orjson  # GGUF files bring no JSON

    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise ModelError(f"{origin} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{origin} holds no JSON object; fetch it again")
    return value


def _shown(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
