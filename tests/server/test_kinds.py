"""Numbers and truth values of JSON are two kinds: neither is taken for the other, in any field of any body."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

import httpx
import jsonschema_rs
import pytest
from pydantic import BaseModel, ValidationError

from tests.server.test_admin import Office
from tests.server.test_error_fields import ROUTES, limited, refused
from tests.server.test_schema import MODELS, REQUIRED

__all__ = ["limited"]  # a fixture

TRUTHS, NUMBERS = (True, False), (0, 1, 1.0)


def misfits(annotation: Any) -> Iterator[Any]:
    """Values of a type that hold a number where a truth value belongs, or the other way round; one of each kind."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from misfits(parts[0])
    elif origin is list:
        yield from ([each] for each in misfits(parts[0]))
    elif origin is dict:
        yield from ({"1": each} for each in misfits(parts[1]))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, value in misfits_of(annotation):
            yield {**REQUIRED.get(annotation.__name__, {}), name: value}
    elif annotation in (int, float):
        yield from TRUTHS
    elif annotation is bool:
        yield from NUMBERS
    else:
        for part in parts:
            yield from misfits(part)


def misfits_of(model: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """The same of each field of a body, beside its name."""
    for name, field in model.model_fields.items():
        yield from ((field.alias or name, value) for value in misfits(field.annotation))


CASES = [(path, name, value) for path, (model, _) in ROUTES.items() for name, value in misfits_of(model)]


def test_the_fields_are_found() -> None:
    found = {(path.rpartition("/")[2], name) for path, name, _ in CASES}
    numbers = {"n", "seed", "max_tokens", "logprobs", "top_k", "temperature", "logit_bias", "stop_token_ids", "prompt"}
    assert {("completions", name) for name in numbers} <= found
    assert {("completions", name) for name in ("stream", "echo", "stream_options", "cache", "response_format")} <= found
    assert {("tokenize", "return_token_strs"), ("detokenize", "tokens")} <= found
    assert len(CASES) > 150


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_no_body_takes_a_truth_value_for_a_number_or_a_number_for_a_truth_value(model: type[BaseModel]) -> None:
    for name, value in misfits_of(model):
        with pytest.raises(ValidationError):
            model.model_validate({**REQUIRED.get(model.__name__, {}), name: value})


@pytest.mark.parametrize("path", ROUTES)
def test_they_are_refused_and_the_field_is_named(http: httpx.Client, path: str) -> None:
    for each, name, value in CASES:
        if each == path:
            error = refused(http, path, {name: value})
            assert error["param"] == name, (value, error)
            assert error["message"].startswith(name), (value, error)


def test_what_is_wanted_is_said(http: httpx.Client, limited: httpx.Client) -> None:
    told = {
        "n": (True, "n: give a whole number"),
        "max_tokens": (False, "max_tokens: give a whole number"),
        "temperature": (True, "temperature: give a number"),
        "logit_bias": ({"5": True}, "logit_bias.5: give a number"),
        "stream": (1, "stream: give true or false"),
        "stream_options": ({"include_usage": 1}, "stream_options.include_usage: give true or false"),
        "cache": ({"retain": [{"from": True}]}, "cache.retain.0.from: give a whole number"),
        "prompt_cache_options": ({"ttl": True}, "prompt_cache_options.ttl: give seconds, or a time such as 30m"),
        "prompt": ([True], "prompt: give a text, token ids, or a list of either"),
    }
    for name, (value, message) in told.items():
        for client in (http, limited):
            assert refused(client, "/v1/completions", {name: value})["message"].partition(" (and")[0] == message


def test_the_description_refuses_them_too(http: httpx.Client) -> None:
    described = http.get("/openapi.json").json()
    for path, (_, base) in ROUTES.items():
        schema = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        body = jsonschema_rs.validator_for({**schema, "components": described["components"]})
        assert body.is_valid(base)
        for each, name, value in CASES:
            assert each != path or not body.is_valid({**base, name: value}), (path, name, value)


def test_whole_numbers_may_be_written_with_a_point_or_as_text(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2.0, "top_k": "1", "temperature": 1})
    assert answer.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/admin/cache/pin", {"prompt": "x", "seconds": True}, "seconds"),
        ("POST", "/admin/cache/pin", {"prompt_token_ids": [True], "seconds": 5}, "prompt_token_ids"),
        ("POST", "/admin/cache/purge", {"prompt_token_ids": [1, False]}, "prompt_token_ids"),
        ("POST", "/admin/cache/purge", {"what": True}, "what"),
        ("POST", "/admin/cache/purge", {"what": "tenant", "tenant": True}, "tenant"),
        ("POST", "/admin/cache/purge", {"what": "tenant", "salt": True}, "salt"),
        ("PUT", "/admin/tenants/a", {"floor_tokens": True}, "floor_tokens"),
        ("PUT", "/admin/tenants/a", {"floor_tokens": False}, "floor_tokens"),
        ("PUT", "/admin/tenants/a", {"cap_tokens": True}, "cap_tokens"),
    ],
    ids=str,
)
def test_the_admin_port_takes_neither_for_the_other(method: str, path: str, body: dict[str, Any], param: str) -> None:
    answer = Office().ask(method, path, **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
