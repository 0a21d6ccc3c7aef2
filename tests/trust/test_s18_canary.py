"""S18: a canary prompt in logs, traces, metrics and crash text."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import numpy as np
import pytest
import tokenizers

from tests.fixtures.tiny import tiny_llama
from tests.trust import canary
from tests.trust.figures import Figure


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("tiny"), context=1536))


@pytest.mark.parametrize("setting", [("warning", "text"), ("info", "json")], ids="-".join)
def test_what_clients_write_is_told_nowhere(
    tiny: str, setting: tuple[str, str], publish: Callable[[Figure], None]
) -> None:
    publish(canary.count(tiny, [setting]))


@pytest.fixture(scope="module")
def leaky(tiny: str) -> list[str]:
    """What is found of a server that tells prompts, at level debug."""
    places, _ = canary.told(tiny, "debug", "text", canary.LEAKS)
    return canary.needles_of(tiny).found_in(places)


@pytest.mark.parametrize(
    "place",
    [
        f"{canary.ERRORS}, as text:",
        f"{canary.ERRORS}, as ids:",
        f"{canary.ERRORS}, as ids of <i4 in hexadecimal:",
        "spans, as text:",
        "spans, as ids in protobuf:",
        *(f"{page}, as {look}:" for page in ("/metrics", canary.PUBLIC_METRICS) for look in ("text", "ids")),
    ],
)
def test_a_server_that_tells_prompts_is_found_out(leaky: list[str], place: str) -> None:
    assert [each for each in leaky if each.startswith(place)], leaky


def test_at_level_debug_the_search_finds_the_words_of_errors(leaky: list[str]) -> None:
    assert [each for each in leaky if each.startswith(f"{canary.ERRORS}, as text") and "PlantedError" in each], leaky


LOOKS: dict[str, Callable[[list[int]], bytes]] = {
    "a list": lambda ids: str(ids).encode(),
    "JSON": lambda ids: json.dumps({"ids": ids}, separators=(",", ":")).encode(),
    "an array": lambda ids: str(np.array(ids)).encode(),
    "an array over several lines": lambda ids: np.array2string(np.array(ids), max_line_width=20).encode(),
    "scalars": lambda ids: ", ".join(f"np.int32({each})" for each in ids).encode(),
    "a column": lambda ids: "\n".join(map(str, ids)).encode(),
    "int32": lambda ids: np.array(ids, np.int32).tobytes(),
    "int64": lambda ids: np.array(ids, np.int64).tobytes(),
    "int32 in hexadecimal": lambda ids: np.array(ids, np.int32).tobytes().hex().encode(),
    "int64 in base64": lambda ids: base64.b64encode(np.array(ids, np.int64).tobytes()),
}


@pytest.mark.parametrize("before", ["", " ", "a", "a long ", "<|im_start|>user\n"])
@pytest.mark.parametrize("look", LOOKS)
def test_ids_are_found_however_they_are_told(tiny: str, look: str, before: str) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(f"{tiny}/tokenizer.json")
    ids = tokenizer.encode(f"{before}{canary.canary('prompt')} and more").ids
    needles = canary.needles_of(tiny)
    assert max(ids) > 255, "the tokeniser merges no letters, so that ids are bytes"
    assert needles.found_in({"log": LOOKS[look](ids)})
    assert not needles.found_in({"log": LOOKS[look]([each + 1 for each in ids])})


@pytest.mark.parametrize("begin", ["", "a", "ab"])
def test_every_encoding_is_found(tiny: str, begin: str) -> None:
    text = f"{begin}{canary.canary('prompt')} and more"
    shown = [
        text,
        text.upper(),
        text.encode().hex(),
        base64.b64encode(text.encode()).decode(),
        str(list(text.encode())),
    ]
    shown += [str(list(text)), text.encode().hex(" "), "".join(f"\\x{each:02x}" for each in text.encode())]
    needles = canary.needles_of(tiny)
    for each in shown:
        assert needles.found_in({"log": each.encode()}), each
    assert needles.found_in({"log": b"nothing of the kind"}) == []


LINES = {
    "text": b"2026-01-01T12:00:00.000Z info    request request_id=quaggaquartz-ok method=GET path=/quaggaquartz-path\n",
    "json": b'{"level": "info", "message": "request", "request_id": "quaggaquartz-ok", "path": "/quaggaquartz-path"}\n',
}


@pytest.mark.parametrize("line", LINES)
def test_a_path_is_no_finding_in_a_request_s_line_at_level_info_only(tiny: str, line: str) -> None:
    needles, text = canary.needles_of(tiny), LINES[line]
    found = [
        bool(needles.found_in(canary.searched(level, {canary.ERRORS: each})))
        for level, each in (
            ("info", text),
            ("warning", text),
            ("info", text.replace(b"method=GET", b"method=quaggaquartz").replace(b'"info"', b'"quaggaquartz"')),
            ("info", text.replace(b"request", b"answer", 1)),
        )
    ]
    assert found == [False, True, True, True]
