"""The routes that generate nothing: models, tokens, health, version. Owns their answers."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from pagemill.server.asking import check_fields
from pagemill.server.chat import chat_prompt
from pagemill.server.errors import FieldError, about
from pagemill.server.json_bytes import json_response
from pagemill.server.schema import DetokenizeBody, TokenizeBody
from pagemill.server.service import LOADING_RETRY_S, Service, service_of

router = APIRouter()


@router.head("/health", response_model=None, include_in_schema=False)
@router.get("/health", response_model=None)
async def health(request: Request) -> Response:
    """200 once the model is loaded and requests are taken; 503 with a status while it loads, drains or has failed."""
    service = service_of(request)
    answer = json_response({"status": service.status})
    if service.status != "ready":
        answer.status_code = 503
        answer.headers["retry-after"] = str(int(LOADING_RETRY_S))
    return answer


@router.head("/version", response_model=None, include_in_schema=False)
@router.get("/version", response_model=None)
async def version(request: Request) -> Response:
    """The version of the program."""
    return json_response({"version": service_of(request).settings.version})


@router.head("/v1/models", response_model=None, include_in_schema=False)
@router.get("/v1/models", response_model=None)
@router.get("/v1/models/", response_model=None, include_in_schema=False)
async def list_models(request: Request) -> Response:
    """The model under each of its names, also while it loads."""
    service = service_of(request)
    return json_response({"object": "list", "data": [_card(service, name) for name in service.settings.served_names]})


@router.head("/v1/models/{name:path}", response_model=None, include_in_schema=False)
@router.get("/v1/models/{name:path}", response_model=None)
async def show_model(name: str, request: Request) -> Response:
    """One model."""
    service = service_of(request)
    service.check_model(name)
    return json_response(_card(service, name))


@router.post("/tokenize", response_model=None)
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """Token ids of a text, or of a conversation: those that a chat with the same fields begins with."""
    service = service_of(request)
    service.check_model(body.model)
    check_fields(body, strict=service.settings.strict)
    service.check_ready()
    if (body.prompt is None) == (body.messages is None):
        raise FieldError("give either prompt or messages", param="prompt")
    if body.messages is not None:
        if not body.messages:
            raise FieldError("there are no messages; give at least one", param="messages")
        tokens = (await chat_prompt(service, body.messages, body)).token_ids
    else:
        with about("prompt"):
            tokens = await service.serving.encode(body.prompt or "", add_special=body.add_special_tokens)
    answer: dict[str, Any] = {"count": len(tokens), "max_model_len": service.serving.facts.get("max_model_len")}
    answer["tokens"] = tokens
    if body.return_token_strs:
        token = service.serving.token
        answer["token_strs"] = await asyncio.to_thread(lambda: [token(each)[0] for each in tokens])
    return json_response(answer)


@router.post("/detokenize", response_model=None)
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """The text of token ids, control tokens included."""
    service = service_of(request)
    service.check_model(body.model)
    check_fields(body, strict=service.settings.strict)
    service.check_ready()
    size = service.serving.facts.get("vocab_size", 0)
    if any(not 0 <= each < size for each in body.tokens):
        raise FieldError(f"tokens holds an id out of range; give ids from 0 to {size - 1:,}", param="tokens")
    return json_response({"prompt": await service.serving.decode(body.tokens)})


@router.head("/tokenizer_info", response_model=None, include_in_schema=False)
@router.get("/tokenizer_info", response_model=None)
async def tokenizer_info(request: Request) -> Response:
    """What clients need who tokenise by `/tokenize`, as vLLM names it: control tokens and the model's own template. An
    operator's template is not told, since it may hold instructions."""
    service = service_of(request)
    service.check_ready()
    facts, own = service.serving.facts, service.settings.chat_template
    answer: dict[str, Any] = {
        f"{name}_token": None
        if facts.get(f"{name}_token_id") is None
        else service.serving.token(facts[f"{name}_token_id"])[0]
        for name in ("bos", "eos", "pad", "unk")
    }
    answer["chat_template"] = facts.get("chat_template") if own is None else None
    answer["model_max_length"] = facts.get("max_model_len")
    answer["vocab_size"] = facts.get("vocab_size")
    return json_response(answer)


def _card(service: Service, name: str) -> dict[str, Any]:
    settings, facts = service.settings, service.serving.facts
    return {
        "id": name,
        "object": "model",
        "created": settings.created_s,
        "owned_by": "pagemill",
        "root": settings.served_names[0],
        "parent": None,
        "max_model_len": facts.get("max_model_len"),
        "status": service.status,
    }
