"""From sampled tokens to what a caller reads: text, stops, logprobs, reasons to finish. Owns Delta."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from pagemill.base.step import Sample, StepResult, TokenLogprob
from pagemill.engine.ports import Decode
from pagemill.engine.request import Marks, Request, Sequence
from pagemill.text.stop import StopMatcher
from pagemill.text.stream import IncrementalDetokenizer

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """One generated position: the token taken, and the `logprobs` most likely ones, best first."""

    sampled: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one choice of a request. A choice ends with exactly one delta that has a finish_reason.

    text: final text only; characters cut by a token and text that may begin a stop string come later. logprobs: one
    entry a token where the request asked for them. stop_reason: the stop string or the id from stop_token_ids that
    ended it, None for the model's own end of text. error: set exactly where finish_reason is "error".
    """

    request_id: str
    choice: int
    token_ids: tuple[int, ...]
    text: str
    marks: Marks
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: Exception | None = None
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        """True for the last delta of its choice."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class TextStep:
    """Text and end that one token brings."""

    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class ChoiceText:
    """The text of one choice as its tokens come. Mutated by `push`."""

    __slots__ = ("_detokenizer", "_matcher", "_request")

    def __init__(self, request: Request, decode: Decode) -> None:
        params = request.params
        self._request = request
        self._detokenizer = IncrementalDetokenizer(partial(decode, skip_special_tokens=params.skip_special_tokens))
        stops = params.stop
        self._matcher = StopMatcher(stops, params.include_stop_str_in_output) if stops else None

    def push(self, token_id: int, num_generated: int) -> TextStep:
        """Text that has become final with the num_generated-th token, and whether it ends the choice.

        An id that stops is not part of the text unless the request wants its stops included. Stop strings are looked
        for in the text of the tokens from the min_tokens-th on.
        """
        request = self._request
        params = request.params
        stops = token_id in request.stop_token_ids
        text = self._detokenizer.push(token_id) if not stops or params.include_stop_str_in_output else ""
        reason: FinishReason | None = None
        if stops:
            reason = "stop"
        elif num_generated >= request.max_tokens:
            reason = "length"
        if reason is not None:
            text += self._detokenizer.flush()
        if self._matcher is not None and num_generated >= params.min_tokens:
            found = self._matcher.push(text)
            if found.stopped is not None:
                return TextStep(found.text, "stop", found.stopped)
            text = found.text + (self._matcher.flush() if reason is not None else "")
        return TextStep(text, reason, token_id if stops and token_id in params.stop_token_ids else None)


class Output:
    """The open choices' texts. Mutated by `open`, `delta` and `close`."""

    __slots__ = ("_decode", "_texts")

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._texts: dict[int, ChoiceText] = {}

    def open(self, sequence: Sequence) -> None:
        """Begin the text of a new sequence."""
        self._texts[sequence.seq_id] = ChoiceText(sequence.request, self._decode)

    def close(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        self._texts.pop(sequence.seq_id, None)

    @property
    def num_open(self) -> int:
        """Choices that have not ended."""
        return len(self._texts)

    def delta(self, sequence: Sequence, sample: Sample, now_s: float) -> Delta:
        """Append the sampled token to the sequence and tell what it brings."""
        request = sequence.request
        sequence.tokens.append(sample.token_id)
        step = self._texts[sequence.seq_id].push(sample.token_id, sequence.num_generated)
        if sequence.marks.first_token_s is None:
            sequence.marks = replace(sequence.marks, first_token_s=now_s)
        if step.finish_reason is not None:
            sequence.marks = replace(sequence.marks, finished_s=now_s)
        logprobs: tuple[PositionLogprobs, ...] = ()
        if request.params.logprobs is not None and sample.logprob is not None:
            logprobs = (PositionLogprobs(sample.logprob, sample.top),)
        return Delta(
            request_id=request.request_id,
            choice=sequence.choice,
            token_ids=(sample.token_id,),
            text=step.text,
            marks=sequence.marks,
            logprobs=logprobs,
            finish_reason=step.finish_reason,
            stop_reason=step.stop_reason,
        )

    def ending(self, sequence: Sequence, reason: FinishReason, now_s: float, error: Exception | None = None) -> Delta:
        """The last delta of a sequence that no token ends: aborted or failed. Text held back is dropped."""
        sequence.marks = replace(sequence.marks, finished_s=now_s)
        request = sequence.request
        return Delta(request.request_id, sequence.choice, (), "", sequence.marks, finish_reason=reason, error=error)


def check_answers(sequences: Ordered[Sequence], result: StepResult) -> None:
    """An executor answers each row that asked, in order, with a sample or a failure: our own mistake otherwise."""
    failed = {failure.seq_id for failure in result.failures}
    answered = [s.seq_id for s in result.samples]
    assert answered == [s.seq_id for s in sequences if s.seq_id not in failed], "the executor's answers do not fit"
    assert failed <= {s.seq_id for s in sequences}, "the executor failed a row that did not ask"
