"""Runs step plans: batch, forward, sample. Owns the order of these three, no decisions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from pagemill.base.blame import blamed, failure_of
from pagemill.base.kv_spec import KVSpec
from pagemill.base.params import SamplingParams
from pagemill.base.step import Sample, SampleFailure, SequenceStep, StepPlan, StepResult
from pagemill.base.transfer import NO_MOVES
from pagemill.decoding.adjust import LogitAdjuster
from pagemill.decoding.grammar import GrammarCompiler
from pagemill.decoding.prompt_logprobs import PromptReports, pieces
from pagemill.decoding.step_sampler import BatchSampler, SpecificationSampler, StepSampler
from pagemill.execution.batch import BatchBuilder
from pagemill.kernels.batch import ModelExecutor
from pagemill.kernels.native import NativeExecutor

_LOG: Final = logging.getLogger(__name__)
_NEW = tuple.__new__  # of a named tuple, without the Python function that fills in its defaults


class Runner:
    """The executor of an engine (base.step.Executor) around a model executor, native or reference.

    weights_id: names the weights, number for number, the same after a restart; part of what makes two blocks the same.
    on_stage: called at the end of "batch", "native" and "sampling" with that name, for profiles; None costs nothing.
    """

    def __init__(self, model: ModelExecutor, weights_id: str = "") -> None:
        self.model = model
        self.weights_id = weights_id
        self.on_stage: Callable[[str], None] | None = None
        self._batches = BatchBuilder(model.kv_spec.block_size, len(model.kv_spec.window_pages))
        self._adjuster = LogitAdjuster()
        self._prompts = PromptReports()
        self._sampler: StepSampler = (
            BatchSampler(model.sampler(), self._adjuster)
            if isinstance(model, NativeExecutor)
            else SpecificationSampler(self._adjuster)
        )

    def use_grammars(self, grammars: GrammarCompiler) -> None:
        """Let requests bring grammars, which this compiler knows."""
        self._adjuster.grammars = grammars

    @property
    def kv_spec(self) -> KVSpec:
        """Geometry of the blocks that the plans' tables name."""
        return self.model.kv_spec

    def resize(self, num_blocks: int) -> None:
        """Have so many blocks from now on; the first ones keep their contents."""
        self.model.resize(num_blocks)

    def run(self, plan: StepPlan) -> StepResult:
        """Make the plan's moves, compute its tokens, then choose the next token of each sequence that samples.

        Where an error comes of work for one sequence, that one fails and the others are computed once more: to the same
        numbers, for what a step computes and chooses depends on its text and its seed alone. Memory that runs out and
        what concerns all of them is raised.
        """
        moves, sequences = plan.moves, plan.sequences
        if moves is not NO_MOVES and moves:
            self.model.move(moves)
        failures: tuple[SampleFailure, ...] = ()
        while True:
            try:
                result = self._run_all(sequences)
            except MemoryError:
                raise
            except Exception as error:
                failed = _row_of(error, sequences)
                if failed is None:
                    raise
                failures += (failure_of(failed.seq_id, error, _LOG),)
                sequences = tuple(each for each in sequences if each.seq_id != failed.seq_id)
                continue
            return result if not failures else StepResult(result.samples, (*result.failures, *failures))

    def _run_all(self, sequences: tuple[SequenceStep, ...]) -> StepResult:
        if not sequences:
            return StepResult(())
        for sequence in sequences:
            if sequence.params.prompt_logprobs is not None:
                return self._run_reporting(sequences)
        return self._run_rows(sequences)

    def _run_reporting(self, sequences: tuple[SequenceStep, ...]) -> StepResult:
        """The same in rounds, with the log-probabilities of prompts."""
        *first, last = pieces(sequences)
        for rows in first:
            self._run_rows(rows)
        result = self._run_rows(last)
        samples: list[Sample] = []
        failures = list(result.failures)
        for sample in result.samples:
            try:
                found = self._prompts.finish(sample.seq_id)
            except MemoryError:
                raise
            except Exception as error:  # what others had is gone from there, so that nothing can be done again
                failures.append(failure_of(sample.seq_id, error, _LOG))
                continue
            samples.append(sample._replace(prompt=found) if found else sample)
        return StepResult(tuple(samples), tuple(failures))

    def _run_rows(self, sequences: tuple[SequenceStep, ...]) -> StepResult:
        on_stage = self.on_stage
        batch = self._batches.build(sequences)
        rows: Sequence[SequenceStep] = sequences
        for sequence in sequences:
            if not sequence.sample:
                rows = [s for s in sequences if s.sample]
                break
        best_only = len(batch.logit_rows) == len(rows) > 0 and self._sampler.takes_largest(rows)
        if on_stage is not None:
            on_stage("batch")
        logits, best = self.model.forward_best(batch, best_only)
        if on_stage is not None:
            on_stage("native")
        if len(best) > len(rows):
            self._prompts.take(sequences, logits[len(rows) :], best[len(rows) :])
            logits, best = logits[: len(rows)], best[: len(rows)]
        result = _NEW(StepResult, self._sampler.choose(rows, logits, best)) if rows else StepResult(())
        if on_stage is not None:
            on_stage("sampling")
        return result


def _row_of(error: Exception, sequences: Sequence[SequenceStep]) -> SequenceStep | None:
    """For which of the rows the work was that failed; None where for none alone."""
    known = {each.seq_id: each for each in sequences}

    def whose(name: str, value: object) -> SequenceStep | None:
        if isinstance(value, SequenceStep | Sample | SampleFailure):
            return known.get(value.seq_id)
        if isinstance(value, SamplingParams):
            owners = [each for each in sequences if each.params is value]
            return owners[0] if len(owners) == 1 else None  # several may share theirs
        return known.get(value) if name == "seq_id" and isinstance(value, int) else None

    return blamed(error, whose)
