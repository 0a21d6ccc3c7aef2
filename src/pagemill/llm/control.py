"""What an operator does to the prefix cache: quotas, public namespaces, pins, purges. Owns no state of its own."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any

from pagemill.base.errors import ConfigError, RequestError
from pagemill.base.params import DEFAULT_CACHE_OPTIONS, CacheOptions
from pagemill.engine.cache_stats import cache_curve, cache_stats
from pagemill.engine.engine import Engine
from pagemill.engine.ports import CacheListener
from pagemill.engine.purging import Purged, purge
from pagemill.llm.outputs import RequestOutput

MAX_NAME = 256


@dataclass(frozen=True, slots=True)
class Pin:
    """A text kept from eviction. num_tokens: how many of its first ones are kept. expires_s: on the engine's clock."""

    pin_id: int
    num_tokens: int
    expires_s: float


class CacheControl:
    """The prefix cache of an LLM. Raises ConfigError where the engine shares nothing (`enable_prefix_caching`).

    A prompt is a text, {"prompt": …} or {"prompt_token_ids": […]}; options say in whose namespace.
    """

    def __init__(self, engine: Engine, lock: RLock, token_ids: Callable[[Any], list[int]]) -> None:
        if engine.cache.shared is None:
            raise ConfigError("there is no prefix cache; set enable_prefix_caching to on and kv_cache to paged")
        self._engine = engine
        self._shared = engine.cache.shared
        self._lock = lock
        self._token_ids = token_ids

    def stats(self, sizes: Sequence[int] | None = None) -> dict[str, Any]:
        """Use of the cache now, what it found since the start, and `curve`, as one JSON object."""
        with self._lock:
            return cache_stats(self._engine, sizes)

    def curve(self, sizes: Sequence[int] | None = None) -> dict[str, Any]:
        """Expected hit ratio of the texts seen so far for caches of these sizes in blocks (None: an eighth of this one
        to eight times it), each evicting what was least recently used. Raises ConfigError for sizes below 1."""
        with self._lock:
            return cache_curve(self._engine.cache, sizes)

    def set_quota(self, tenant: str, *, floor_tokens: int = 0, cap_tokens: int | None = None) -> None:
        """What other tenants' demand cannot push a tenant below, and what it cannot rise above, in token positions.

        Raises ConfigError, and changes nothing, where floors exceed the memory or a cap its bounds.
        """
        _check_name("a tenant", tenant)
        for name, value in (("floor_tokens", floor_tokens), ("cap_tokens", cap_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"{name} is {value!r}; give a whole number of tokens")
        with self._lock:
            self._engine.cache.grant(tenant, floor_tokens, cap_tokens)
            self._engine.settle()

    def declare_public(self, name: str) -> None:
        """Let requests share the namespace `name` across tenants, by CacheOptions(public=name). Raises ConfigError."""
        _check_name("a public namespace", name)
        with self._lock:
            self._shared.tenancy.declare_public(name)

    def pin(self, prompt: Any, seconds: float, options: CacheOptions = DEFAULT_CACHE_OPTIONS) -> Pin:
        """Keep what the cache holds of a prompt for so long: whole blocks, and the one that its last tokens stand in
        where all of these do. Raises CapacityError beyond the tenant's cap or half of the cache, and RequestError for a
        time that is none, or where nothing of the prompt is there to be kept."""
        tokens = self._tokens(prompt, options)
        _check_given(prompt, tokens, "give the text that is to be kept")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise RequestError(f"seconds is {seconds!r}; give a number of seconds above 0")
        with self._lock:
            self._engine.advance_clock()
            lease = self._shared.pin(options, tokens, seconds)
            return Pin(lease.lease_id, lease.num_tokens, lease.expires_s)

    def unpin(self, pin: Pin) -> bool:
        """End a pin; False where it has ended. Raises RequestError for what is no pin."""
        if not isinstance(pin, Pin):
            raise RequestError(f"a pin is a {type(pin).__name__}; give what `pin` returned")
        with self._lock:
            self._engine.advance_clock()
            return self._shared.unpin(pin.pin_id)

    def purge(self, prompt: Any, options: CacheOptions = DEFAULT_CACHE_OPTIONS) -> Purged:
        """Drop a text, but not what other texts share with it. Returns blocks dropped, after their pages are wiped, and
        the pins that ended with them (`num_pins`).

        prompt: a prompt, of which all stays that another cached text goes on from, its own answer too: `purge_prefix`
        first drops these. Or the RequestOutput of a request that has ended: its prompt and the tokens of each choice
        go. options: those of the request. Raises RequestError for a request that still runs.
        """
        if isinstance(prompt, RequestOutput):
            texts = [self._tokens({"prompt_token_ids": ids}, options) for ids in _texts_of(prompt)]
        else:
            texts = [self._tokens(prompt, options)]
        return self._purged(lambda: sum(self._shared.purge_text(options, tokens) for tokens in texts))

    def purge_prefix(self, prompt: Any, options: CacheOptions = DEFAULT_CACHE_OPTIONS) -> Purged:
        """Drop every text that begins like this; blocks that end before the prompt does stay, for others may begin so
        too, until `purge` drops those that none does. Returns as `purge` does. Raises RequestError for an empty prompt,
        which every text begins with."""
        tokens = self._tokens(prompt, options)
        _check_given(prompt, tokens, "name a beginning, or drop all of them by purge_namespace")
        return self._purged(lambda: self._shared.purge_prefix(options, tokens))

    def purge_namespace(self, options: CacheOptions = DEFAULT_CACHE_OPTIONS) -> Purged:
        """Drop every text of a tenant's namespace with this salt, or of a public one. Returns as `purge` does."""
        _check_options(options)
        return self._purged(lambda: self._shared.purge_namespace(options))

    def purge_tenant(self, tenant: str) -> Purged:
        """Drop every text of a tenant, with its secret. Returns as `purge` does. Raises RequestError where only known
        tenants may enter and this is none."""
        _check_name("a tenant", tenant)
        return self._purged(lambda: self._shared.purge_tenant(tenant))

    def remove_tenant(self, tenant: str) -> Purged:
        """`purge_tenant`, and its quota goes too; where only known tenants may enter, it is none any more. Raises as
        that does."""
        _check_name("a tenant", tenant)
        return self._purged(lambda: self._shared.remove_tenant(tenant))

    def listen(self, told: CacheListener | None) -> None:
        """Have a function told of each block that can be found from now on or no longer, in order and on the engine's
        thread; replaying what it is told gives the index. None ends it. It must not raise nor use the LLM. Raises
        ConfigError for what cannot be called."""
        if told is not None and not callable(told):
            raise ConfigError(f"a listener is a {type(told).__name__}; give a function, or None")
        with self._lock:
            self._shared.listener = told

    def _tokens(self, prompt: Any, options: CacheOptions) -> array[int]:
        _check_options(options)
        try:
            return array("i", self._token_ids(prompt))
        except (OverflowError, TypeError) as error:
            raise RequestError(
                f"the prompt's token ids are no 32-bit numbers ({error}); give ids of this model"
            ) from None

    def _purged(self, drop: Callable[[], int]) -> Purged:
        with self._lock:
            return purge(self._engine, self._shared, drop)


def _texts_of(output: RequestOutput) -> list[list[int]]:
    """The prompt of a request with the answer of each choice."""
    running = [each.index for each in output.outputs if each.finish_reason is None]
    if running:
        raise RequestError(
            f"choice {running[0]} of request {output.request_id!r} had not ended, so that its text may go on; give the "
            f"output that has a finish_reason, or drop all that begins with the prompt by purge_prefix"
        )
    return [[*output.prompt_token_ids, *each.token_ids] for each in output.outputs]


def _check_given(prompt: Any, tokens: array[int], remedy: str) -> None:
    """The tokens of an empty text may be that of every beginning."""
    if not tokens or prompt in ("", {"prompt": ""}):
        raise RequestError(f"the prompt is empty; {remedy}")


def _check_options(options: object) -> None:
    if not isinstance(options, CacheOptions):
        raise RequestError(f"options is a {type(options).__name__}; give CacheOptions(tenant=…)")


def _check_name(whose: str, name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise ConfigError(f"{whose} is named {name!r:.40}; give a text of 1 to {MAX_NAME} letters")
