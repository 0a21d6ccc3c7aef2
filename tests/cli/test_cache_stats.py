"""`pagemill cache stats`: of a trace replayed here, and of a server: a real one that answers what it is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pagemill.base.errors import ConfigError
from pagemill.cache.entry import SharingConfig
from pagemill.cli.cache_remote_client import ServerError
from pagemill.cli.cache_stats import ROUTE, ask
from pagemill.cli.main import main
from pagemill.engine.cache_stats import cache_stats
from tests.fixtures.answering import Answer, serving
from tests.fixtures.fake_engine import Rig


def served_stats(tenant: str = "shop [bold]1[/bold]") -> dict[str, Any]:
    rig = Rig(64, 4, vocab_size=1000, sharing=SharingConfig())
    assert rig.cache.shared is not None
    rig.cache.shared.set_quota(tenant, 8, 16)
    for name in ("cold", "warm"):
        rig.add(name, list(range(17)), max_tokens=1)
        rig.run()
    return cache_stats(rig.engine)


def test_a_server_is_asked_with_the_key_and_its_answer_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str | None]] = []

    def answer(path: str, authorization: str | None) -> Answer:
        seen.append((path, authorization))
        return 200, json.dumps(served_stats()).encode(), {}

    monkeypatch.setenv("PAGEMILL_ADMIN_KEY", "sesame")
    with serving(answer) as url:
        assert main(["cache", "stats", "--url", url]) == 0
        printed = capsys.readouterr().out
        assert main(["cache", "stats", "--url", f"{url}{ROUTE}", "--key", "other", "--json"]) == 0
    assert seen == [(ROUTE, "Bearer sesame"), (ROUTE, "Bearer other")]
    assert "16 of 32 prompt tokens were found in it (50.0%)" in printed
    assert "expected" in printed
    assert "simulated" not in printed
    assert "shop [bold]1[/bold]" in printed
    assert json.loads(capsys.readouterr().out) == served_stats()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, b"", {}), "give the operator's key with --key or PAGEMILL_ADMIN_KEY"),
        ((404, b"", {}), "see that its admin API is on"),
        ((500, b"", {}), "answers 500"),
        ((200, b"<html>", {}), "answers no JSON"),
        ((200, b"[]", {}), "answers something else than an object"),
        ((200, b'{"ok": true}', {}), "something else than a cache's figures"),
        ((200, b'{"blocks": {}}', {}), "figures of another version"),
        ((302, b"", {"Location": "http://127.0.0.1:1/elsewhere"}), "answers 302"),
    ],
)
def test_a_server_that_answers_otherwise_is_told_about(
    capsys: pytest.CaptureFixture[str], answer: Answer, message: str
) -> None:
    with serving(lambda path, authorization: answer) as url:
        assert main(["cache", "stats", "--url", url, "--key", "k"]) == 2
    assert message in capsys.readouterr().err


def test_what_a_size_takes_has_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    found = served_stats()
    for each in found["curve"]["points"]:
        each["bytes"] = each["blocks"] * 1536 * 1024
    with serving(lambda path, authorization: (200, json.dumps(found).encode(), {})) as url:
        assert main(["cache", "stats", "--url", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["blocks", "tokens", "memory", "expected"] in [line.split() for line in lines]
    assert ["64", "256", "96", "MiB", "0.5000"] in [line.split() for line in lines]


def test_where_no_server_is_that_is_told() -> None:
    with serving(lambda path, authorization: (200, b"", {})) as url:
        pass
    with pytest.raises(ServerError, match="no server answers"):
        ask(url, None)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1:1", "http://", "file:///etc/passwd"])
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="admin port"):
        ask(url, None)


def test_a_load_is_replayed_and_the_simulator_stands_beside_the_curve(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagemill.cli.cache_stats._GENERATED_REQUESTS", 300)
    assert main(["cache", "stats", "chat", "--blocks", "2k", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trace"] == "chat"
    assert found["blocks"]["total"] == 2000
    points = found["curve"]["points"]
    assert not any("bytes" in each for each in points)
    assert max(abs(each["hit_ratio"] - each["simulated"]) for each in points) < 0.02
    assert points[-1]["hit_ratio"] > points[0]["hit_ratio"] > 0


def test_a_replay_is_shown_as_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    trace = tmp_path / "trace.jsonl"
    request = {"timestamp": 0, "input_length": 1024, "output_length": 9, "hash_ids": [1, 2]}
    trace.write_text("".join(json.dumps(request | {"timestamp": at}) + "\n" for at in range(4)))
    assert main(["cache", "stats", str(trace), "--blocks", "16"]) == 0
    printed = capsys.readouterr().out
    for text in ("trace.jsonl replayed over 16 blocks", "simulated", "0.7500", "prompt tokens were found"):
        assert text in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a trace to replay or --url"),
        (["chat", "--url", "http://127.0.0.1:1"], "give either"),
        (["chat", "--blocks", "0"], "--blocks is 0"),
        (["chat", "--blocks", "99999999999"], "--blocks is 99999999999"),
        (["no-such-trace"], "no-such-trace"),
    ],
)
def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["cache", "stats", *arguments]) == 2
    assert message in capsys.readouterr().err
