"""Fields that are null: every boolean of every body then has its default."""

from __future__ import annotations

from typing import Any, get_args

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from pagemill.server import schema

# What the models cannot do without.
REQUIRED: dict[str, dict[str, Any]] = {
    "ChatBody": {"messages": [{"role": "user", "content": "x"}]},
    "ChatMessage": {"role": "user"},
    "CompletionBody": {"prompt": "x"},
    "DetokenizeBody": {"tokens": []},
    "FunctionDefinition": {"name": "f"},
    "NamedFunction": {"name": "f"},
    "NamedTool": {"function": {"name": "f"}},
    "ResponseFormat": {"type": "text"},
    "ToolDefinition": {"function": {"name": "f"}},
}
MODELS = [each for each in vars(schema).values() if isinstance(each, type) and issubclass(each, BaseModel)]


def is_flag(annotation: Any) -> bool:
    """Whether a field takes true and false, perhaps beside others."""
    return annotation is bool or any(map(is_flag, get_args(annotation)))


FLAGS = [
    (model, name, field.alias or name)
    for model in MODELS
    for name, field in model.model_fields.items()
    if is_flag(field.annotation)
]


def test_the_fields_are_found() -> None:
    found = {(model.__name__, name) for model, name, _ in FLAGS}
    assert {("CompletionBody", "echo"), ("ChatBody", "logprobs"), ("TokenizeBody", "return_token_strs")} <= found
    assert {("StreamOptions", "include_usage"), ("CacheRequest", "bypass"), ("ChatBody", "stream")} <= found


@pytest.mark.parametrize(("model", "name", "alias"), FLAGS, ids=lambda each: getattr(each, "__name__", each))
def test_null_is_the_default_of_every_boolean(model: type[BaseModel], name: str, alias: str) -> None:
    required = REQUIRED.get(model.__name__, {})
    made = model.model_validate({**required, alias: None})
    assert getattr(made, name) == getattr(model.model_validate(required), name)
    assert getattr(model.model_validate({**required, alias: True}), name) is True
    assert getattr(model.model_validate({**required, alias: False}), name) is False
    with pytest.raises(ValidationError):
        model.model_validate({**required, alias: 5})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_nulls_are_answered_as_if_left_out(http: httpx.Client, path: str) -> None:
    model = {"/v1/completions": "CompletionBody", "/v1/chat/completions": "ChatBody", "/tokenize": "TokenizeBody"}[path]
    body = {"prompt": "x"} if path == "/tokenize" else {**REQUIRED[model], "temperature": 0, "max_tokens": 4}
    nulls = {alias: None for owner, _, alias in FLAGS if owner.__name__ == model}
    assert len(nulls) > 2
    answers = [http.post(path, json=each) for each in (body, {**body, **nulls})]
    assert [each.status_code for each in answers] == [200, 200], answers[1].text
    plain, told = (each.json() for each in answers)
    assert plain.get("choices") == told.get("choices")
    assert plain.get("tokens") == told.get("tokens")
