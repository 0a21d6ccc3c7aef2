"""`pagemill keys`, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagemill.cli.main import main
from pagemill.server.access_keys import hash_key, read_keys
from tests.fixtures.program import run_on_terminal


def run(path: Path, *arguments: str) -> int:
    return main(["keys", *arguments, "--file", str(path)])


def test_a_key_is_told_once_and_only_its_hash_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    assert run(path, "add", "alice", "--tokens-per-minute", "20k", "--max-streams", "4") == 0
    key = capsys.readouterr().out.strip()
    [entry] = read_keys(path)
    assert entry.sha256 == hash_key(key)
    assert (entry.tenant, entry.tokens_per_minute, entry.max_streams) == ("alice", 20_000, 4)
    assert key not in path.read_text()
    assert run(path, "ls") == 0
    shown = capsys.readouterr().out
    assert "20,000" in shown
    assert key not in shown
    assert entry.sha256 not in shown


def test_keys_are_made_listed_and_removed_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    run(path, "add", "root", "--role", "admin", "--json")
    made = json.loads(capsys.readouterr().out)
    assert made["key"].startswith("pm-")
    assert "sha256" not in made
    run(path, "ls", "--json")
    [listed] = json.loads(capsys.readouterr().out)["keys"]
    assert (listed["role"], listed["tenant"]) == ("admin", None)
    assert run(path, "rm", "root", "--json") == 0
    assert json.loads(capsys.readouterr().out)["keys"] == 0
    assert read_keys(path) == ()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["add", "alice"], "has a key 'alice'"),
        (["add", "a b"], "letters, digits"),
        (["add", "bob", "--role", "king"], "choose one of user"),
        (["add", "bob", "--role", "admin", "--tenant", "t"], "leave tenant out"),
        (["add", "bob", "--priority", "1000"], "-100 to 100"),
        (["add", "bob", "--max-streams", "0"], "whole number from 1"),
        (["add", "bob", "--max-streams", "few"], "is not an amount"),
        (["rm", "bob"], "has no key 'bob'; it has alice"),
    ],
)
def test_what_is_wrong_is_refused_and_changes_nothing(
    arguments: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    run(path, "add", "alice")
    before = path.read_bytes()
    assert run(path, *arguments) == 2
    assert what in capsys.readouterr().err
    assert path.read_bytes() == before


def test_the_file_is_found_by_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PAGEMILL_KEYS", str(tmp_path / "own.toml"))
    assert main(["keys", "add", "alice"]) == 0
    assert [each.name for each in read_keys(tmp_path / "own.toml")] == ["alice"]
    capsys.readouterr()


def test_an_empty_name_of_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments in (["add", "alice"], ["ls"], ["rm", "alice"]):
        for file in ("", " "):
            assert main(["keys", *arguments, "--file", file]) == 2
            assert "--file is empty; name a file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_to_type_next_names_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my keys.toml"
    run(path, "add", "alice")
    capsys.readouterr()
    assert run(path, "add", "alice") == 2
    assert f"with `pagemill keys rm alice --file '{path}'`" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_told_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "typo.toml"
    for arguments in (["ls"], ["ls", "--json"], ["rm", "alice"]):
        assert run(path, *arguments) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert f"there is no file {path}; give another --file" in told.err
    assert not path.exists()
    monkeypatch.setenv("PAGEMILL_KEYS", str(path))
    assert main(["keys", "ls"]) == 0, "before the first key there is no file of one's own"
    told = capsys.readouterr()
    assert told.out == ""
    assert f"there are no keys yet, nor a file {path}; `pagemill keys add NAME` makes one" in told.err
    run(path, "add", "alice")
    run(path, "rm", "alice")
    capsys.readouterr()
    assert main(["keys", "ls"]) == 0
    assert f"{path} has no keys" in capsys.readouterr().err


def test_ids_and_headings_are_whole_at_80_columns_and_in_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    name = "alice-and-her-laptop@example.org"
    run(path, "add", name, "--requests-per-minute", "600", "--tokens-per-minute", "200k", "--max-streams", "16")
    [entry] = read_keys(path)
    headings = {"name", "role", "tenant", "priority", "requests", "tokens", "/min", "streams", "id"}
    code, printed = run_on_terminal("keys", "ls", "--file", str(path), TERM="dumb")
    assert code == 0, printed
    assert entry.id in printed
    assert "200,000" in printed
    assert headings <= set(printed.split())
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    capsys.readouterr()
    run(path, "ls")
    assert [name, "user", name, "0", "600", "200,000", "16", entry.id] in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]
