"""`pagemill cache ls|tree|purge|pin|unpin`: the cache of a running server, asked at its admin port. Owns what is asked
and printed, and the question before a purge; the server's side is `server/admin_cache.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from pagemill.base.errors import ConfigError, RequestError
from pagemill.base.units import format_seconds, parse_count, parse_seconds
from pagemill.cli.cache_remote_client import Server, ServerError, admin_server, plain
from pagemill.cli.terminal import note, print_json

_T = TypeVar("_T")

BLOCKS = "/admin/cache/blocks"
TREE = "/admin/cache/tree"
PURGE = "/admin/cache/purge"
PIN = "/admin/cache/pin"
TENANTS = "/admin/tenants"
KINDS = ("text", "prefix", "namespace", "tenant")

_ACT_TIMEOUT_S = 60.0  # pages are wiped before a purge is answered
_PAGE = 10_000
_MOST_LISTED = 1_000_000
_KEY_CHARS = 8
_PIPE_WIDTH = 100
_INTERRUPTED = 130
_MOST_INPUT_BYTES = 1 << 26


def ls(*, url: str | None, key: str | None, tenant: str | None, limit: str, as_json: bool) -> int:
    """List published blocks by id: key, place in the text, tenant, state."""
    most = parse_count(limit)
    if not 1 <= most <= _MOST_LISTED:
        raise ConfigError(f"--limit is {limit}; give 1 to {_MOST_LISTED:,} blocks")
    server = admin_server(url, key)
    blocks, after = _list_blocks(server, tenant, most)
    if as_json:
        print_json({"blocks": blocks, "next_after": after})
        return 0
    if not blocks:
        print("nothing is cached" if tenant is None else f"nothing of tenant {plain(tenant)} is cached")
        return 0
    _print(_shown(server, lambda: _blocks_table(blocks)))
    if after is not None:
        note(f"the first {len(blocks):,} blocks; there are more: --limit")
    return 0


def tree(*, url: str | None, key: str | None, tenant: str | None, depth: int, limit: str, as_json: bool) -> int:
    """Show which texts begin alike: the tree of prefixes below each namespace."""
    server = admin_server(url, key)
    found = server.ask("GET", TREE, query={"depth": depth, "limit": parse_count(limit), "tenant": tenant})
    if as_json:
        print_json(found)
        return 0
    roots = _shown(server, lambda: [_drawn(each) for each in found["roots"]])
    if not roots:
        print("nothing is cached" if tenant is None else f"nothing of tenant {plain(tenant)} is cached")
        return 0
    for each in roots:
        _print(each)
    if found.get("truncated"):
        note("there is more: --limit")
    return 0


def purge(
    *,
    url: str | None,
    key: str | None,
    text: str | None,
    token_ids: str | None,
    what: str | None,
    whose: dict[str, Any],
    yes: bool,
    as_json: bool,
) -> int:
    """Drop texts of a namespace from the cache, after asking; their pages are wiped when this returns."""
    given = _given_text(text, token_ids, "or choose all with --what namespace")
    if what is None:
        if not given:
            raise ConfigError(
                "purge what? give a text or --token-ids FILE; --what namespace drops all of --tenant with this --salt, "
                "--what tenant all of it"
            )
        what = "prefix"
    if what not in KINDS:
        raise ConfigError(f"--what is {plain(what)[:40]}; give text, prefix, namespace or tenant")
    if bool(given) != (what in ("text", "prefix")):
        wanted = "give a text or --token-ids FILE" if not given else "leave the text out, or take --what prefix"
        raise ConfigError(f"--what {what}: {wanted}")
    server = admin_server(url, key)
    if not yes and not _agreed(server, _purge_question(server, what, given, whose)):
        note("nothing was purged")
        return _INTERRUPTED
    body = {"what": what, **given, **_named(whose)}
    found = server.ask("POST", PURGE, body=body, timeout_s=_ACT_TIMEOUT_S)
    if as_json:
        print_json(found | {"what": what, "tenant": whose["tenant"]})
        return 0
    count, pins = _shown(server, lambda: (int(found["blocks"]), int(found.get("pins", 0))))
    print(f"{_blocks(count)} dropped and wiped" if count else "nothing of it was cached")
    if pins:
        note(f"{pins:,} {'pins' if pins > 1 else 'pin'} of it ended too")
    return 0


def pin(
    *,
    url: str | None,
    key: str | None,
    text: str | None,
    token_ids: str | None,
    seconds: str,
    whose: dict[str, Any],
    as_json: bool,
) -> int:
    """Keep what is cached of a text from eviction for a time."""
    given = _given_text(text, token_ids, "whose blocks are to be kept")
    if not given:
        raise ConfigError("pin what? give a text or --token-ids FILE")
    wanted_s = parse_seconds(seconds)
    if wanted_s <= 0:
        raise ConfigError(f"--for is {seconds}; give a time above 0, as 10m or 1h")
    server = admin_server(url, key)
    try:
        found = server.ask("POST", PIN, body={"seconds": wanted_s, **given, **_named(whose)}, timeout_s=_ACT_TIMEOUT_S)
    except ServerError as error:
        if error.status == HTTPStatus.BAD_REQUEST and text is not None:
            note("a conversation has control tokens too: take --token-ids with what /tokenize answers for its messages")
        raise
    if as_json:
        print_json(found)
        return 0
    number, tokens, blocks = _shown(server, lambda: tuple(int(found[name]) for name in ("pin", "tokens", "blocks")))
    print(f"pin {number}: {tokens:,} tokens in {_blocks(blocks)} are kept for {format_seconds(wanted_s)}")
    note(f"end it with: pagemill cache unpin {number}")
    return 0


def unpin(*, url: str | None, key: str | None, pin_id: int, as_json: bool) -> int:
    """End a pin. Raises RequestError where there is none, or no more."""
    if pin_id < 0:
        raise ConfigError(f"pin {pin_id}: give the number that `pagemill cache pin` told")
    server = admin_server(url, key)
    found = server.ask("DELETE", f"{PIN}/{pin_id}")
    if not found.get("ended"):
        raise RequestError(f"there is no pin {pin_id}, or it had ended; a purge ends pins too, and so does their time")
    if as_json:
        print_json(found)
    else:
        print(f"pin {pin_id} has ended")
    return 0


def _list_blocks(server: Server, tenant: str | None, most: int) -> tuple[list[dict[str, Any]], int | None]:
    """At the most so many blocks, page by page, and the last one's id where there are more."""
    blocks: list[dict[str, Any]] = []
    after: int | None = -1
    while after is not None and len(blocks) < most:
        asked = {"limit": min(most - len(blocks), _PAGE), "after": after, "tenant": tenant}
        page = server.ask("GET", BLOCKS, query=asked)
        found, following = page.get("blocks"), page.get("next_after")
        if not isinstance(found, list) or not (following is None or (type(following) is int and following > after)):
            raise _other_version(server)
        blocks += found
        after = following
    return blocks, after


def _blocks_table(blocks: list[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("block", "key", "behind", "tokens", "tenant", "state", "priority", "for", "below"):
        justify: Literal["left", "right"] = "left" if name in ("key", "behind", "tenant", "state") else "right"
        table.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis" if name == "tenant" else "fold")
    for each in blocks:
        first, expires = each["first_token"], each["expires_in_s"]
        table.add_row(
            f"{each['block']:,}",
            plain(each["key"])[:_KEY_CHARS],
            "" if each["parent"] is None else plain(each["parent"])[:_KEY_CHARS],
            _span(first, each["tokens"]),
            Text(plain(each["tenant"])),
            plain(each["state"]),
            str(each["priority"]),
            "" if expires is None else format_seconds(max(float(expires), 0.0)),
            f"{each['children']:,}",
        )
    return table


def _drawn(root: dict[str, Any]) -> Tree:
    """One namespace; a line for each chain without branches."""
    head = f"tenant {plain(root['tenant'])}{', with a salt' if root['salted'] else ''}"
    top = Tree(Text(head, style="bold"), guide_style="dim")
    waiting = [(top, root["children"])]
    while waiting:
        parent, children = waiting.pop()
        for each in children:
            below = each["children"]
            line = f"{plain(each['key'])[:_KEY_CHARS]}  tokens {_span(each['first_token'], each['tokens'])}"
            line += f", {_blocks(int(each['blocks']))}"
            hidden = int(each["branches"]) - len(below)
            if hidden > 0:
                line += f"; {hidden:,} {'branches' if hidden > 1 else 'branch'} not shown"
            waiting.append((parent.add(Text(line)), below))
    return top


def _purge_question(server: Server, what: str, given: dict[str, Any], whose: dict[str, Any]) -> Iterator[str]:
    """What is about to be dropped, in words; the tenant's blocks where the server tells them."""
    tenant = plain(whose["tenant"])
    salted = "with this salt" if whose["salt"] is not None else "without a salt"
    space = f"public namespace {plain(whose['public'])}" if whose["public"] is not None else f"tenant {tenant}"
    if what == "tenant":
        yield f"All texts of tenant {tenant}, whatever their salt, leave the cache of {server.url}."
    elif what == "namespace":
        yield f"All texts of {space}, {salted}, leave the cache of {server.url}."
    else:
        prompt = given.get("prompt")
        told = f"{plain(prompt)[:60]!r}" if prompt is not None else f"{len(given['prompt_token_ids']):,} given tokens"
        if what == "text":
            yield f"The text {told} of {space}, {salted}, leaves the cache of {server.url}."
        else:
            yield f"All texts of {space}, {salted}, that begin with {told} leave the cache of {server.url}."
    found = server.ask("GET", TENANTS).get("tenants")
    mine = [each for each in found if each.get("tenant") == whose["tenant"]] if isinstance(found, list) else []
    if mine:
        yield _shown(
            server,
            lambda: (
                f"Tenant {tenant} holds {_blocks(mine[0]['used'])}, {mine[0]['used'] - mine[0]['cached']:,} of "
                f"them in use, {mine[0]['pinned']:,} pinned."
            ),
        )
    elif whose["public"] is None:
        yield f"Tenant {tenant} holds nothing, as far as the server knows."


def _agreed(server: Server, question: Iterator[str]) -> bool:
    """Ask on the terminal. Raises ConfigError where nobody can answer."""
    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to confirm the purge (stdin is no terminal); say --yes")
    for line in question:
        note(line)
    print("Purge? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _given_text(text: str | None, token_ids: str | None, otherwise: str) -> dict[str, Any]:
    """The field of the request that names a text; nothing where none is given. otherwise: said of an empty one."""
    if text is not None and token_ids is not None:
        raise ConfigError("give either a text or --token-ids FILE, not both")
    if text is not None:
        prompt = _input("-") if text == "-" else text
        if not prompt:
            raise ConfigError(f"the text is empty; give one, {otherwise}")
        return {"prompt": prompt}
    if token_ids is None:
        return {}
    try:
        found = json.loads(_input(token_ids))
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        found = found.get("tokens")  # what /tokenize answers
    if not isinstance(found, list) or not found or not all(type(each) is int for each in found):
        raise ConfigError(f"--token-ids {token_ids}: give a JSON list of token ids, or what /tokenize answers")
    return {"prompt_token_ids": found}


def _input(name: str) -> str:
    try:
        if name == "-":
            return sys.stdin.read(_MOST_INPUT_BYTES)
        with Path(name).expanduser().open(encoding="utf-8") as file:
            return file.read(_MOST_INPUT_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {plain(name)}: {error}; give a file of UTF-8, or - for stdin") from None


def _named(whose: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in whose.items() if value is not None}


def _span(first: int, count: int) -> str:
    return f"{first:,}-{first + count:,}"


def _blocks(count: int) -> str:
    return f"{count:,} block{'' if count == 1 else 's'}"


def _shown(server: Server, make: Callable[[], _T]) -> _T:
    """What is made of an answer. Raises ServerError where the answer has another shape."""
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _other_version(server) from None


def _other_version(server: Server) -> ServerError:
    return ServerError(f"{server.url} answers in the form of another version; take --json, or this program's version")


def _print(shown: Any) -> None:
    Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(shown)
