"""From sampled tokens to what a caller reads: text, stops, logprobs, reasons to finish. Owns Delta."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ordered
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

from pagemill.base.step import PositionLogprobs, Sample, SequenceStep, StepResult
from pagemill.engine.ports import Decode
from pagemill.engine.receipt import Receipt
from pagemill.engine.request import Marks, Request, Sequence
from pagemill.text.stop import StopMatcher
from pagemill.text.stream import IncrementalDetokenizer, Pieces

FinishReason = Literal["stop", "length", "abort", "error"]


class Delta(NamedTuple):
    """What one step added to one choice of a request. A choice ends with exactly one delta that has a finish_reason.

    A named tuple, because one is made for each token: a frozen dataclass of ten fields takes three times as long.

    text: final text only; characters cut by a token and text that may begin a stop string come later. logprobs: one
    entry a token where the request asked for them. stop_reason: the stop string or the id from stop_token_ids that
    ended it, None for the model's own end of text. error: set exactly where finish_reason is "error".
    num_cached_tokens, receipt: what the cache did for the prompt, told by the last delta. prompt_logprobs: of the
    prompt from position 1 on, told by the first delta where the request asked for them.
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
    receipt: Receipt | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()

    @property
    def finished(self) -> bool:
        """True for the last delta of its choice."""
        return self.finish_reason is not None


_NEW = tuple.__new__  # of a named tuple, without the Python function that fills in its defaults

# Text that one token brings, the reason to finish and the stop that was met.
TextStep = tuple[str, FinishReason | None, str | int | None]


class ChoiceText:
    """The text of one choice as its tokens come. Mutated by `push` and `detokenize`. What each token needs of the
    request is kept at hand.

    plain_until: as long as fewer tokens than that are generated, one that is not in `stop_token_ids` only adds text,
    and `detokenize` does what `push` would.
    """

    __slots__ = (
        "_detokenizer", "_matcher", "_max_tokens", "_request", "detokenize", "plain_until", "request_id",
        "stop_token_ids",
    )  # fmt: skip

    def __init__(self, request: Request, pieces: Pieces, decode: Callable[[Ordered[int]], str]) -> None:
        params = request.params
        self._request = request
        self.request_id, self._max_tokens = request.request_id, request.max_tokens
        self.stop_token_ids = request.stop_token_ids
        self._detokenizer = IncrementalDetokenizer(decode, pieces)
        self.detokenize = self._detokenizer.push
        stops = params.stop
        self._matcher = StopMatcher(stops, params.include_stop_str_in_output) if stops else None
        self.plain_until = 0 if stops else request.max_tokens

    def push(self, token_id: int, num_generated: int) -> TextStep:
        """Text that has become final with the num_generated-th token, and whether it ends the choice.

        An id that stops is not part of the text unless the request wants its stops included. Stop strings are looked
        for in the text of the tokens from the min_tokens-th on.
        """
        if token_id in self.stop_token_ids:
            return self._stop(token_id, num_generated)
        text = self._detokenizer.push(token_id)
        if num_generated < self._max_tokens:
            return (text, None, None) if self._matcher is None else self._match(text, num_generated, None, None)
        return self._match(text + self._detokenizer.flush(), num_generated, "length", None)

    def _stop(self, token_id: int, num_generated: int) -> TextStep:
        params = self._request.params
        text = self._detokenizer.push(token_id) if params.include_stop_str_in_output else ""
        stop = token_id if token_id in params.stop_token_ids else None
        return self._match(text + self._detokenizer.flush(), num_generated, "stop", stop)

    def _match(self, text: str, num_generated: int, reason: FinishReason | None, stop: int | None) -> TextStep:
        """The same unless a stop string is met."""
        if self._matcher is None or num_generated < self._request.params.min_tokens:
            return text, reason, stop
        found = self._matcher.push(text)
        if found.stopped is not None:
            return found.text, "stop", found.stopped
        return found.text + (self._matcher.flush() if reason is not None else ""), reason, stop


class Output:
    """The open choices' texts. Mutated by `open`, `delta` and `close`."""

    __slots__ = ("_decoders", "_pieces", "_texts")

    def __init__(self, decode: Decode) -> None:
        self._decoders = {skip: partial(decode, skip_special_tokens=skip) for skip in (False, True)}
        self._pieces = {skip: Pieces(decoder) for skip, decoder in self._decoders.items()}
        self._texts: dict[int, ChoiceText] = {}

    def open(self, sequence: Sequence) -> None:
        """Begin the text of a new sequence."""
        skip = sequence.request.params.skip_special_tokens
        self._texts[sequence.seq_id] = ChoiceText(sequence.request, self._pieces[skip], self._decoders[skip])

    def close(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        self._texts.pop(sequence.seq_id, None)

    def keep(self, sequences: Iterable[Sequence]) -> None:
        """Forget all but these."""
        alive = {sequence.seq_id for sequence in sequences}
        self._texts = {seq_id: text for seq_id, text in self._texts.items() if seq_id in alive}

    @property
    def num_open(self) -> int:
        """Choices that have not ended."""
        return len(self._texts)

    def delta(self, sequence: Sequence, sample: Sample, num_generated: int, now_s: float) -> Delta:
        """Append the sampled token, the num_generated-th, to the sequence and tell what it brings."""
        _, token_id, logprob, top, prompt = sample
        sequence.tokens.append(token_id)
        choice = self._texts[sequence.seq_id]
        text: str
        reason: FinishReason | None = None
        stop: str | int | None = None
        if num_generated < choice.plain_until and token_id not in choice.stop_token_ids:
            text = choice.detokenize(token_id)
        else:
            text, reason, stop = choice.push(token_id, num_generated)
        if num_generated == 1:
            sequence.marks = replace(sequence.marks, first_token_s=now_s)
        if reason is not None:
            sequence.marks = replace(sequence.marks, finished_s=now_s)
        logprobs: tuple[PositionLogprobs, ...] = ()
        if logprob is not None and sequence.request.params.logprobs is not None:
            logprobs = (PositionLogprobs(logprob, top),)
        return _NEW(
            Delta,
            (
                choice.request_id,
                sequence.choice,
                (token_id,),
                text,
                sequence.marks,
                logprobs,
                reason,
                stop,
                None,  # error
                0,  # num_cached_tokens
                None,  # receipt
                prompt,
            ),
        )

    def ending(self, sequence: Sequence, reason: FinishReason, now_s: float, error: Exception | None = None) -> Delta:
        """The last delta of a sequence that no token ends: aborted or failed. Text held back is dropped."""
        sequence.marks = replace(sequence.marks, finished_s=now_s)
        request = sequence.request
        return Delta(request.request_id, sequence.choice, (), "", sequence.marks, finish_reason=reason, error=error)


def check_answers(steps: Ordered[SequenceStep], result: StepResult) -> None:
    """An executor answers each sequence that asked, by number and in order, with a sample or a failure, which those may
    have too that did not ask: our own mistake otherwise."""
    failed = {failure.seq_id for failure in result.failures} if result.failures else frozenset[int]()
    samples = result.samples
    count = 0
    for step in steps:
        if step.sample and step.seq_id not in failed:
            assert count < len(samples), "the executor's answers do not fit"
            assert samples[count].seq_id == step.seq_id, "the executor's answers do not fit"
            count += 1
    assert count == len(samples), "the executor's answers do not fit"
    if failed:
        assert failed <= {step.seq_id for step in steps}, "the executor failed a row that was not there"
