"""What an operator asks of the cache of a running engine: blocks, tree, tenants, pins, purges. Owns the JSON of each.

Every function is called on the engine's thread, between two steps, and looks at no more than a bounded number of
blocks. Token ids are not told, for they are somebody's text: a block is named by the first half of its content key.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from pagemill.base.errors import ConfigError, RequestError
from pagemill.base.params import CacheOptions
from pagemill.engine import purging
from pagemill.engine.engine import Engine
from pagemill.server.errors import FieldError

MAX_LISTED: Final = 10_000
MAX_LOOKED_AT: Final = 65_536
MAX_TREE_DEPTH: Final = 64
KEY_CHARS: Final = 32
_TOKEN_BYTES: Final = 4


def list_blocks(engine: Engine, *, limit: int = 100, after: int = -1, tenant: str | None = None) -> dict[str, Any]:
    """Published blocks by id, at the most `limit` behind block `after`; next_after leads to the rest, None at the end.
    A page may have fewer, or none, where blocks of other tenants lie between.

    state: active where a sequence or a pin holds it, cached otherwise. expires_in_s: of its priority.
    """
    limit = _bounded("limit", limit, 1, MAX_LISTED)
    shared = _shared(engine)
    found: list[dict[str, Any]] = []
    last: int | None = None
    first = max(after, -1) + 1
    for number in range(first, engine.cache.num_blocks):
        if number - first == MAX_LOOKED_AT:
            return {"blocks": found, "next_after": number - 1}
        node = shared.tree.nodes.get(number)
        if node is None:
            continue
        account = shared.tenancy.accounts[node.account]
        if tenant is not None and account.name != tenant:
            continue
        if len(found) == limit:
            return {"blocks": found, "next_after": last}
        last = number
        found.append(
            {
                "block": number,
                "key": _key(node),
                "parent": None if node.depth == 0 else _key(node.parent),
                "first_token": node.depth * engine.cache.block_size,
                "tokens": len(node.tokens) // _TOKEN_BYTES,
                "tenant": account.name,
                "priority": node.priority,
                "expires_in_s": None if node.expires_s is None else round(node.expires_s - shared.now_s, 3),
                "state": "active" if engine.cache.is_held(number) else "cached",
                "children": len(node.children),
            }
        )
    return {"blocks": found, "next_after": None}


def show_tree(engine: Engine, *, depth: int = 4, limit: int = 200, tenant: str | None = None) -> dict[str, Any]:
    """The tree of prefixes, from each namespace's root. Chains without branches are one entry (`blocks` of them).

    depth: branchings from the root. limit: entries in all; truncated says that there are more.
    """
    depth = _bounded("depth", depth, 1, MAX_TREE_DEPTH)
    limit = _bounded("limit", limit, 1, MAX_LISTED)
    shared = _shared(engine)
    left = [limit]
    roots: list[dict[str, Any]] = []
    for account in _accounts(shared):
        if tenant is not None and account.name != tenant:
            continue
        for namespace, _, root in shared.tree.roots_of(account.tenant, public=account.public):
            if not root.children:
                continue
            if left[0] <= 0:
                return {"roots": roots, "truncated": True}
            left[0] -= 1
            entry = {"tenant": account.name, "salted": namespace.salt is not None}
            roots.append(entry | {"children": _branches(engine, root, depth, left)})
    return {"roots": roots, "truncated": left[0] <= 0}


def _branches(engine: Engine, parent: Any, depth: int, left: list[int]) -> list[dict[str, Any]]:
    found = []
    for child in parent.children.values():
        if left[0] <= 0:
            break
        left[0] -= 1
        node, blocks, num_tokens = child, 1, len(child.tokens) // _TOKEN_BYTES
        while len(node.children) == 1:
            [node] = node.children.values()
            blocks += 1
            num_tokens += len(node.tokens) // _TOKEN_BYTES
        entry: dict[str, Any] = {"key": _key(child), "first_token": child.depth * engine.cache.block_size}
        entry |= {"blocks": blocks, "tokens": num_tokens, "branches": len(node.children)}
        entry["children"] = _branches(engine, node, depth - 1, left) if depth > 1 else []
        found.append(entry)
    return found


def list_tenants(engine: Engine) -> dict[str, Any]:
    """Accounts: blocks in use, of them cached and pinned, floor and cap; in blocks."""
    cache = engine.cache
    shared = _shared(engine)
    tenants = [
        {
            "tenant": each.name,
            "used": each.used,
            "cached": each.cached,
            "pinned": each.pinned,
            "floor": each.floor,
            "cap": each.cap,
        }
        for each in _accounts(shared)
    ]
    return {"tenants": tenants, "block_tokens": cache.block_size, "blocks": cache.num_blocks}


def set_quota(engine: Engine, tenant: str, given: Mapping[str, object]) -> dict[str, Any]:
    """Another floor or cap for a tenant, in token positions: `floor_tokens`, `cap_tokens` (None: no cap). What is left
    out stays as it is. Raises RequestError, and changes nothing, where nothing is given, floors exceed the memory or
    the cap its bounds."""
    if not given:
        raise RequestError("nothing is given; give floor_tokens, cap_tokens (null: no cap) or both")
    size, shared = engine.cache.block_size, _shared(engine)
    known = next((each for each in _accounts(shared) if each.tenant == tenant and not each.public), None)
    floor, cap = (0, None) if known is None else (known.floor, known.cap)
    if "floor_tokens" in given:
        floor = -(-_whole("floor_tokens", 0 if given["floor_tokens"] is None else given["floor_tokens"]) // size)
    if "cap_tokens" in given:
        cap = None if given["cap_tokens"] is None else _whole("cap_tokens", given["cap_tokens"]) // size
    try:
        shared.set_quota(tenant_name(tenant), floor, cap)
    except ConfigError as error:
        raise FieldError(str(error), param=_wrong_alone(shared, tenant, floor, cap)) from None
    return {"tenant": tenant, "floor": floor, "cap": cap}


def _wrong_alone(shared: Any, tenant: str, floor: int, cap: int | None) -> str | None:
    """Which part of a quota would be refused without the other; None where they contradict each other."""
    for name, alone in (("floor_tokens", (floor, None)), ("cap_tokens", (0, cap))):
        try:
            shared.tenancy.check_quota(tenant, *alone)
        except ConfigError:
            return name
    return None


def pin(engine: Engine, options: CacheOptions, token_ids: Iterable[int], seconds: float) -> dict[str, Any]:
    """Keep what the cache holds of a text for so long. Raises CapacityError beyond the tenant's cap or half of
    it, and RequestError where nothing of the text is there."""
    shared = _shared(engine)
    engine.advance_clock()
    lease = shared.pin(options, _packed(token_ids), seconds)
    return {"pin": lease.lease_id, "tokens": lease.num_tokens, "blocks": len(lease.blocks), "seconds": seconds}


def unpin(engine: Engine, pin_id: int) -> dict[str, Any]:
    """End a pin; ended is False where it had ended."""
    engine.advance_clock()
    return {"pin": pin_id, "ended": _shared(engine).unpin(pin_id)}


def purge(
    engine: Engine, options: CacheOptions, what: str = "namespace", token_ids: Iterable[int] | None = None
) -> dict[str, Any]:
    """Drop texts, and wipe their pages before this returns. Returns {"blocks": dropped, "pins": ended with them}.

    what: text (this one to its end, answer included, but not what others share with it), prefix (all that begin with
    it), namespace (all of the tenant with this salt), tenant (all of it, whatever the salt). Raises RequestError for
    another word, or no text.
    """
    shared = _shared(engine)
    if what in ("text", "prefix") and token_ids is None:
        raise FieldError(f"to purge a {what}, give prompt or prompt_token_ids", param="prompt")
    if what in ("namespace", "tenant") and token_ids is not None:
        raise FieldError(
            f"what is {what!r} and a prompt is given; give what: text or prefix, or leave the prompt out", param="what"
        )
    drops: dict[str, Callable[[], int]] = {
        "text": lambda: shared.purge_text(options, _packed(token_ids or ())),
        "prefix": lambda: shared.purge_prefix(options, _packed(token_ids or ())),
        "namespace": lambda: shared.purge_namespace(options),
        "tenant": lambda: shared.purge_tenant(options.tenant),
    }
    if what not in drops:
        raise FieldError(f"what is {what!r:.40}; give text, prefix, namespace or tenant", param="what")
    purged = purging.purge(engine, shared, drops[what])
    return {"blocks": int(purged), "pins": purged.num_pins}


def _shared(engine: Engine) -> Any:
    """The published blocks, whose types belong to a unit that the server does not import."""
    shared: Any = engine.cache.shared
    if shared is None:
        raise RequestError(
            "there is no prefix cache; start with enable_prefix_caching on and kv_cache paged", status=409
        )
    return shared


def _accounts(shared: Any) -> list[Any]:
    return [each for each in shared.tenancy.accounts if each is not None and each.name]


def _key(node: Any) -> str:
    return str(node.key.hex()[:KEY_CHARS])


def _packed(token_ids: Iterable[int]) -> array[int]:
    try:
        return array("i", token_ids)
    except (OverflowError, TypeError):
        raise FieldError("prompt_token_ids: give a list of token ids of this model", param="prompt_token_ids") from None


def tenant_name(name: object) -> str:
    """A tenant's name. Raises RequestError for what is none."""
    if not isinstance(name, str) or not 0 < len(name) <= 256 or not name.isprintable():
        raise FieldError("tenant: give a name of 1 to 256 printable letters", param="tenant")
    return name


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise FieldError(f"{name} is {value!r:.40}; give a whole number of tokens", param=name)
    return value


def _bounded(name: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise FieldError(f"{name} is {value}; give {least} to {most:,}", param=name)
    return value
