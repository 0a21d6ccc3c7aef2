"""What an operator changes over the admin port: only what was named goes, and what did not work is no success."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagemill.base.clock import VirtualClock
from pagemill.server.access import KeyRing
from pagemill.server.access_keys import KeyEntry, make_key, write_keys
from tests.server.test_admin import TEXT, Office


@pytest.mark.parametrize(
    "body", [b"{}", b'{"tenant": "default"}', b'{"what": "prefix", "prompt": ""}', b'{"prompt_token_ids": []}']
)
def test_a_purge_of_everything_must_be_named(body: bytes) -> None:
    office = Office()
    office.fill()
    before = office.num_cached
    answer = office.ask("POST", "/admin/cache/purge", content=body)
    assert answer.status_code == 400
    assert '"what": "namespace"' in answer.json()["error"]["message"]
    assert office.num_cached == before > 0


def test_a_purge_tells_the_pins_that_it_ended() -> None:
    office = Office()
    office.fill("a")
    told = office.post("/admin/cache/pin", tenant="a", prompt_token_ids=TEXT, seconds=60)
    found = office.post("/admin/cache/purge", tenant="a", what="namespace")
    assert found["pins"] == 1
    assert found["blocks"] >= told["blocks"]
    assert office.ask("DELETE", f"/admin/cache/pin/{told['pin']}").json()["ended"] is False
    assert office.post("/admin/cache/purge", tenant="a", what="namespace") == {"blocks": 0, "pins": 0}


def test_what_is_left_out_of_a_quota_stays() -> None:
    office = Office()
    office.ask("PUT", "/admin/tenants/a", floor_tokens=12, cap_tokens=100)
    assert office.ask("PUT", "/admin/tenants/a", cap_tokens=80).json() == {"tenant": "a", "floor": 3, "cap": 20}
    assert office.ask("PUT", "/admin/tenants/a", floor_tokens=8).json() == {"tenant": "a", "floor": 2, "cap": 20}
    nothing = office.ask("PUT", "/admin/tenants/a", content=b"{}")
    assert nothing.status_code == 400
    assert "give floor_tokens" in nothing.json()["error"]["message"]
    [told] = [each for each in office.get("/admin/tenants")["tenants"] if each["tenant"] == "a"]
    assert (told["floor"], told["cap"]) == (2, 20)
    assert office.ask("PUT", "/admin/tenants/a", cap_tokens=None).json() == {"tenant": "a", "floor": 2, "cap": None}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"what": }', "line 1, column 10"),
        (b"", "send a JSON object"),
        (b"\xff", "send a JSON object"),
        (b"[" + b"1" * 5000 + b"]", "send a JSON object"),
    ],
)
def test_a_body_that_is_no_json_is_told_where(body: bytes, said: str) -> None:
    answer = Office().ask("POST", "/admin/cache/purge", content=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", [None, "[keys.alice]\nnonsense = 1\n", "no TOML ="])
def test_a_file_of_keys_that_is_broken_is_no_success(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys.toml"
    write_keys(path, (KeyEntry("alice", *make_key()[1:], tenant="alice"),))
    office = Office(public=KeyRing(path, (), VirtualClock()))
    assert office.post("/admin/keys/reload") == {"changed": False, "keys": 1}
    path.unlink()
    if text is not None:
        path.write_text(text)
    for _ in range(2):
        answer = office.ask("POST", "/admin/keys/reload")
        assert answer.status_code == 409
        assert "the keys stay as they were" in answer.json()["error"]["message"]
        assert "keys.toml" in answer.json()["error"]["message"]
    assert len(office.get("/admin/keys")["keys"]) == 1
