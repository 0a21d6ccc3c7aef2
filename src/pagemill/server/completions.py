"""POST /v1/completions: from a body to requests, and from deltas to OpenAI's answer. Owns this route alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response

from pagemill.base.errors import RequestError
from pagemill.base.step import PositionLogprobs
from pagemill.engine.output import Delta
from pagemill.server.answering import AnswerWriter, respond
from pagemill.server.asking import cache_of, check_biases, check_fields, completion_sampling
from pagemill.server.errors import FieldError, about
from pagemill.server.logprobs import CompletionLogprobs, prompt_logprobs
from pagemill.server.ports import Ask, Serving, Stream
from pagemill.server.schema import CompletionBody
from pagemill.server.service import Service, priority_of, service_of, visitor_of
from pagemill.server.usage import leaves_blocks

MAX_CHOICES = 1024
MAX_SCORED = 2**20  # log-probabilities of prompts in one answer

router = APIRouter()


@router.post("/v1/completions", response_model=None)
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Go on from one prompt or several, given as text or as token ids."""
    service, visitor = service_of(request), visitor_of(request)
    service.check_model(body.model)
    check_fields(body, strict=service.settings.strict)
    service.check_ready()
    params = completion_sampling(body, priority_of(visitor, body.priority))
    check_biases(params, service.serving.facts)
    prompts = await _prompts(body, service.serving)
    if params.prompt_logprobs is not None:
        times = params.n if body.echo and body.logprobs is not None else 1
        asked = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        _check_scored(sum(len(ids) for _, ids in prompts) * times * (1 + params.prompt_logprobs), asked)
    asks: list[Ask] = [(ids, params, cache_of(body, visitor.tenant, len(ids))) for _, ids in prompts]
    writes = leaves_blocks(asks)

    def make_writer(stream: Stream) -> CompletionWriter:
        return CompletionWriter(service, body, stream, prompts, writes=writes)

    return await respond(service, visitor, request, body, asks, make_writer)


async def _prompts(body: CompletionBody, serving: Serving) -> list[tuple[str | None, list[int]]]:
    """Every prompt as text, where it was given so, and as ids."""
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise FieldError("prompt is empty; give a text or token ids", param="prompt")
    if len(given) * (body.n or 1) > MAX_CHOICES:
        raise FieldError(
            f"{len(given):,} prompts with n {body.n or 1} in one request; give at most {MAX_CHOICES:,} in all",
            param="prompt",
        )
    found: list[tuple[str | None, list[int]]] = []
    for index, each in enumerate(given):
        if isinstance(each, str):
            with about("prompt"):
                found.append((each, await serving.encode(each, add_special=body.add_special_tokens)))
        else:
            found.append((None, each))
        if not found[-1][1] and len(given) > 1:
            raise FieldError(f"prompt.{index} is empty; give a text or token ids", param="prompt")
    return found


def _check_scored(count: int, param: str) -> None:
    if count > MAX_SCORED:
        raise FieldError(
            f"the answer would hold {count:,} log-probabilities of prompts; ask for up to {MAX_SCORED:,}: shorter or "
            "fewer prompts, fewer choices or fewer of them at each position",
            param=param,
        )


@dataclass(slots=True)
class _Choice:
    """One choice as it grows. Mutated by the writer."""

    index: int
    prompt: str
    prompt_ids: Sequence[int]
    logprobs: CompletionLogprobs
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    positions: list[PositionLogprobs] = field(default_factory=list)
    prompt_positions: tuple[PositionLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    echoed: bool = False


class CompletionWriter(AnswerWriter):
    """Writes one answer of /v1/completions. Mutated by `write` and `add`."""

    def __init__(
        self,
        service: Service,
        body: CompletionBody,
        stream: Stream,
        prompts: Sequence[tuple[str | None, list[int]]],
        *,
        writes: bool,
    ) -> None:
        counts = {request_id: len(ids) for request_id, (_, ids) in zip(stream.request_ids, prompts, strict=True)}
        super().__init__(service, body, service.head("text_completion", "cmpl"), counts, writes=writes)
        self._body = body
        n = body.n or 1
        self._first = {request_id: index * n for index, request_id in enumerate(stream.request_ids)}
        self._choices = [
            _Choice(index, self._echo_of(*prompt), prompt[1], CompletionLogprobs(self._token))
            for index, prompt in enumerate(each for each in prompts for _ in range(n))
        ]
        self._drops_token = body.echo and body.max_tokens == 0

    def begin(self) -> bytes:
        return b""

    def write(self, deltas: list[Delta]) -> bytes:
        return b"".join(map(self._chunk, deltas))

    def choices(self) -> list[dict[str, Any]]:
        return [self._described(each) for each in self._choices]

    def _take(self, delta: Delta) -> _Choice:
        choice = self._choices[self._first[delta.request_id] + delta.choice]
        if self._drops_token:
            delta = delta._replace(token_ids=(), text="", logprobs=(), finish_reason=delta.finish_reason and "length")
        self.tally.add(delta)
        choice.text.append(delta.text)
        choice.token_ids += delta.token_ids
        choice.positions += delta.logprobs
        choice.prompt_positions = choice.prompt_positions or delta.prompt_logprobs
        choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        return choice

    def _chunk(self, delta: Delta) -> bytes:
        choice = self._take(delta)
        choices = []
        first = self._body.echo and not choice.echoed
        if first or delta.text or delta.logprobs or delta.finish_reason is not None or self._body.return_token_ids:
            described = self._described(choice)
            choice.text.clear()
            choice.token_ids.clear()
            choice.positions.clear()
            choices.append(described)
        elif not self._usage.is_running:
            return b""
        return self._frame.chunk(choices, self._usage.beside())

    def _described(self, choice: _Choice) -> dict[str, Any]:
        """The choice as far as it was not told yet."""
        body = self._body
        echoes = body.echo and not choice.echoed
        text = "".join(choice.text)
        described: dict[str, Any] = {"index": choice.index, "text": choice.prompt + text if echoes else text}
        described["logprobs"] = None if body.logprobs is None else self._logprobs(choice, echoes, body.logprobs)
        described["finish_reason"] = choice.finish_reason
        described["stop_reason"] = choice.stop_reason
        if body.return_token_ids:
            described["token_ids"] = list(choice.token_ids)
            described["prompt_token_ids"] = None if choice.echoed else list(choice.prompt_ids)
        if body.prompt_logprobs is not None and choice.prompt_positions and not choice.echoed:
            described["prompt_logprobs"] = prompt_logprobs(choice.prompt_positions, self._token)
        choice.echoed = True
        return described

    def _logprobs(self, choice: _Choice, echoes: bool, wanted: int) -> dict[str, Any]:
        positions: list[PositionLogprobs | None] = [*choice.positions]
        token_ids = choice.token_ids[-len(positions) :] if positions else []
        if echoes:
            source = self._choices[choice.index - choice.index % (self._body.n or 1)]
            known: list[PositionLogprobs | None] = [None, *(choice.prompt_positions or source.prompt_positions)]
            known += [None] * (len(choice.prompt_ids) - len(known))
            positions, token_ids = known + positions, [*choice.prompt_ids, *token_ids]
        return choice.logprobs.of(positions, token_ids, wanted)

    def _echo_of(self, text: str | None, token_ids: Sequence[int]) -> str:
        if not self._body.echo:
            return ""
        if text is not None:
            return text
        try:
            return b"".join(self._token(each)[1] for each in token_ids).decode(errors="replace")
        except RequestError:
            return ""
