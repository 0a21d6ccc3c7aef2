"""The modes of `bench quality`: ways to hold weights, keys and values, and what each is held against.

Owns names, their reading from lists, and the choice of comparisons; nothing is run here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from pagemill.base.config import DTYPE_FORMATS, EngineConfig
from pagemill.base.errors import ConfigError
from pagemill.base.kv_spec import KV_VALUE_BYTES
from pagemill.base.units import parse_count
from pagemill.execution.convert import FORMATS
from pagemill.execution.loader import kv_codec_for
from pagemill.kernels.reference import Int8Rounding

UNQUANTISED = ("f32", "f16", "bf16")

# Weights as the report names them -> their format. A format that a dtype stands for goes by the dtype's name.
_DTYPES = {format: dtype for dtype, format in DTYPE_FORMATS.items()}
WEIGHTS: dict[str, str] = {_DTYPES.get(format, format): format for format in FORMATS}

_NOTHING = dict.fromkeys(("keys", "values", "queries", "probabilities"), False)
# int8 KV with one part of it rounded and the others exact. Queries and probabilities are rounded only while attending.
PARTS: dict[str, Int8Rounding] = {
    "int8-k": Int8Rounding(**_NOTHING | {"keys": True}),
    "int8-v": Int8Rounding(**_NOTHING | {"values": True}),
    "int8-q": Int8Rounding(**_NOTHING | {"queries": True}),
    "int8-p": Int8Rounding(**_NOTHING | {"probabilities": True}),
}
_APART = ("f32", "bf16", *PARTS, "int8")


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to compute: weights by one of WEIGHTS' names, keys and values as `--kv-cache-dtype` names them.

    apart: computed by the reference in numpy, beside other such rows of the same weights; kv may be one of PARTS too.
    """

    weights: str
    kv: str
    apart: bool = False

    @property
    def name(self) -> str:
        """All of it in a few words."""
        return f"{self.weights}, KV {self.kv}{' (numpy)' if self.apart else ''}"

    @property
    def codec(self) -> str:
        """The resident codec."""
        return "int8" if self.kv in PARTS else self.kv

    @property
    def rounding(self) -> Int8Rounding:
        """What codec int8 rounds."""
        return PARTS.get(self.kv, Int8Rounding())

    @property
    def k(self) -> str:
        """What keys are rounded to."""
        return self.codec if self.codec != "int8" or self.rounding.keys else "f32"

    @property
    def v(self) -> str:
        """What values are rounded to."""
        return self.codec if self.codec != "int8" or self.rounding.values else "f32"

    @property
    def queries(self) -> str:
        """What queries are rounded to."""
        return "int8" if self.codec == "int8" and self.rounding.queries else "f32"

    @property
    def probabilities(self) -> str:
        """What probabilities are rounded to, by the arithmetic of codec int8 (16 bits as of now) or not at all."""
        return "int8" if self.codec == "int8" and self.rounding.probabilities else "f32"


REFERENCE = Mode("float32", "f32")


def default_mode() -> Mode:
    """What runs where nothing is asked for."""
    config = EngineConfig()
    [mode] = parse_modes("", config.kv_cache_dtype, config.weights)
    return mode


@dataclass(frozen=True, slots=True)
class Comparison:
    """A mode and the mode whose probabilities it is held against."""

    mode: Mode
    against: Mode


def parse_modes(dtypes: str, kv_cache_dtypes: str, weight_formats: str = "") -> tuple[Mode, ...]:
    """Every combination of weights (of both lists) and KV types, each once. KV "auto" is the weights' own by a fixed
    rule.

    The lists are separated by commas; one of dtypes and weight_formats may be empty. Raises ConfigError that lists
    unknown names and those that are known.
    """
    weights = _names("--dtype", dtypes, tuple(DTYPE_FORMATS)) if dtypes.strip() or not weight_formats.strip() else ()
    if weight_formats.strip():
        weights += tuple(_DTYPES.get(each, each) for each in _names("--weight-format", weight_formats, FORMATS))
    codecs = _names("--kv-cache-dtype", kv_cache_dtypes, ("auto", *KV_VALUE_BYTES))
    modes = [Mode(each, kv_codec_for(WEIGHTS[each], codec)) for each in weights for codec in codecs]
    return tuple(dict.fromkeys(modes))


def parse_apart(weights: str) -> tuple[Mode, ...]:
    """The modes that tell K, V, queries and probabilities apart, for each of a list of weights separated by commas;
    none for an empty list. Raises ConfigError."""
    names = _names("--apart", weights, tuple(WEIGHTS)) if weights.strip() else ()
    return tuple(Mode(each, kv, apart=True) for each in names for kv in _APART)


def parse_counts(flag: str, text: str) -> tuple[int, ...]:
    """Numbers such as "512" or "512,4K". Raises ConfigError that names the flag."""
    try:
        return tuple(parse_count(each) for each in _items(text))
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from None


def modes_to_run(asked: Iterable[Mode]) -> tuple[Mode, ...]:
    """The modes asked for and those they are held against: float32 first, bf16 KV before a quantised KV."""
    modes = [REFERENCE]
    for mode in asked:
        if not mode.apart and mode.kv not in UNQUANTISED:
            modes.append(Mode(mode.weights, "bf16"))
        modes.append(mode)
    return tuple(dict.fromkeys(modes))


def comparisons_of(modes: Sequence[Mode]) -> tuple[Comparison, ...]:
    """Every mode against float32, and every KV type against bf16 KV in the same weights where that runs too.

    Modes that tell K, V, queries and probabilities apart are held against f32 and bf16 KV of their own weights and
    arithmetic.
    """
    comparisons = []
    for mode in modes:
        exact = Mode(mode.weights, "f32", apart=True)
        comparisons.append(Comparison(mode, exact if mode.apart and mode != exact else REFERENCE))
        plain = Mode(mode.weights, "bf16", mode.apart)
        if plain in modes and mode not in (plain, exact, REFERENCE):
            comparisons.append(Comparison(mode, plain))
    return tuple(comparisons)


def _items(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]


def _names(flag: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    items = tuple(dict.fromkeys(_items(text)))
    unknown = [each for each in items if each not in known]
    if unknown or not items:
        near = [match for each in unknown for match in get_close_matches(each, known, n=1)]
        hint = f" did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
        problem = f"unknown {', '.join(map(repr, unknown))};{hint}" if unknown else "the list is empty;"
        raise ConfigError(f"{flag}: {problem} give one or more of {', '.join(known)}, separated by commas")
    return items
