"""Samples the rows of a step: natively, or row by row as the specification has it. Owns the way from sequences to
requests and from chosen ids to samples; what is chosen, and how, is `sampling.py`'s.

Log-probabilities are those of the logits as computed. Rows whose logits are adjusted are therefore chosen from the
adjusted logits without a report, and a second native call reports all of them from what was kept before.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import inf
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pagemill.base.step import Sample, SampleFailure, SequenceStep, TokenLogprob
from pagemill.decoding.adjust import Adjusted, LogitAdjuster
from pagemill.decoding.sampling import NOT_A_NUMBER, NOTHING_LEFT, SamplingRow, report, report_token, sample
from pagemill.kernels.sampling import CHOSEN, ROW_DTYPE, Choices, NativeSampler
from pagemill.kernels.sampling import NOT_A_NUMBER as STATUS_NOT_A_NUMBER

Samples = tuple[Sample, ...]
Failures = tuple[SampleFailure, ...]
Report = tuple[TokenLogprob, tuple[TokenLogprob, ...]]  # of the chosen token, and of the most likely ones

_ROW = struct.Struct("=dddQQQii")
assert _ROW.size == ROW_DTYPE.itemsize
_NEVER = -inf
_NEW = tuple.__new__  # of a named tuple, without the Python function that fills in its defaults


class StepSampler(Protocol):
    """Chooses the next token of each sequence that samples."""

    def takes_largest(self, rows: Sequence[SequenceStep]) -> bool:
        """Whether `choose` will look at no logits of these rows but each one's largest."""
        ...

    def choose(
        self, rows: Sequence[SequenceStep], logits: NDArray[np.float32], best: NDArray[np.int32]
    ) -> tuple[Samples, Failures]:
        """One sample or one failure for each row, each in the order of rows.

        logits: [rows, vocab] f32, may be changed. best: [rows] i32, the first largest logit of each row, or its first
        NaN, may be changed.
        """
        ...


class SpecificationSampler:
    """The specification itself, row by row: for executors without native logits, and for tests. Mutated by `choose`
    (how far texts have come in their grammars)."""

    def __init__(self, adjuster: LogitAdjuster | None = None) -> None:
        self._adjuster = adjuster or LogitAdjuster()

    def takes_largest(self, rows: Sequence[SequenceStep]) -> bool:
        return False  # all of them are there anyway

    def choose(
        self, rows: Sequence[SequenceStep], logits: NDArray[np.float32], best: NDArray[np.int32]
    ) -> tuple[Samples, Failures]:
        requests = [SamplingRow(s.seq_id, s.params, s.seed, s.choice, s.end, s.forbid) for s in rows]
        which = [index for index, each in enumerate(rows) if each.params.adjusts_logits]
        adjusted = None
        if which:
            logits, best = logits.copy(), best.copy()
            adjusted = self._adjuster.adjust(rows, which, logits, best)
        chosen = sample(logits, requests, best.tolist())
        samples = tuple(s for s in chosen if isinstance(s, Sample))
        failures = tuple(s for s in chosen if isinstance(s, SampleFailure))
        if adjusted is None:
            return samples, failures
        counts = {each.seq_id: each.params.logprobs or 0 for each in rows}
        raw = {rows[index].seq_id: row for index, row in zip(adjusted.reported, adjusted.raw, strict=True)}
        samples = tuple(
            report(raw[s.seq_id], s.seq_id, s.token_id, counts[s.seq_id]) if s.seq_id in raw else s for s in samples
        )
        return samples, _explained(adjusted, failures)


class BatchSampler:
    """All rows in one native call, and one more for the log-probabilities of rows whose logits are adjusted. Mutated by
    `choose`: requests are kept while the same sequences follow each other.

    A sequence's parameters, seed and choice never change, so that its number stands for them.
    """

    def __init__(self, native: NativeSampler, adjuster: LogitAdjuster | None = None) -> None:
        self._native = native
        self._adjuster = adjuster or LogitAdjuster()
        self._seq_ids: list[int] = []
        self._which: list[int] = []  # rows whose logits are adjusted
        self._packed: dict[int, bytes] = {}
        self._requests = np.zeros(0, ROW_DTYPE)
        self._most_logprobs = -1
        self._plain = False  # all rows take their largest logit and report nothing
        self._logits, self._best = np.empty((0, 0), np.float32), np.empty(0, np.int32)  # executors reuse their arrays
        self._values, self._ids = self._logits.data, self._best.data

    def takes_largest(self, rows: Sequence[SequenceStep]) -> bool:
        seq_ids = self._seq_ids
        same = len(rows) == len(seq_ids)
        if same:
            for row, step in enumerate(rows):
                if step.seq_id != seq_ids[row]:
                    same = False
                    break
        if not same:
            self._remember(rows)
        return self._plain and not any(step.forbid for step in rows)

    def choose(
        self, rows: Sequence[SequenceStep], logits: NDArray[np.float32], best: NDArray[np.int32]
    ) -> tuple[Samples, Failures]:
        if self.takes_largest(rows):
            samples = self._largest(logits, best)
            if samples is not None:
                return samples, ()
        seq_ids = self._seq_ids
        requests = self._requests
        requests["position"] = [s.start + len(s.token_ids) for s in rows]
        adjusted = self._adjuster.adjust(rows, self._which, logits, best) if self._which else None
        choices = self._native.sample(logits, best, requests, _forbidden(rows), self._most_logprobs)
        failures: Failures = ()
        if choices.reports is None and not choices.status.any():
            samples = tuple(map(Sample, seq_ids, choices.tokens.tolist()))
        else:
            samples, failures = _read(rows, requests, choices, logits.shape[1])
        if adjusted is None:
            return samples, failures
        if adjusted.reported:
            samples = self._report_raw(rows, adjusted, samples)
        return samples, _explained(adjusted, failures)

    def _report_raw(self, rows: Sequence[SequenceStep], adjusted: Adjusted, samples: Samples) -> Samples:
        """The samples, those of adjusted rows with the log-probabilities of their logits as computed."""
        requests = np.zeros(len(adjusted.reported), ROW_DTYPE)  # no temperature: each takes its largest logit
        requests["top_p"] = 1.0
        requests["logprobs"] = [rows[index].params.logprobs for index in adjusted.reported]
        most = int(requests["logprobs"].max())
        choices = self._native.sample(adjusted.raw, adjusted.best, requests, most_logprobs=most)
        reports = _reports(requests, choices, adjusted.raw.shape[1])
        told = {
            rows[index].seq_id: (row, found)
            for index, row, found in zip(adjusted.reported, adjusted.raw, reports, strict=True)
        }
        return tuple(_with_report(each, *told[each.seq_id]) if each.seq_id in told else each for each in samples)

    def _largest(self, logits: NDArray[np.float32], best: NDArray[np.int32]) -> Samples | None:
        """The largest logit of each row remembered, which is known already; None where one is NaN or -inf.

        One plain loop over memory views: in caches that the step has emptied, each other way of calling (numpy, `zip`
        with its keyword) takes longer for a row than the row itself.
        """
        if logits is not self._logits or best is not self._best:
            self._logits, self._values = logits, logits.data
            self._best, self._ids = best, best.data
        values, ids = self._values, self._ids
        samples: list[Sample] = []
        for row, seq_id in enumerate(self._seq_ids):
            token = ids[row]
            if not values[row, token] > _NEVER:  # NaN is not, either
                return None
            samples.append(_NEW(Sample, (seq_id, token, None, (), ())))
        return tuple(samples)

    def _remember(self, rows: Sequence[SequenceStep]) -> None:
        known, seq_ids = self._packed, [s.seq_id for s in rows]
        self._packed = packed = {s.seq_id: known.get(s.seq_id) or _pack(s) for s in rows}
        self._requests = np.frombuffer(bytearray().join(map(packed.__getitem__, seq_ids)), ROW_DTYPE)
        self._most_logprobs = int(self._requests["logprobs"].max(initial=-1))
        self._seq_ids = seq_ids
        self._which = [index for index, each in enumerate(rows) if each.params.adjusts_logits]
        self._plain = not self._which and self._most_logprobs < 0 and all(each.params.greedy for each in rows)


def _with_report(sample: Sample, row: NDArray[np.float32], told: Report | None) -> Sample:
    """row: [vocab] f32, the logits as computed. told: of their largest, which says how likely the chosen one is."""
    assert told is not None, "a row without the report it asked for"
    largest, top = told
    if sample.token_id == largest.token_id:
        return Sample(sample.seq_id, sample.token_id, largest, top)
    chosen = report_token(row, sample.token_id, float(row[largest.token_id]), -largest.logprob)
    return Sample(sample.seq_id, sample.token_id, chosen, top)


def _explained(adjusted: Adjusted, failures: Failures) -> Failures:
    """The failures, with why nothing was left where the adjuster knows."""
    if not adjusted.failed:
        return failures
    known = {each.seq_id: each for each in adjusted.failed}
    return tuple(known.get(each.seq_id, each) for each in failures)


def _pack(step: SequenceStep) -> bytes:
    """A row of ROW_DTYPE. Adjusted rows ask for no log-probabilities here: theirs are not of the logits sampled."""
    p = step.params
    logprobs = -1 if p.logprobs is None or p.adjusts_logits else p.logprobs
    top_k = min(max(p.top_k, 0), 2**31 - 1)
    return _ROW.pack(p.temperature, p.top_p, p.min_p, step.seed, step.choice, 0, top_k, logprobs)


def _forbidden(rows: Sequence[SequenceStep]) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    forbidden = [s.forbid for s in rows]
    if not any(forbidden):
        return None
    starts = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(ids) for ids in forbidden], out=starts[1:])
    beyond = 2**31 - 1
    return starts, np.array([token if 0 <= token < beyond else -1 for ids in forbidden for token in ids], np.int32)


def _read(
    rows: Sequence[SequenceStep], requests: NDArray[np.void], choices: Choices, vocab_size: int
) -> tuple[Samples, Failures]:
    """Samples with their log-probabilities, and the rows that failed."""
    samples: list[Sample] = []
    failures: list[SampleFailure] = []
    tokens, statuses = choices.tokens.tolist(), choices.status.tolist()
    for step, token, status, told in zip(rows, tokens, statuses, _reports(requests, choices, vocab_size), strict=True):
        if status != CHOSEN:
            reason = NOT_A_NUMBER.format(token=token) if status == STATUS_NOT_A_NUMBER else NOTHING_LEFT
            failures.append(SampleFailure(step.seq_id, reason))
        elif told is None:
            samples.append(Sample(step.seq_id, token))
        else:
            samples.append(Sample(step.seq_id, token, *told))
    return tuple(samples), tuple(failures)


def _reports(requests: NDArray[np.void], choices: Choices, vocab_size: int) -> list[Report | None]:
    """Log-probabilities of each row, None where none were wanted; of a row that failed they mean nothing."""
    found = choices.reports
    reports: list[Report | None] = [None] * len(requests)
    if found is None:
        return reports
    counts = np.minimum(requests["logprobs"], vocab_size).tolist()
    columns = (found.logprobs, found.ranks, found.top_ids, found.top_logprobs)
    for i, (token, count, logprob, rank, ids, values) in enumerate(
        zip(choices.tokens.tolist(), counts, *(column.tolist() for column in columns), strict=True)
    ):
        if count >= 0:
            reports[i] = (
                TokenLogprob(token, logprob, rank),
                tuple(map(TokenLogprob, ids[:count], values, range(1, count + 1))),
            )
    return reports
