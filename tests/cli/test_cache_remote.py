"""`pagemill cache ls|tree|purge|pin|unpin` against a real server, and against servers that answer otherwise."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagemill.base.errors import ConfigError
from pagemill.cli.cache_remote_client import Server, ServerError
from pagemill.cli.main import main
from tests.fixtures.answering import Answer, serving
from tests.fixtures.program import run_on_terminal
from tests.fixtures.serve_process import ServeProcess

HEAD = "The miller grinds the corn that the "
TEXTS = (HEAD + "farmer brought before the rain came", HEAD + "carter left at the gate last evening")
BLOCK_TOKENS = 16


@pytest.fixture(scope="module")
def server(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """With an admin port whose key is told in the ready line."""
    options = ("--admin-port", "0", "--kv-cache-memory-bytes", "4MiB", "--packed-weights-cache", "off")
    with ServeProcess(tmp_path_factory.mktemp("serve"), tiny_model, *options) as started:
        yield started


@pytest.fixture(autouse=True)
def admin(server: ServeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that the commands find the server by; nothing is cached in it but the two texts."""
    monkeypatch.setenv("PAGEMILL_ADMIN_URL", server.admin_url)
    monkeypatch.setenv("PAGEMILL_ADMIN_KEY", server.admin_key)
    with server.admin() as client:
        client.post("/admin/cache/purge", json={"what": "tenant"}).raise_for_status()
    with server.client() as client:
        for text in TEXTS:
            body = {"prompt": text, "max_tokens": 1, "temperature": 0}
            client.post("/v1/completions", json=body).raise_for_status()


def answer_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(["cache", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def num_blocks(capsys: pytest.CaptureFixture[str]) -> int:
    return len(answer_of(capsys, "ls", "--limit", "1k")["blocks"])


def test_blocks_are_listed_with_their_place_in_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = answer_of(capsys, "ls")["blocks"]
    assert len(blocks) == 8, "two blocks in which the texts agree, three of each alone"
    assert sum(each["first_token"] == 0 for each in blocks) == 1
    assert main(["cache", "ls"]) == 0
    printed = capsys.readouterr().out
    for each in blocks:
        assert each["key"][:8] in printed
    assert "0-16" in printed
    assert "default" in printed


def test_a_listing_is_the_same_in_pages_and_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answer_of(capsys, "ls")
    monkeypatch.setattr("pagemill.cli.cache_remote._PAGE", 3)
    assert answer_of(capsys, "ls") == whole
    cut = answer_of(capsys, "ls", "--limit", "4")
    assert cut["blocks"] == whole["blocks"][:4]
    assert cut["next_after"] == whole["blocks"][3]["block"]
    assert main(["cache", "ls", "--limit", "4"]) == 0
    assert "the first 4 blocks; there are more" in capsys.readouterr().err


def test_the_tree_shows_where_texts_part(capsys: pytest.CaptureFixture[str]) -> None:
    [root] = answer_of(capsys, "tree")["roots"]
    [stem] = root["children"]
    assert (stem["tokens"], len(stem["children"])) == (2 * BLOCK_TOKENS, 2)
    assert main(["cache", "tree"]) == 0
    printed = capsys.readouterr().out
    assert "tenant default" in printed
    assert "tokens 0-32, 2 blocks" in printed
    assert printed.count("tokens 32-") == 2
    assert main(["cache", "tree", "--depth", "1"]) == 0
    assert "2 branches not shown" in capsys.readouterr().out
    assert main(["cache", "tree", "--limit", "2"]) == 0
    assert "there is more" in capsys.readouterr().err


def test_neither_listing_tells_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("ls", "tree"):
        assert "miller" not in json.dumps(answer_of(capsys, command))


def test_a_tenant_without_texts_has_nothing_to_show(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("ls", "tree"):
        assert main(["cache", command, "--tenant", "nobody"]) == 0
        assert capsys.readouterr().out == "nothing of tenant nobody is cached\n"


def test_a_pin_keeps_a_text_until_it_is_ended(capsys: pytest.CaptureFixture[str], server: ServeProcess) -> None:
    def pinned() -> int:
        with server.admin() as client:
            return int(client.get("/admin/cache/stats").json()["blocks"]["pinned"])

    made = answer_of(capsys, "pin", HEAD, "--for", "1h")
    assert made["tokens"] == len(HEAD.encode()), "to the middle of a block that other texts go on in"
    assert pinned() == made["blocks"] == 3
    assert main(["cache", "unpin", str(made["pin"])]) == 0
    assert capsys.readouterr().out == f"pin {made['pin']} has ended\n"
    assert pinned() == 0
    for options in ([], ["--json"]):
        assert main(["cache", "unpin", str(made["pin"]), *options]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert f"there is no pin {made['pin']}, or it had ended" in told.err


def test_a_text_that_is_not_cached_cannot_be_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    for asked in (["Nobody has asked for this text"], [HEAD, "--salt", "another"]):
        assert main(["cache", "pin", *asked]) == 2
        told = capsys.readouterr()
        assert "nothing of this text is in the cache" in told.err
        assert "take --token-ids with what /tokenize answers" in told.err
        assert told.out == ""


def test_tokens_are_named_as_tokenize_answers_them(
    capsys: pytest.CaptureFixture[str], server: ServeProcess, tmp_path: Path
) -> None:
    told = tmp_path / "tokens.json"
    with server.client() as client:
        told.write_text(client.post("/tokenize", json={"prompt": TEXTS[0]}).text)
    by_ids = answer_of(capsys, "pin", "--token-ids", str(told))
    by_text = answer_of(capsys, "pin", TEXTS[0])
    assert by_ids["tokens"] == by_text["tokens"] > 2 * BLOCK_TOKENS
    for each in (by_ids, by_text):
        assert main(["cache", "unpin", str(each["pin"])]) == 0


def test_a_purge_that_nobody_can_confirm_changes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/null").open() as empty:
        monkeypatch.setattr("sys.stdin", empty)
        assert main(["cache", "purge", HEAD]) == 2
    assert "say --yes" in capsys.readouterr().err
    assert num_blocks(capsys) == 8


@pytest.mark.parametrize(("typed", "code", "left"), [(b"n\n", 130, 8), (b"\n", 130, 8), (b"y\n", 0, 0)])
def test_a_purge_asks_before(capsys: pytest.CaptureFixture[str], typed: bytes, code: int, left: int) -> None:
    found, printed = run_on_terminal("cache", "purge", "--what", "tenant", typed=typed)
    assert found == code, printed
    assert "All texts of tenant default, whatever their salt, leave the cache" in printed
    assert "holds 8 blocks, 0 of them in use" in printed
    assert ("8 blocks dropped and wiped" in printed) == (left == 0)
    assert num_blocks(capsys) == left


def test_a_purge_tells_the_pins_that_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    made = answer_of(capsys, "pin", TEXTS[0])
    assert main(["cache", "purge", HEAD, "--yes"]) == 0
    told = capsys.readouterr()
    assert told.out == "6 blocks dropped and wiped\n"
    assert told.err == "1 pin of it ended too\n"
    assert main(["cache", "unpin", str(made["pin"])]) == 2


def test_a_purge_drops_what_it_names_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer_of(capsys, "purge", TEXTS[0], "--what", "text", "--yes") == {
        "blocks": 3,
        "pins": 0,
        "what": "text",
        "tenant": "default",
    }
    assert num_blocks(capsys) == 5
    assert main(["cache", "purge", "--what", "namespace", "--salt", "another", "--yes"]) == 0
    assert capsys.readouterr().out == "nothing of it was cached\n"
    assert num_blocks(capsys) == 5
    assert main(["cache", "purge", HEAD, "--yes"]) == 0
    assert capsys.readouterr().out == "3 blocks dropped and wiped\n"
    assert num_blocks(capsys) == 2, "blocks that hold only the beginning of what was named stay"
    assert main(["cache", "purge", HEAD[:20], "--yes"]) == 0
    assert num_blocks(capsys) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["purge", "--yes"], "purge what?"),
        (["purge", "x", "--what", "tenant", "--yes"], "leave the text out"),
        (["purge", "--what", "prefix", "--yes"], "give a text"),
        (["purge", "--what", "all", "--yes"], "give text, prefix, namespace or tenant"),
        (["purge", "", "--yes"], "the text is empty; give one, or choose all with --what namespace"),
        (["purge", "x", "--token-ids", "y", "--yes"], "not both"),
        (["pin"], "pin what?"),
        (["pin", ""], "the text is empty; give one, whose blocks are to be kept"),
        (
            ["pin", "x", "--public", "foo"],
            "refuses (403): there is no public namespace 'foo'; the operator declares them\n",
        ),
        (["pin", "x", "--for", "0"], "give a time above 0"),
        (["pin", "x", "--for", "soon"], "'soon' is not a time"),
        (["pin", "x", "--for", "1000h"], "up to 2,592,000"),
        (["pin", "--token-ids", "/nowhere.json"], "cannot read /nowhere.json"),
        (["unpin", "--", "-1"], "give the number"),
        (["ls", "--limit", "0"], "--limit is 0"),
        (["ls", "--limit", "many"], "'many'"),
        (["tree", "--depth", "99"], "give 1 to 64"),
        (["ls", "--key", "wrong"], "give the operator's key with --key or PAGEMILL_ADMIN_KEY"),
        (["ls", "--key", "two words"], "letters that no key has"),
    ],
)
def test_wrong_questions_are_refused_and_change_nothing(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["cache", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert num_blocks(capsys) == 8


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1.5]", '{"tokens": "x"}', "[" * 100_000, "nonsense"])
def test_token_ids_that_are_none_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    (tmp_path / "ids").write_text(text)
    assert main(["cache", "pin", "--token-ids", str(tmp_path / "ids")]) == 2
    assert "give a JSON list of token ids" in capsys.readouterr().err


def test_the_public_port_is_told_apart_from_the_admin_port(
    capsys: pytest.CaptureFixture[str], server: ServeProcess
) -> None:
    assert main(["cache", "ls", "--url", server.url]) == 2
    assert "is not there; give the server's admin port" in capsys.readouterr().err


def test_without_an_address_one_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PAGEMILL_ADMIN_URL")
    assert main(["cache", "ls"]) == 2
    assert "whose cache? give --url" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, b"<html>", {}), "answers no JSON"),
        ((200, b"[" * 100_000, {}), "answers no JSON"),
        ((200, b"[]", {}), "something else than an object"),
        ((200, b"{}", {}), "the form of another version"),
        ((200, b'{"blocks": [{}], "next_after": null}', {}), "the form of another version"),
        ((200, b'{"blocks": [], "next_after": -1}', {}), "the form of another version"),
        ((302, b"", {"Location": "http://127.0.0.1:1/elsewhere"}), "answers 302"),
        ((404, b"", {}), "its version not older"),
        ((403, b'{"error": {"message": "not \\u001b[2J you"}}', {}), "(403: not \N{REPLACEMENT CHARACTER}[2J you)"),
        ((503, b'{"error": {"message": "the model is loading"}}', {}), "the model is loading"),
        ((500, b'{"error": 3}', {}), "answers 500"),
    ],
)
def test_a_server_that_answers_otherwise_is_told_about(
    capsys: pytest.CaptureFixture[str], answer: Answer, message: str
) -> None:
    with serving(lambda path, authorization: answer) as url:
        assert main(["cache", "ls", "--url", url]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "\x1b" not in told


@pytest.mark.parametrize(
    ("answer", "printed", "told"),
    [
        ({"blocks": 3}, "3 blocks dropped and wiped\n", ""),
        ({"blocks": 3, "pins": 0}, "3 blocks dropped and wiped\n", ""),
        ({"blocks": 3, "pins": 1}, "3 blocks dropped and wiped\n", "1 pin of it ended too\n"),
        ({"blocks": 3, "pins": 2}, "3 blocks dropped and wiped\n", "2 pins of it ended too\n"),
    ],
)
def test_a_purge_tells_the_pins_that_it_ended_where_the_server_does(
    capsys: pytest.CaptureFixture[str], answer: dict[str, int], printed: str, told: str
) -> None:
    with serving(lambda path, authorization: (200, json.dumps(answer).encode(), {})) as url:
        assert main(["cache", "purge", "x", "--yes", "--url", url]) == 0
    assert tuple(capsys.readouterr()) == (printed, told)


def test_what_a_server_tells_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    root = {"tenant": "a\x1b[2J[bold]b", "salted": True, "children": []}
    body = json.dumps({"roots": [root], "truncated": False}).encode()
    with serving(lambda path, authorization: (200, body, {})) as url:
        assert main(["cache", "tree", "--url", url]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "[bold]b, with a salt" in printed


def test_a_program_that_speaks_no_http_is_told_about() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(ServerError, match="does not speak HTTP"):
            Server(f"http://127.0.0.1:{listener.getsockname()[1]}", None).ask("GET", "/admin/tenants")
        thread.join()
        silent = listener.getsockname()[1]
    with pytest.raises(ServerError, match="no server answers"):
        Server(f"http://127.0.0.1:{silent}", None).ask("GET", "/admin/tenants")


@pytest.mark.parametrize(
    "url", ["", "ftp://h", "http://", "http://[::1", "http://h:99999", "http://a:b@h", "http://h/?q"]
)
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="give the address of a server's admin port"):
        Server(url, None)


def test_a_key_does_not_follow_a_redirect() -> None:
    seen: list[str | None] = []

    def elsewhere(path: str, authorization: str | None) -> Answer:
        seen.append(authorization)
        return 200, b"{}", {}

    with (
        serving(elsewhere) as other,
        serving(lambda path, key: (307, b"", {"Location": f"{other}/"})) as url,
        pytest.raises(ServerError, match="answers 307"),
    ):
        Server(url, "sesame").ask("GET", "/admin/tenants")
    assert seen == []
