"""POST /v1/chat/completions: from messages to one request, and from deltas to OpenAI's answer, tools' calls found while
they stream. Owns this route alone; the form of calls is in `text/tool_calls.py`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from pagemill.base.params import Grammar, SamplingParams
from pagemill.base.step import PositionLogprobs
from pagemill.engine.output import Delta
from pagemill.server.answering import AnswerWriter, respond
from pagemill.server.asking import cache_of, chat_sampling, check_biases, check_breakpoints, check_fields
from pagemill.server.errors import FieldError, about
from pagemill.server.logprobs import chat_logprobs, prompt_logprobs
from pagemill.server.ports import Ask, Stream
from pagemill.server.schema import ChatBody, ChatMessage, ConversationFields, NamedTool
from pagemill.server.service import Service, priority_of, service_of, visitor_of
from pagemill.server.usage import leaves_blocks
from pagemill.text.conversation import PromptTokens
from pagemill.text.tool_calls import CallPiece, ToolCallParser, as_text, calls_grammar, describe_tools, with_objects

RESERVED_VARIABLES = frozenset(
    {"messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "now", "template"}
)

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Answer a conversation."""
    service, visitor = service_of(request), visitor_of(request)
    service.check_model(body.model)
    check_fields(body, strict=service.settings.strict)
    service.check_ready()
    params = _with_tools(body, chat_sampling(body, priority_of(visitor, body.priority)))
    check_biases(params, service.serving.facts)
    prompt = await chat_prompt(service, body.messages, body)
    options = cache_of(body, visitor.tenant, len(prompt.token_ids), prompt.breakpoints)
    asks: list[Ask] = [(prompt.token_ids, params, options)]
    writes = leaves_blocks(asks)

    def make_writer(stream: Stream) -> ChatWriter:
        return ChatWriter(service, body, stream, prompt.token_ids, writes=writes)

    return await respond(service, visitor, request, body, asks, make_writer)


async def chat_prompt(service: Service, messages: Sequence[ChatMessage], body: ConversationFields) -> PromptTokens:
    """The conversation as token ids, with its tools where the answer may call them: the same for `/tokenize`. Raises
    FieldError for what a request may not say."""
    check_breakpoints(messages)
    _demanded(body)  # a choice among tools that are not given is refused by /tokenize too
    variables = body.chat_template_kwargs or {}
    if wrong := sorted(RESERVED_VARIABLES & variables.keys()):
        raise FieldError(f"chat_template_kwargs names {wrong[0]!r}, which is set already", param="chat_template_kwargs")
    if body.chat_template is not None:  # it could hold up everybody's templates for seconds
        raise FieldError(
            "a request may not bring a template; the operator gives one by --chat-template", param="chat_template"
        )
    tools = [] if body.tool_choice == "none" else [each.model_dump(exclude_none=True) for each in body.tools or ()]
    return await conversation_tokens(
        service,
        messages,
        tools=tools,
        variables=variables,
        add_generation_prompt=body.add_generation_prompt,
    )


async def conversation_tokens(
    service: Service,
    messages: Sequence[ChatMessage],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
) -> PromptTokens:
    """Messages as token ids, by the operator's template or the model's. One that knows no tools is told of them, and of
    calls, in plain text."""
    template = service.settings.chat_template
    known = template if template is not None else service.serving.facts.get("chat_template")
    knows_tools = "tools" in (known or "")
    told = with_objects(_messages_of(messages)) if knows_tools else as_text(_messages_of(messages))
    if tools and not knows_tools:
        told = _told_of(told, describe_tools(tools))
    with about("messages"):
        return await service.serving.chat_tokens(
            told,
            tools=tools if knows_tools else (),
            template=template,
            variables=variables,
            add_generation_prompt=add_generation_prompt,
        )


def _messages_of(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as templates know them: a developer is a system."""
    made = []
    for message in messages:
        each = message.model_dump(exclude_unset=True)
        if each["role"] == "developer":
            each["role"] = "system"
        made.append(each)
    return made


def _told_of(messages: list[dict[str, Any]], preamble: str) -> list[dict[str, Any]]:
    """The same with the tools described in the system's message."""
    if messages and messages[0]["role"] == "system":
        content = messages[0].get("content") or ""
        parts = [content] if isinstance(content, str) else list(content)
        return [{**messages[0], "content": [*parts, "\n\n", preamble]}, *messages[1:]]
    return [{"role": "system", "content": preamble}, *messages]


def _demanded(body: ConversationFields) -> list[dict[str, Any]]:
    """The functions of which one must be called; none where the request demands no call. Raises FieldError for tools
    that are not given."""
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return []
    if not body.tools:
        raise FieldError("tool_choice demands a call and there are no tools; give tools", param="tool_choice")
    functions = [each.function.model_dump(exclude_none=True) for each in body.tools]
    if isinstance(choice, NamedTool):
        functions = [each for each in functions if each["name"] == choice.function.name]
        if not functions:
            raise FieldError(
                f"tool_choice names {choice.function.name[:100]!r}, which is none of the tools", param="tool_choice"
            )
    return functions


def _with_tools(body: ChatBody, params: SamplingParams) -> SamplingParams:
    """The parameters, held to a call where the request demands one. Raises FieldError for tools that are not given."""
    functions = _demanded(body)
    if not functions:
        return params
    if params.grammar is not None:
        raise FieldError(
            "tool_choice demands a call and response_format another form; give one of them", param="tool_choice"
        )
    several = body.tool_choice == "required" and body.parallel_tool_calls is True
    with about("tools"):
        grammar = Grammar("lark", calls_grammar(functions, several=several))
    return replace(params, grammar=grammar)


@dataclass(slots=True)
class _Choice:
    """One choice as it grows. Mutated by the writer. calls: name and pieces of arguments of each."""

    index: int
    parser: ToolCallParser | None
    text: list[str] = field(default_factory=list)
    calls: list[tuple[str, str, list[str]]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    positions: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class ChatWriter(AnswerWriter):
    """Writes one answer of /v1/chat/completions. Mutated by `write` and `add`."""

    def __init__(
        self, service: Service, body: ChatBody, stream: Stream, token_ids: Sequence[int], *, writes: bool
    ) -> None:
        head = service.head("chat.completion.chunk" if body.stream else "chat.completion", "chatcmpl")
        super().__init__(service, body, head, {stream.request_ids[0]: len(token_ids)}, writes=writes)
        self._body = body
        self._token_ids = token_ids
        self._demands = bool(_demanded(body))  # nothing but calls comes, whose markup is nobody's text
        parses = bool(body.tools) and body.tool_choice != "none"
        self._choices = [_Choice(index, ToolCallParser() if parses else None) for index in range(body.n or 1)]
        self._prompt: tuple[PositionLogprobs, ...] = ()

    def begin(self) -> bytes:
        """The role of each choice."""
        usage = self._usage.beside()
        first: dict[str, Any] = {"role": "assistant", "content": None if self._demands else ""}
        return b"".join(
            self._frame.chunk([self._choice_of(each, dict(first))], usage) for each in self._choices
        )  # fmt: skip

    def write(self, deltas: list[Delta]) -> bytes:
        return b"".join(map(self._chunks, deltas))

    def choices(self) -> list[dict[str, Any]]:
        return [self._described(each) for each in self._choices]

    def beside(self) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        if self._body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(self._prompt, self._token)
        if self._body.return_token_ids:
            found["prompt_token_ids"] = list(self._token_ids)
        return found

    def _take(self, delta: Delta) -> tuple[_Choice, list[dict[str, Any]]]:
        """Add a delta; what it brings, as the fields of chunks."""
        choice = self._choices[delta.choice]
        self.tally.add(delta)
        self._prompt = self._prompt or delta.prompt_logprobs
        choice.token_ids += delta.token_ids
        choice.positions += delta.logprobs
        choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        if choice.parser is None:
            choice.text.append(delta.text)
            return choice, [{"content": delta.text}] if delta.text else []
        pieces = choice.parser.push(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            pieces += choice.parser.finish()
            if choice.parser.num_calls and delta.finish_reason == "stop":
                choice.finish_reason = "tool_calls"
        return choice, [self._told(choice, piece) for piece in pieces if piece.kind != "text" or not self._demands]

    def _told(self, choice: _Choice, piece: CallPiece) -> dict[str, Any]:
        if piece.kind == "text":
            choice.text.append(piece.text)
            return {"content": piece.text}
        if piece.kind == "name":
            call_id = f"call_{secrets.token_hex(12)}"
            choice.calls.append((call_id, piece.text, []))
            function: dict[str, Any] = {"name": piece.text, "arguments": ""}
            return {"tool_calls": [{"index": piece.index, "id": call_id, "type": "function", "function": function}]}
        choice.calls[piece.index][2].append(piece.text)
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}

    def _chunks(self, delta: Delta) -> bytes:
        choice, fields = self._take(delta)
        usage = self._usage.beside()
        chunks = []
        last = delta.finish_reason is not None
        if not fields and (delta.logprobs or last or self._body.return_token_ids):
            fields = [{}]
        for index, each in enumerate(fields):
            described = self._choice_of(choice, each)
            if index == 0 and delta.logprobs:
                described["logprobs"] = chat_logprobs(delta.logprobs, self._token)
            if index == 0 and self._body.return_token_ids:
                described["token_ids"] = list(delta.token_ids)
            if last and index == len(fields) - 1:
                described["finish_reason"] = choice.finish_reason
                described["stop_reason"] = choice.stop_reason
            chunks.append(self._frame.chunk([described], usage))
        if not fields and self._usage.is_running:
            chunks.append(self._frame.chunk([], usage))
        choice.text.clear()
        choice.token_ids.clear()
        choice.positions.clear()
        return b"".join(chunks)

    def _choice_of(self, choice: _Choice, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _described(self, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": None if self._demands else text, "refusal": None}
        if choice.calls:
            message["content"] = text if text.strip() else None
            message["tool_calls"] = [
                {"id": call_id, "type": "function", "function": {"name": name, "arguments": _whole_json(pieces)}}
                for call_id, name, pieces in choice.calls
            ]
        described = {
            "index": choice.index,
            "message": message,
            "logprobs": chat_logprobs(choice.positions, self._token) if self._body.logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._body.return_token_ids:
            described["token_ids"] = list(choice.token_ids)
        return described


def _whole_json(pieces: Sequence[str]) -> str:
    """Arguments as the model wrote them; a call without any has an empty object."""
    return "".join(pieces) or json.dumps({})
