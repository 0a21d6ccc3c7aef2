"""/v1/completions over a socket, with a real engine."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from pagemill import SamplingParams
from pagemill.engine.cache_stats import cache_stats
from tests.fixtures.live_server import LiveServer

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


def ask(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json={"model": "tiny", **GREEDY, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def events(http: httpx.Client, path: str = "/v1/completions", **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    lines = http.post(path, json={"model": "tiny", "stream": True, **GREEDY, **fields}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_an_answer_has_openai_s_shape_and_true_counts(http: httpx.Client) -> None:
    answer = ask(http, prompt="Hello there")
    [choice] = answer["choices"]
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8


def test_a_stream_says_the_same_as_the_whole_answer(http: httpx.Client) -> None:
    chunks = events(http, prompt="Hello there")
    assert text_of(chunks) == ask(http, prompt="Hello there")["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert all("usage" not in chunk for chunk in chunks)


def test_the_engine_s_own_answer_is_what_is_served(http: httpx.Client, live: LiveServer) -> None:
    async def generate() -> str:
        last = ""
        async for output in live.llm.generate("Hello there", SamplingParams(**GREEDY)):
            last = output.outputs[0].text
        return last

    assert ask(http, prompt="Hello there")["choices"][0]["text"] == live.on_loop(generate())


def test_usage_comes_with_the_last_chunk_where_asked(http: httpx.Client) -> None:
    chunks = events(http, prompt="Hello", stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_usage_comes_with_each_chunk_where_asked(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(http, prompt="Hello", stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_choices_of_one_request_are_looked_up_once_in_the_figures(tiny_model: Path) -> None:
    with LiveServer(str(tiny_model), max_num_seqs=8) as server, server.client() as http:
        usage = ask(http, prompt=[65] * 310, n=4, temperature=1, seed=1)["usage"]
        told = server.call(cache_stats)
        tokens, curve = told["tokens"], told["curve"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == tokens["hit"] == 0
        assert tokens["asked"] == 309, "all but the last, which is always computed"
        assert (tokens["asked_again"], tokens["hit_again"]) == (927, 927)
        assert curve["recorded_blocks"] == 309 // told["block_tokens"]
        assert {point["hit_ratio"] for point in curve["points"]} == {0.0}
        again = ask(http, prompt=[65] * 310, n=4, temperature=1, seed=1)["usage"]
        assert again["prompt_tokens_details"]["cached_tokens"] == server.call(cache_stats)["tokens"]["hit"] == 309


def test_usage_says_nothing_of_the_cache_before_it_is_known(http: httpx.Client) -> None:
    prompts = [f"Told only when it is known, and not before: text {number}" for number in range(2)]
    for prompt in prompts:
        ask(http, prompt=prompt)
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(http, prompt=prompts, n=2, temperature=1, seed=1, stream_options=options)
    num_first_open, told = 2, set()  # the first choice of each prompt tells what was found
    for chunk in chunks:
        num_first_open -= sum(each["finish_reason"] is not None for each in chunk["choices"] if each["index"] in (0, 2))
        details = chunk["usage"].get("prompt_tokens_details")
        assert (details is None) == (num_first_open > 0), chunk
        told |= set() if details is None else {details["cached_tokens"]}
    assert chunks[0]["usage"]["completion_tokens"] > 0
    assert told == {chunks[-1]["usage"]["prompt_tokens"] - 2}, "all but the last token of each"


def test_the_same_prompt_again_is_told_as_cached_with_a_receipt(http: httpx.Client) -> None:
    prompt = "A prompt of its own, long enough for some blocks of sixteen tokens each. " * 2
    first, second = ask(http, prompt=prompt), ask(http, prompt=prompt)
    details = second["usage"]["prompt_tokens_details"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] <= 2
    assert first["usage"]["prompt_tokens_details"]["cache"]["miss"]["reason"]
    assert details["cached_tokens"] >= len(prompt) - 32
    assert details["cached_tokens"] + details["cache_write_tokens"] == second["usage"]["prompt_tokens"]
    assert details["cache"]["tiers"]["hot"] == details["cached_tokens"]


def test_a_miss_is_told_with_its_kind(http: httpx.Client) -> None:
    usage = ask(http, prompt="Asked by nobody else", cache_salt="its own")["usage"]
    miss = usage["prompt_tokens_details"]["cache"]["miss"]
    assert miss == {"kind": "not seen", "reason": "not seen recently", "token": 0}


def test_log_probabilities_of_a_prompt_are_bounded_in_all(live: LiveServer, http: httpx.Client) -> None:
    body = {"prompt": [65] * 1000, "echo": True, "max_tokens": 1, "logprobs": 20, "n": 100}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "2,100,000 log-probabilities" in answer.json()["error"]["message"]
    assert live.call(lambda engine: engine.stats().num_running) == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "Hello", "return_token_strs": True}),
        ("/v1/completions", {"prompt": "Hello", "echo": True, "logprobs": 2, "max_tokens": 1}),
        ("/v1/completions", {"prompt": "Hello", "echo": True, "logprobs": 2, "max_tokens": 1, "stream": True}),
    ],
)
def test_what_takes_long_to_write_does_not_hold_up_the_loop(
    live: LiveServer, http: httpx.Client, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    token, threads = live.llm.token, set()

    def watched(token_id: int) -> tuple[str, bytes]:
        threads.add(threading.get_ident())
        return token(token_id)

    monkeypatch.setattr(live.llm, "token", watched)
    assert http.post(path, json=body).status_code == 200

    async def loop_thread() -> int:
        return threading.get_ident()

    assert threads
    assert live.on_loop(loop_thread()) not in threads


def test_the_header_says_hit_partial_or_miss(http: httpx.Client) -> None:
    body = {"prompt": "~header " * 20, "max_tokens": 2, "temperature": 0}
    words = [http.post("/v1/completions", json=body).headers["x-cache"].split(";")[0] for _ in range(2)]
    assert words == ["miss", "hit"]


def test_a_salt_keeps_texts_apart(http: httpx.Client) -> None:
    prompt = "Salted text that is long enough for a block or two of sixteen tokens."
    ask(http, prompt=prompt, cache_salt="mine")
    assert ask(http, prompt=prompt, cache_salt="yours")["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert ask(http, prompt=prompt, cache_salt="mine")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_bypass_leaves_nothing_and_purge_on_end_drops_the_text(http: httpx.Client) -> None:
    for mark, cache in (("<", {"bypass": True}), (">", {"purge_on_end": True})):
        prompt = f"{mark} forget this once it is answered, all of it and more than a block."
        ask(http, prompt=prompt, cache=cache)
        details = ask(http, prompt=prompt)["usage"]["prompt_tokens_details"]
        assert details["cached_tokens"] == 0


def test_retained_ranges_outside_the_prompt_are_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x", "cache": {"retain": [{"from": 0, "to": 99}]}})
    assert answer.status_code == 400
    assert "retained range" in answer.json()["error"]["message"]


@pytest.mark.parametrize("options", [{"mode": "explicit", "ttl": "30m"}, {"ttl": 60}, {"mode": "implicit"}])
def test_openai_s_cache_options_are_taken(http: httpx.Client, options: dict[str, Any]) -> None:
    ask(http, prompt="Options", prompt_cache_options=options, prompt_cache_key="k", prompt_cache_retention="24h")


def test_a_ttl_that_is_no_time_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x", "prompt_cache_options": {"ttl": "soon"}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt_cache_options.ttl"


def test_prompts_of_all_kinds_ask_the_same(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "Hello"}).json()["tokens"]
    text = ask(http, prompt="Hello")["choices"][0]["text"]
    assert ask(http, prompt=ids)["choices"][0]["text"] == text
    both = ask(http, prompt=[ids, ids])
    assert [(each["index"], each["text"]) for each in both["choices"]] == [(0, text), (1, text)]
    assert ask(http, prompt=["Hello", "Hello"])["usage"]["prompt_tokens"] == 2 * len(ids)


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(http: httpx.Client) -> None:
    fields = {"prompt": ["one", "two"], "n": 2, "temperature": 1, "seed": 3}
    whole = ask(http, **fields)
    assert [each["index"] for each in whole["choices"]] == [0, 1, 2, 3]
    chunks = events(http, **fields)
    streamed = ["", "", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == [each["text"] for each in whole["choices"]]


def test_a_seed_repeats_and_negative_seeds_are_taken(http: httpx.Client) -> None:
    fields = {"prompt": "Draw", "temperature": 1.0}
    assert ask(http, **fields, seed=-5)["choices"] == ask(http, **fields, seed=-5)["choices"]
    assert ask(http, **fields, seed=1)["choices"] != ask(http, **fields, seed=2)["choices"]


def test_stop_strings_end_the_text(http: httpx.Client) -> None:
    text = ask(http, prompt="Hello there", max_tokens=24)["choices"][0]["text"]
    stop = text[5:8]
    [choice] = ask(http, prompt="Hello there", max_tokens=24, stop=stop)["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_echo_with_logprobs_scores_the_prompt(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "Score this"}).json()["tokens"]
    [choice] = ask(http, prompt=[ids], echo=True, logprobs=1, max_tokens=1)["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith("Score this")
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(ids) + 1
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert value <= max(top.values())
    assert logprobs["text_offset"][:3] == [0, 1, 2]


def test_echoed_scores_are_those_that_generation_reports(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "Score this"}).json()["tokens"]
    made = ask(http, prompt=ids, logprobs=1, return_token_ids=True)["choices"][0]
    echoed = ask(http, prompt=ids + made["token_ids"], echo=True, logprobs=1, max_tokens=0)["choices"][0]
    scores = echoed["logprobs"]["token_logprobs"][len(ids) :]
    assert scores == pytest.approx(made["logprobs"]["token_logprobs"], abs=1e-5)
    assert len(echoed["logprobs"]["tokens"]) == len(ids) + 8  # max_tokens 0: nothing is added


def test_echo_streams_the_prompt_first(http: httpx.Client) -> None:
    chunks = events(http, prompt="Echo", echo=True)
    assert text_of(chunks) == ask(http, prompt="Echo", echo=True)["choices"][0]["text"]
    assert text_of(chunks).startswith("Echo")


def test_a_bias_forces_and_forbids_tokens(http: httpx.Client) -> None:
    [choice] = ask(http, prompt="x", logit_bias={"65": 100}, return_token_ids=True)["choices"]
    assert choice["token_ids"] == [65] * 8
    plain = ask(http, prompt="x", return_token_ids=True)["choices"][0]["token_ids"]
    [other] = ask(http, prompt="x", logit_bias={str(plain[0]): -100}, return_token_ids=True)["choices"]
    assert other["token_ids"][0] != plain[0]


def test_a_regular_expression_holds_the_answer(http: httpx.Client) -> None:
    fields = {"response_format": {"type": "regex", "regex": "[0-9]{3}-[a-c]x"}, "ignore_eos": False}
    [choice] = ask(http, prompt="x", temperature=1, seed=1, **fields)["choices"]
    assert choice["finish_reason"] == "stop"
    assert len(choice["text"]) == 6
    assert choice["text"][3] == "-"


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": []}, 400, "empty"),
        ({"prompt": [[]]}, 400, "empty"),
        ({"prompt": ["x"] * 600, "n": 2, "temperature": 1}, 400, "in all"),
        ({"prompt": [1, 2, 99_999]}, 400, "token 2"),
        ({"prompt": [-1]}, 400, "token 0"),
        ({"prompt": "x" * 1600}, 400, "max_model_len"),
        ({"prompt": "x", "model": "other"}, 404, "does not exist"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature"),
        ({"prompt": "x", "temperature": "hot"}, 400, "temperature"),
        ({"prompt": "x", "n": 0}, 400, "n is 0"),
        ({"prompt": "x", "n": 1000, "temperature": 1}, 400, "n is 1000"),
        ({"prompt": "x", "logprobs": 21}, 400, "logprobs"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "x", "best_of": 3}, 400, "best_of"),
        ({"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"1": 101}}, 400, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"99999999": 1}}, 400, "logit_bias names token 99999999; give ids from 0 to "),
        ({"prompt": "x", "presence_penalty": 3}, 400, "presence_penalty"),
        ({"prompt": "x", "stop": [""]}, 400, "stop"),
        ({"prompt": "x", "response_format": {"type": "regex", "regex": "("}}, 400, "regex"),
        (
            {"prompt": "x", "response_format": {"type": "grammar", "grammar": "nonsense"}},
            400,
            "the grammar cannot be used",
        ),
        ({"prompt": "x", "response_format": {"type": "json_schema"}}, 400, "json_schema"),
        ({"prompt": "x", "guided_regex": "a", "guided_json": {}}, 400, "several forms"),
        ({"prompt": "x", "cache": {"unknown": 1}}, 400, "cache"),
        ({}, 400, "prompt"),
    ],
)
def test_wrong_fields_are_told_in_openai_s_shape(
    http: httpx.Client, fields: dict[str, Any], status: int, said: str
) -> None:
    answer = http.post("/v1/completions", json=fields)
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert said in error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"temperature": -3}, "temperature", "temperature is -3"),
        ({"top_p": 2}, "top_p", "top_p is 2"),
        ({"n": 0}, "n", "n is 0"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; give at least 1, or leave it out for no limit"),
        ({"logprobs": 21}, "logprobs", "give a number from 0 to 20, or leave it out"),
        ({"logit_bias": {"1": 1, "99999999": 1}}, "logit_bias", "logit_bias names token 99999999"),
        ({"cache_salt": "x" * 1025}, "cache_salt", "cache_salt: give a text of at most 1,024 characters"),
        ({"cache": {"unknown": 1}}, "cache", "cache.unknown: unknown field; there is retain, bypass, purge_on_end"),
        (
            {"cache": {"retain": [{"until": 1}]}},
            "cache",
            "cache.retain.0.until: unknown field; there is from, to, priority, ttl",
        ),
        (
            {"prompt_cache_options": {"mod": "explicit"}},
            "prompt_cache_options",
            "prompt_cache_options.mod: unknown field; there is mode, ttl",
        ),
        ({"logit_bias": {"1": 101}}, "logit_bias", "logit_bias of token 1"),
        ({"min_tokens": 9, "max_tokens": 2}, "min_tokens", "min_tokens (9) is above"),
        ({"deadline_s": -1}, "deadline_s", "deadline_s is -1"),
        ({"prompt": ["a", [1]]}, "prompt", "prompt: give a text, token ids, or a list of either"),
        ({"prompt": 5, "best_of": "x"}, "prompt", "give a text, token ids, or a list of either (and 1 more)"),
        ({"stop": 7}, "stop", "stop: give a text or a list of texts"),
        ({"cache": {"retain": [{"ttl": {}}]}}, "cache", "cache.retain.0.ttl: give seconds, or a time such as 30m"),
        ({"logit_bias": {"1": "x"}}, "logit_bias", "logit_bias.1: give a number"),
        ({"temperature": "hot"}, "temperature", "temperature: give a number"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": ["x", ""]}, "prompt", "prompt.1 is empty; give"),
        ({"prompt": [[65], []]}, "prompt", "prompt.1 is empty; give"),
        ({"prompt": [True]}, "prompt", "prompt: give a text, token ids, or a list of either"),
        ({"prompt": [[65, True]]}, "prompt", "prompt: give a text, token ids, or a list of either"),
        ({"stop_token_ids": [True]}, "stop_token_ids", "stop_token_ids.0: give a whole number"),
        ({"cache_salt": ""}, "cache_salt", "cache_salt: it is empty; give a text, or leave it out"),
        ({"n": "many"}, "n", "n: give a whole number"),
        ({"n": 1.5}, "n", "n: give a whole number"),
        ({"n": []}, "n", "n: give a whole number"),
        ({"stream": "perhaps"}, "stream", "stream: give true or false"),
        ({"stream": 5}, "stream", "stream: give true or false"),
        ({"stop_token_ids": 5}, "stop_token_ids", "stop_token_ids: give a list"),
        ({"stop_token_ids": [1] * 5000}, "stop_token_ids", "give a list of at most 4,096"),
        ({"logit_bias": 5}, "logit_bias", "logit_bias: give an object"),
        ({"stream_options": 5}, "stream_options", "stream_options: give an object"),
        ({"user": 5}, "user", "user: give a text"),
        ({"prompt_cache_retention": "48h"}, "prompt_cache_retention", "give one of 'in_memory', 'in-memory' or '24h'"),
        ({"response_format": {}}, "response_format", "response_format.type: it is missing; give it"),
        ({"prompt": None}, "prompt", "prompt: give a text, token ids, or a list of either"),
        ({"top_k": -2}, "top_k", "top_k is -2; give 0 or -1 (all tokens)"),
        ({"deadline_s": 1e9}, "deadline_s", "above 0 and below 10^9"),
        ({"prompt_cache_options": {"ttl": 1e12}}, "prompt_cache_options", "above 0 and below 10^9"),
    ],
)
def test_an_error_names_the_field_that_is_wrong(
    http: httpx.Client, fields: dict[str, Any], param: str, said: str
) -> None:
    error = http.post("/v1/completions", json={"prompt": "x", **fields}).json()["error"]
    assert error["param"] == param, error
    assert said in error["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is empty, which is no JSON object"),
        (b"[1]", "no JSON object"),
        (b"5", "no JSON object"),
        (b'{"prompt": "x",\n "n": }', "line 2, column 7: expecting value"),
        (b'{"prompt": "x"', "line 1, column 15: "),
        (b'{"prompt": "caf\xe9"}', "send a JSON object in UTF-8"),
    ],
)
def test_a_body_that_is_no_object_is_told_so(http: httpx.Client, body: bytes, said: str) -> None:
    for kind in ("application/json", "application/json; charset=utf-8"):
        answer = http.post("/v1/completions", content=body, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, None)
        assert said in answer.json()["error"]["message"]
        assert "content-type" not in answer.json()["error"]["message"], "which was right"


@pytest.mark.parametrize(
    ("headers", "said"), [({"content-type": "text/plain"}, "says content-type: 'text/plain'"), ({}, "no content-type")]
)
def test_a_body_that_is_not_said_to_be_json_is_told_what_to_send(
    http: httpx.Client, headers: dict[str, str], said: str
) -> None:
    answer = http.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert "send a JSON object with content-type: application/json" in answer.json()["error"]["message"]


def test_a_wrong_stream_is_refused_before_it_begins(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": [-1], "stream": True})
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"


def test_one_wrong_prompt_of_several_lets_none_in(http: httpx.Client, live: LiveServer) -> None:
    assert http.post("/v1/completions", json={"prompt": [[65], [-1]]}).status_code == 400
    stats = live.call(lambda engine: engine.stats())
    assert (stats.num_running, stats.num_waiting) == (0, 0)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b'{"prompt": "\\ud800"}'])
def test_a_body_that_is_no_request_is_a_client_s_error(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
