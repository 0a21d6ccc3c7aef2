"""What a caller may ask of one request: sampling, lengths, stops. Validation lives here, once."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pagemill.base.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_CHOICES = 128
MOST_PRIORITY = 100
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_BYTES = 2**18


class Unsaid(int):
    """A number that stands where the caller gave none: it gives way where one of the caller's own is refused.

    It equals the same number of the caller's, so that nothing may be remembered by it.
    """

    __slots__ = ()


DEFAULT_MAX_TOKENS: Final = Unsaid(16)


def _check(param: str, condition: bool, message: str) -> None:
    if not condition:
        raise RequestError(message, param=param)


def _whole(param: str, value: Any, of: str = "") -> int:
    """The value as Python's number. of: what it is of the parameter, where it is not all of it."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise RequestError(f"{of or param} is {value!r}; give a whole number", param=param)


def _number(param: str, value: Any, of: str = "") -> float:
    try:
        if not isinstance(value, bool | str | bytes):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise RequestError(f"{of or param} is {value!r:.40}; give a number", param=param)


def _bias(pair: Any) -> tuple[int, float]:
    name = "logit_bias"
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    _check(name, is_pair, f"logit_bias holds {pair!r:.40}; give token id -> number")
    token = _whole(name, pair[0], of="a token of logit_bias")
    value = _number(name, pair[1], of="a value of logit_bias")
    _check(name, token >= 0, f"logit_bias names token {token}; token ids are 0 or more")
    _check(name, -100.0 <= value <= 100.0, f"logit_bias of token {token} is {value}; give a number from -100 to 100")
    return token, value


def _listed(name: str, value: object, of: str) -> tuple[object, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise RequestError(f"{name} is {value!r}; give a list of {of}", param=name)
    return tuple(value)


GrammarKind = Literal["json_schema", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a text must be. kind json_schema: a JSON schema as JSON text; regex: a regular expression over the whole
    text; lark: a grammar in llguidance's dialect of Lark. Raises RequestError for other kinds and beyond 256 KiB."""

    kind: GrammarKind
    text: str

    @property
    def noun(self) -> str:
        """What messages call it."""
        return "grammar" if self.kind == "lark" else self.kind

    def __post_init__(self) -> None:
        known = ("json_schema", "regex", "lark")
        _check("grammar", self.kind in known, f"a grammar's kind is {self.kind!r:.40}; give json_schema, regex or lark")
        _check(
            "grammar", isinstance(self.text, str) and self.text != "", f"the {self.noun} is empty or no text; give one"
        )
        size = len(self.text.encode(errors="replace"))
        _check(
            "grammar",
            size <= MAX_GRAMMAR_BYTES,
            f"the {self.noun} has {size:,} bytes; give up to {MAX_GRAMMAR_BYTES:,}",
        )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen. Names and meanings are vLLM's.

    temperature: 0 is greedy; otherwise logits are divided by it (≤ 100).
    top_k: keep the k most likely tokens (0 or -1: all).  top_p: keep the smallest set of tokens whose probability
    reaches p (0 < p ≤ 1).  min_p: drop tokens less likely than min_p × the most likely one (0 ≤ min_p ≤ 1).
    seed: random numbers are keyed by (seed, choice index, position); None takes one from the engine's seed.
    n: number of choices.  max_tokens: tokens generated at the most, cut at the context's end and at the tenant's cap;
    one that the KV cache cannot hold behind the prompt is refused (None: as many as fit; unset: 16, or as many as fit).
    min_tokens: no stop of any kind before so many tokens.  stop: strings that end the text and are cut from it.
    stop_token_ids: ids that end it, beside the model's own end-of-text ids unless ignore_eos.
    logprobs: k ≤ 20 most likely tokens reported per position beside the sampled one (None: nothing reported).
    include_stop_str_in_output: keep the stop string at the end of the text.
    skip_special_tokens: leave special tokens out of the text.
    presence_penalty, frequency_penalty: taken from the logit of each generated token, once or per occurrence (-2 to 2).
    repetition_penalty: logits of tokens of prompt and answer are divided by it, multiplied where negative (arXiv
    1909.05858; 1 is off).  logit_bias: token id -> added to its logit (-100 to 100), at the most 1,024 of them.
    prompt_logprobs: k ≤ 20 most likely tokens reported per position of the prompt, which is computed in whole for it.
    grammar: what the text must be; it ends where the grammar does.
    priority: requests of one tenant with a lower value enter earlier; each unit is worth some seconds of waiting, so
    that none starves (-100 to 100).  deadline_s: seconds after its arrival at which a request that is not finished ends
    with an error (None: never).

    Raises RequestError (status 400) for values of a wrong type, out of range or contradictory.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    stop: tuple[str, ...] = field(default=())
    stop_token_ids: tuple[int, ...] = field(default=())
    ignore_eos: bool = False
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    priority: int = 0
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        stop: object = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else _listed("stop", stop, "texts"))
        token_ids = _listed("stop_token_ids", self.stop_token_ids, "token ids")
        object.__setattr__(
            self,
            "stop_token_ids",
            tuple(_whole("stop_token_ids", each, of="a token of stop_token_ids") for each in token_ids),
        )
        self._read_types()
        self._check_sampling()
        self._check_lengths()
        self._check_stops()
        self._check_urgency()
        self._check_adjustments()

    @property
    def greedy(self) -> bool:
        """True where the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def adjusts_logits(self) -> bool:
        """True where logits change before a token is chosen: by penalties, biases or a grammar."""
        return bool(self.logit_bias) or self.grammar is not None or self.penalizes

    @property
    def penalizes(self) -> bool:
        """True where tokens of the text so far become less likely, or more."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    @property
    def reads_history(self) -> bool:
        """True where choosing or reporting a token needs the text before it."""
        return self.adjusts_logits or self.prompt_logprobs is not None

    def _read_types(self) -> None:
        """Numbers of any library become Python's; what is no number is refused here, so that no step meets it."""
        bias: Any = self.logit_bias
        pairs = _listed("logit_bias", bias.items() if isinstance(bias, Mapping) else bias, "pairs")
        object.__setattr__(self, "logit_bias", tuple(map(_bias, pairs)))
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if self.deadline_s is not None:
            object.__setattr__(self, "deadline_s", _number("deadline_s", self.deadline_s))
        for name in ("top_k", "n", "min_tokens", "seed", "max_tokens", "logprobs", "prompt_logprobs", "priority"):
            value = getattr(self, name)
            if isinstance(value, Unsaid):
                continue
            if value is not None or name in ("top_k", "n", "min_tokens", "priority"):
                object.__setattr__(self, name, _whole(name, value))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            value = getattr(self, name)
            _check(name, isinstance(value, bool), f"{name} is {value!r}; give True or False")

    def _check_sampling(self) -> None:
        t = self.temperature
        _check("temperature", 0.0 <= t <= 100.0, f"temperature is {t}; give a number from 0 (greedy) to 100")
        _check("top_k", self.top_k >= -1, f"top_k is {self.top_k}; give 0 or -1 (all tokens), or a positive number")
        _check(
            "top_p",
            0.0 < self.top_p <= 1.0,
            f"top_p is {self.top_p}; give a number above 0 and up to 1 (1 keeps all tokens)",
        )
        _check("min_p", 0.0 <= self.min_p <= 1.0, f"min_p is {self.min_p}; give a number from 0 (off) to 1")
        if self.seed is not None:
            _check("seed", 0 <= self.seed < 2**64, f"seed is {self.seed}; give a whole number from 0 to 2^64 - 1")

    def _check_lengths(self) -> None:
        _check("n", 1 <= self.n <= MAX_CHOICES, f"n is {self.n}; give a number of choices from 1 to {MAX_CHOICES}")
        _check(
            "n",
            self.n == 1 or not self.greedy,
            f"n is {self.n} with temperature 0: greedy choices would all be equal; give n=1 or a temperature above 0",
        )
        if self.max_tokens is not None:
            _check(
                "max_tokens",
                self.max_tokens >= 1,
                f"max_tokens is {self.max_tokens}; give at least 1, or leave it out for no limit",
            )
        _check("min_tokens", self.min_tokens >= 0, f"min_tokens is {self.min_tokens}; give 0 or more")
        _check(
            "min_tokens",
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens}); lower one or raise the other",
        )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _check(
                name,
                count is None or 0 <= count <= MAX_LOGPROBS,
                f"{name} is {count}; give a number from 0 to {MAX_LOGPROBS}, or leave it out",
            )

    def _check_adjustments(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, -2.0 <= value <= 2.0, f"{name} is {value}; give a number from -2 to 2 (0 is off)")
        repeat = self.repetition_penalty
        _check(
            "repetition_penalty",
            0.0 < repeat <= 100.0,
            f"repetition_penalty is {repeat}; give a number above 0 and up to 100 (1 is off)",
        )
        _check(
            "logit_bias",
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            f"logit_bias names {len(self.logit_bias):,} tokens; give at most {MAX_LOGIT_BIAS:,}",
        )
        if self.grammar is not None:
            _check(
                "grammar",
                isinstance(self.grammar, Grammar),
                f"grammar is a {type(self.grammar).__name__}; give Grammar(…)",
            )
            for name in ("min_tokens", "ignore_eos"):
                _check(
            name,
                    not getattr(self, name), f"{name} is {getattr(self, name)} and a grammar says where the text ends; "
                    "leave out one of them",
                )  # fmt: skip

    def _check_urgency(self) -> None:
        _check(
            "priority",
            -MOST_PRIORITY <= self.priority <= MOST_PRIORITY,
            f"priority is {self.priority}; give a whole number from -{MOST_PRIORITY} (first) to {MOST_PRIORITY} (last)",
        )
        if self.deadline_s is not None:
            _check(
                "deadline_s",
                0 < self.deadline_s < 1e9,
                f"deadline_s is {self.deadline_s}; give seconds above 0 and below 10^9, or leave it out",
            )

    def _check_stops(self) -> None:
        _check("stop", len(self.stop) <= MAX_STOPS, f"stop has {len(self.stop)} strings; give at most {MAX_STOPS}")
        for text in self.stop:
            _check(
                "stop",
                isinstance(text, str) and 0 < len(text) <= 1024,
                "stop holds what is empty, no text or longer than 1,024 characters; give 1 to 1,024 characters",
            )
        for token in self.stop_token_ids:
            _check("stop_token_ids", token >= 0, f"stop_token_ids holds {token}; token ids are 0 or more")


@dataclass(frozen=True, slots=True)
class Retain:
    """Prompt positions start .. end-1 leave the cache after those of a lower priority (0 to 100, unset is 50), for
    `ttl_s` seconds from when they are stored or hit (None: for good). Raises RequestError for values out of range."""

    start: int
    end: int
    priority: int = 80
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("start", "end", "priority"):
            object.__setattr__(self, name, _whole("retain", getattr(self, name), of=f"{name} of a retained range"))
        _check(
            "retain",
            0 <= self.start < self.end,
            f"a retained range is {self.start} to {self.end}; give 0 <= start < end",
        )
        _check(
            "retain",
            0 <= self.priority <= 100,
            f"priority of a retained range is {self.priority}; give a whole number from 0 to 100",
        )
        if self.ttl_s is not None:
            object.__setattr__(self, "ttl_s", _number("retain", self.ttl_s, of="ttl_s of a retained range"))
            _check(
                "retain",
                0 < self.ttl_s < 1e9,
                f"ttl_s of a retained range is {self.ttl_s}; give seconds above 0 and below 10^9, or none",
            )


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """What a request asks of the prefix cache.

    tenant: whose cache it is; comes from the identity of the caller, never from the caller's wish. salt: narrows it to
    requests with the same salt (vLLM's cache_salt); empty is not unset. public: a namespace that the operator declared
    and that all tenants share. bypass: read nothing, leave nothing. retain: ranges of the prompt with a priority.
    Raises RequestError for values of a wrong type.
    """

    tenant: str = "default"
    salt: str | None = None
    public: str | None = None
    bypass: bool = False
    retain: tuple[Retain, ...] = ()

    def __post_init__(self) -> None:
        _check(
            "tenant",
            isinstance(self.tenant, str) and 0 < len(self.tenant) <= 256,
            "tenant: give a name of 1 to 256 letters",
        )
        for name in ("salt", "public"):
            value = getattr(self, name)
            _check(
                name,
                value is None or (isinstance(value, str) and len(value) <= 1024),
                f"{name} is {value!r:.40}; give a text of at most 1,024 letters, or leave it out",
            )
        _check("bypass", isinstance(self.bypass, bool), f"bypass is {self.bypass!r}; give True or False")
        retain = _listed("retain", self.retain, "ranges (Retain)")
        _check("retain", all(isinstance(each, Retain) for each in retain), "retain: give a list of Retain")
        object.__setattr__(self, "retain", retain)


DEFAULT_CACHE_OPTIONS = CacheOptions()
