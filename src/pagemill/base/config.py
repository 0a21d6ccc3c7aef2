"""Every option of the engine, declared once: name, default, unit, help. The command line, the environment
(`PAGEMILL_<NAME>`), the TOML file and the docs are generated from `EngineConfig`'s fields.

Precedence: command line (or Python argument) > environment > file > default. Reads the file it is given and the
environment it is handed; knows nothing of the command line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pagemill.base.errors import ConfigError
from pagemill.base.tenants import TenantOptions, parse_names, parse_tenants, tenants_schema
from pagemill.base.units import parse_bytes, parse_count

ENV_PREFIX = "PAGEMILL_"
CONFIG_VARIABLE = "PAGEMILL_CONFIG"

# Variables that are not options of the engine: what reads them, in one line each.
OTHER_VARIABLES: dict[str, str] = {
    CONFIG_VARIABLE: "TOML file with engine options.",
    "PAGEMILL_DEBUG": "1: print the whole traceback of an error.",
    "PAGEMILL_FORCE_TARGET": "Instruction-set target of the kernels: scalar, avx2, avx512, avx512_bf16 or amx.",
    "PAGEMILL_HOME": "Directory of downloaded models and of packed weights (default ~/.cache/pagemill).",
    "PAGEMILL_THREADS": "Kernel threads where num_threads is not set.",
    "PAGEMILL_ADMIN_KEY": "Key of a server's admin port: asked for by `serve`, sent by `cache` and `top`.",
    "PAGEMILL_ADMIN_URL": "Address of a server's admin port, for `cache` and `top`.",
    "PAGEMILL_METRICS_KEY": "Key of role metrics that `top` sends to a server's public port.",
    "PAGEMILL_API_KEY": "Keys of the default tenant that `serve` asks for, separated by spaces.",
    "PAGEMILL_KEYS": "File of keys of `pagemill keys`.",
}


# What options that are left unset mean for `pagemill serve`.
SERVED_MIXED_STEP_PERCENT = 180
SERVED_QUEUED_REQUESTS = 1024

# The weight format that each dtype stands for.
DTYPE_FORMATS: dict[str, str] = {"auto": "auto", "float32": "f32", "bfloat16": "bf16"}

_NO_4_BITS = (
    "weights are not quantised to 4 bits at load, which costs more accuracy than any mode may; give q8_0, or take a "
    "checkpoint that is 4-bit already with auto"
)


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    refused: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """A dataclass field that carries what the command line and the docs print of it.

    refused: values that are no choice -> why, and what to do instead.
    """
    return field(default=default, metadata={"help": help, "unit": unit, "choices": choices, "refused": refused})


def weight_format_of(dtype: str, weight_format: str) -> str:
    """The format that matrices are loaded in, auto for the checkpoint's own. Raises ConfigError where they differ."""
    if dtype == "auto" or DTYPE_FORMATS[dtype] == weight_format:
        return weight_format
    if weight_format != "auto":
        raise ConfigError(
            f"dtype is {dtype}, which means weight_format {DTYPE_FORMATS[dtype]}, and weight_format is "
            f"{weight_format}; set one of them to auto"
        )
    return DTYPE_FORMATS[dtype]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of one engine. tenants: what each is granted; from the file's `[tenants.NAME]` tables or from Python.

    Raises ConfigError on values of a wrong type, out of range or contradictory.
    """

    model: str = option("smollm2-135m", "Model: a name, or the path of a GGUF file or a checkpoint directory.")
    dtype: str = option(
        "auto",
        "Weights and arithmetic: auto follows the checkpoint's format; float32 and bfloat16 convert it.",
        choices=("auto", "float32", "bfloat16"),
    )
    weight_format: str = option(
        "auto",
        "Format of the weights in memory: auto follows dtype and the machine: with AMX or AVX-512 VNNI it is int8 for "
        "4-bit and 8-bit checkpoints, else exact. exact keeps the checkpoint's own numbers; int8 makes the layers "
        "rotated signed bytes with a scale a row; q8_0 makes groups of 32 signed bytes, a scale each.",
        choices=("auto", "exact", "int8", "q8_0", "bf16", "f32"),
        refused={"q4_0": _NO_4_BITS, "q4_1": _NO_4_BITS},
    )
    kv_cache: str = option(
        "paged",
        "How keys and values are kept: paged, contiguous (reserved to the longest length), none (recompute all).",
        choices=("paged", "contiguous", "none"),
    )
    kv_cache_dtype: str = option(
        "auto",
        "Format of stored keys and values; auto is int8, and f32 with weights in f32.",
        choices=("auto", "f32", "f16", "bf16", "int8"),
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        "Memory for the KV cache, as 512MiB or 2GiB. Unset: what max_num_seqs sequences of max_model_len need, "
        "at the most a quarter of the free memory.",
        unit="bytes",
    )
    block_size: int = option(16, "Token positions in a block of the KV cache, a multiple of 16.", unit="tokens")
    enable_prefix_caching: str = option(
        "on",
        "Share the keys and values of texts that begin alike (kv_cache paged): on or off.",
        choices=("on", "off"),
    )
    cache_policy: str = option(
        "lru", "Which cached block leaves first: the name of an eviction policy (lru, s3fifo, …)."
    )  # fmt: skip
    kv_cache_wiping: str = option(
        "on",
        "Overwrite pages of the prefix cache with zeros as soon as their contents are dropped: on or off.",
        choices=("on", "off"),
    )
    known_tenants_only: str = option(
        "off",
        "Refuse tenants that are not named under [tenants] in the file: on or off.",
        choices=("on", "off"),
    )
    public_namespaces: str = option(
        "",
        "Namespaces of the prefix cache that all tenants may share, names with commas between them.",
    )
    max_model_len: int | None = option(
        None, "Longest sequence, prompt and answer together. Unset: the model's context length.", unit="tokens"
    )
    max_num_seqs: int = option(64, "Sequences that run at the same time.", unit="sequences")
    max_num_batched_tokens: int = option(
        512, "Tokens computed in one step; longer prompts are read in chunks.", unit="tokens"
    )
    mixed_step_percent: int | None = option(
        None,
        "How long a step that reads prompts may take beside sequences that decode, in percent of a step in which all "
        "that have a place decode; prompts are cut to fit. Unset: 180 for serve, no bound for Python.",
        unit="percent",
    )
    target_itl_ms: int | None = option(
        None,
        "Time between tokens that 95 of 100 steps which read prompts beside sequences that decode are to keep to, in "
        "place of mixed_step_percent; prompts are cut to fit. A short time costs tokens per second. Unset: none.",
        unit="milliseconds",
    )
    max_queued_requests: int | None = option(
        None,
        "Requests of one tenant that may wait; more are told to come back later. Unset: 1,024 for serve, no bound for "
        "Python.",
        unit="requests",
    )
    num_threads: int | None = option(
        None, "Kernel threads. Unset: PAGEMILL_THREADS, else the cores of this process.", unit="threads"
    )
    seed: int = option(0, "Seed of the random numbers of requests that bring none.")
    executor: str = option(
        "native",
        "What computes: native (the product) or reference (numpy, slow, the specification).",
        choices=("native", "reference"),
    )
    packed_weights_cache: str = option(
        "auto",
        "Where weights are kept as kernels read them, for the next start: auto (beside the model, else in "
        "PAGEMILL_HOME), off, or a directory, written with a slash (./packed).",
    )

    tenants: tuple[TenantOptions, ...] = ()

    def __post_init__(self) -> None:
        for each in OPTIONS.values():
            each.check(getattr(self, each.name))
        weight_format_of(self.dtype, self.weight_format)
        self._check_ranges()
        self._check_sharing()

    @property
    def public_names(self) -> tuple[str, ...]:
        """The names in public_namespaces."""
        return parse_names("public_namespaces", self.public_namespaces)

    @property
    def weights(self) -> str:
        """The format that matrices are loaded in, from dtype and weight_format; auto for the checkpoint's own."""
        return weight_format_of(self.dtype, self.weight_format)

    def _check_ranges(self) -> None:
        if not self.model.strip():
            raise ConfigError("model is empty; give a name such as smollm2-135m, or a path")
        cache = self.packed_weights_cache
        if cache not in ("auto", "off") and "/" not in cache:
            near = _suggestion(cache, ("auto", "off"))
            raise ConfigError(f"packed_weights_cache is {cache!r};{near} give auto, off, or a directory (./packed)")
        if self.block_size % 16 or not 16 <= self.block_size <= 1024:
            raise ConfigError(f"block_size is {self.block_size}; give a multiple of 16 from 16 to 1,024")
        _check_range("max_model_len", self.max_model_len, 1, 2**24)
        _check_range("max_num_seqs", self.max_num_seqs, 1, 65_536)
        _check_range("max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**20)
        _check_range("mixed_step_percent", self.mixed_step_percent, 101, 100_000)
        _check_range("target_itl_ms", self.target_itl_ms, 1, 100_000)
        _check_range("max_queued_requests", self.max_queued_requests, 1, 2**20)
        _check_range("num_threads", self.num_threads, 1, 256)
        _check_range("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, 2**62)
        _check_range("seed", self.seed, 0, 2**64 - 1)
        if self.target_itl_ms is not None and self.mixed_step_percent is not None:
            raise ConfigError(
                f"target_itl_ms is {self.target_itl_ms} and mixed_step_percent {self.mixed_step_percent}: both say how "
                "long a step that reads prompts may take; leave one of them out"
            )
        if self.target_itl_ms is not None and self.kv_cache == "none":
            raise ConfigError(
                f"target_itl_ms is {self.target_itl_ms} and kv_cache is none, where each step computes whole texts and "
                "cannot be cut to fit; leave one of them out"
            )

    def _check_sharing(self) -> None:
        """Quotas, public names and known tenants mean something only where texts are shared."""
        parse_names("public_namespaces", self.public_namespaces)
        if parse_tenants(self.tenants) != self.tenants:
            raise ConfigError("tenants: give a tuple of TenantOptions")
        if self.known_tenants_only == "on" and not self.tenants:
            raise ConfigError(
                "known_tenants_only is on and no tenant is known; name them under [tenants.NAME] in the file"
            )
        if self.enable_prefix_caching == "on" and self.kv_cache == "paged":
            return
        why = "there is no prefix cache (enable_prefix_caching, kv_cache)"
        if quotas := [each.name for each in self.tenants if each.floor_tokens or each.cap_tokens is not None]:
            raise ConfigError(f"tenant {quotas[0]!r} has floor_tokens or cap_tokens and {why}; leave them out")
        for name in ("public_namespaces", "known_tenants_only"):
            if getattr(self, name) not in ("", "off"):
                raise ConfigError(f"{name} is {getattr(self, name)!r} and {why}; leave it out")


def for_serving(config: EngineConfig) -> EngineConfig:
    """The same configuration with what a server needs where nothing else was said: many users at once, who wait for the
    next token and must not fill the queue."""
    percent = SERVED_MIXED_STEP_PERCENT if config.target_itl_ms is None else None
    return replace(
        config,
        mixed_step_percent=config.mixed_step_percent or percent,
        max_queued_requests=config.max_queued_requests or SERVED_QUEUED_REQUESTS,
    )


@dataclass(frozen=True, slots=True)
class Option:
    """One field of EngineConfig as the command line, the file and the docs see it. kind: "str" or "int"."""

    name: str
    kind: str
    optional: bool
    default: object
    help: str
    unit: str
    choices: tuple[str, ...]
    refused: Mapping[str, str]

    @property
    def flag(self) -> str:
        """`--max-model-len`, as on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """`PAGEMILL_MAX_MODEL_LEN`, as in the environment."""
        return ENV_PREFIX + self.name.upper()

    def parse(self, value: object) -> object:
        """A value from text, TOML or Python as the field's own type. Raises ConfigError that names the option."""
        if self.optional and (value is None or (isinstance(value, str) and value.strip().lower() in ("", "none"))):
            return None
        if self.kind == "str":
            if self.name == "public_namespaces" and isinstance(value, list | tuple):  # as a file or Python gives them
                value = ",".join(parse_names(self.name, value))
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            self.check(value)
            return value
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ConfigError(f"{self.name} is {value!r}; give {self._accepted()}")
        if self.name == "seed":  # up to 2^64 - 1, beyond what counts reach
            if isinstance(value, str) and not value.strip().isdecimal():
                raise ConfigError(f"{self.name} is {value!r}; give a whole number from 0 to 2^64 - 1")
            return int(str(value)[:40])
        try:
            return parse_bytes(value) if self.unit == "bytes" else parse_count(value)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None

    def check(self, value: object) -> None:
        """Raise ConfigError unless `value` has the field's type and is one of its choices."""
        if self.optional and value is None:
            return
        expected = str if self.kind == "str" else int
        if not isinstance(value, expected) or isinstance(value, bool):
            raise ConfigError(f"{self.name} is {value!r}; give {self._accepted()}")
        if self.choices and value not in self.choices:
            if value in self.refused:
                raise ConfigError(f"{self.name} is {value!r}: {self.refused[str(value)]}")
            near = _suggestion(str(value), self.choices)
            raise ConfigError(f"{self.name} is {value!r};{near} choose one of {', '.join(self.choices)}")

    def _accepted(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return "text" if self.kind == "str" else f"a number{f' of {self.unit}' if self.unit else ''}"


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """A configuration and where each value came from: "command line", "argument", a variable, a file, "default"."""

    config: EngineConfig
    origins: dict[str, str]


def _options() -> dict[str, Option]:
    table = {}
    for each in fields(EngineConfig):
        if not each.metadata:
            continue
        kind, _, rest = str(each.type).partition(" | ")
        meta = each.metadata
        table[each.name] = Option(
            each.name, kind, rest == "None", each.default, meta["help"], meta["unit"], meta["choices"], meta["refused"]
        )
    return table


OPTIONS: dict[str, Option] = _options()


def resolve_config(
    arguments: Mapping[str, object],
    *,
    environ: Mapping[str, str] | None = None,
    file: str | Path | None = None,
    origin: str = "argument",
) -> ResolvedConfig:
    """Put a configuration together: `arguments` > environment > file > default.

    arguments: option name -> value (text is parsed: "512MiB", "2k"). environ: the process's unless given. file: a TOML
    file; else the one that PAGEMILL_CONFIG names. origin: what `arguments` are called in `origins`.
    Raises ConfigError for unknown names (with the nearest one), wrong values, and a file that cannot be read.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, object] = {}
    origins = dict.fromkeys([*OPTIONS, "tenants"], "default")

    def take(name: str, value: object, source: str, known_as: str) -> None:
        try:
            values[name] = OPTIONS[name].parse(value)
        except ConfigError as error:
            raise ConfigError(str(error) if source == origin else f"{known_as}: {error}") from None
        origins[name] = source

    def take_tenants(value: object, source: str, known_as: str) -> None:
        try:
            values["tenants"] = parse_tenants(value)
        except ConfigError as error:
            raise ConfigError(str(error) if source == origin else f"{known_as}: {error}") from None
        origins["tenants"] = source

    path = file if file is not None else environ.get(CONFIG_VARIABLE) or None
    if path is not None:
        for name, value in _read_file(Path(path)).items():
            (take_tenants if name == "tenants" else partial(take, name))(value, f"file {path}", str(path))
    for name, text in _read_environment(environ).items():
        take(name, text, OPTIONS[name].variable, f"environment variable {OPTIONS[name].variable}")
    for name, value in arguments.items():
        if name == "tenants":
            take_tenants(value, origin, name)
            continue
        if name not in OPTIONS:
            raise ConfigError(f"unknown option {name!r};{_suggestion(name, OPTIONS)} options: {', '.join(OPTIONS)}")
        take(name, value, origin, name)
    _check_contradictions(values)
    return ResolvedConfig(EngineConfig(**values), origins)  # type: ignore[arg-type]


def json_schema() -> dict[str, object]:
    """JSON Schema (draft 2020-12) of the options as a TOML or JSON file may give them."""
    properties: dict[str, object] = {}
    for each in OPTIONS.values():
        entry: dict[str, object] = {"description": each.help, "default": each.default}
        types = ["string"] if each.kind == "str" else ["integer", "string"]
        entry["type"] = types + (["null"] if each.optional else []) if each.optional or len(types) > 1 else types[0]
        if each.choices:
            entry["enum"] = list(each.choices)
        if each.unit:
            entry["x-unit"] = each.unit
        entry["x-environment"] = each.variable
        entry["x-flag"] = each.flag
        properties[each.name] = entry
    properties["tenants"] = tenants_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Pagemill engine options",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _read_file(path: Path) -> dict[str, object]:
    import tomllib  # takes longer than all else here, and most starts read no file

    try:
        with path.open("rb") as stream:
            table = tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"cannot read configuration file {path}: {error.strerror}; give an existing file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
    known: dict[str, object] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in OPTIONS and name != "tenants":
            raise ConfigError(f"{path}: unknown option {key!r};{_suggestion(name, OPTIONS)} see `pagemill config show`")
        known[name] = value
    return known


def _read_environment(environ: Mapping[str, str]) -> dict[str, str]:
    by_variable = {each.variable: each.name for each in OPTIONS.values()}
    known = {}
    for variable in environ:
        if not variable.startswith(ENV_PREFIX) or variable in OTHER_VARIABLES:
            continue
        if variable not in by_variable:
            near = _suggestion(variable, [*by_variable, *OTHER_VARIABLES])
            raise ConfigError(f"unknown environment variable {variable};{near} unset it or see `pagemill config show`")
        known[by_variable[variable]] = environ[variable]
    return known


def _check_contradictions(values: Mapping[str, object]) -> None:
    # Only where both were given: a small budget beside the default number of sequences is no contradiction.
    budget, num_seqs = values.get("max_num_batched_tokens"), values.get("max_num_seqs")
    if isinstance(budget, int) and isinstance(num_seqs, int) and budget < num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({budget}) is below max_num_seqs ({num_seqs}): not every sequence could get a "
            "token in a step; raise the first or lower the second"
        )


def _check_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        limit = "2^64 - 1" if high == 2**64 - 1 else f"{high:,}"
        raise ConfigError(f"{name} is {value}; give a whole number from {low} to {limit}")


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f" did you mean {near[0]}?" if near else ""
