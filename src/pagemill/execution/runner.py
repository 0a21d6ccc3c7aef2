"""Runs step plans: batch, forward, sample. Owns the order of these three and the timing of each, no decisions."""

from __future__ import annotations

from pagemill.base.kv_spec import KVSpec
from pagemill.base.step import Sample, SampleFailure, SequenceStep, StepPlan, StepResult
from pagemill.decoding.sampling import SamplingRow, sample
from pagemill.execution.batch import BatchBuilder
from pagemill.kernels.batch import ModelExecutor


class Runner:
    """The executor of an engine (base.step.Executor) around a model executor, native or reference."""

    def __init__(self, model: ModelExecutor) -> None:
        self.model = model
        self._batches = BatchBuilder(model.kv_spec.block_size)

    @property
    def kv_spec(self) -> KVSpec:
        """Geometry of the blocks that the plans' tables name."""
        return self.model.kv_spec

    def run(self, plan: StepPlan) -> StepResult:
        """Compute every token of the plan, then choose the next token of each sequence that samples."""
        logits, best = self.model.forward_best(self._batches.build(plan))
        chosen = sample(logits, [_row(s) for s in plan.sequences if s.sample], best.tolist())
        samples = tuple(s for s in chosen if isinstance(s, Sample))
        failures = tuple(s for s in chosen if isinstance(s, SampleFailure))
        return StepResult(samples, failures)


def _row(step: SequenceStep) -> SamplingRow:
    return SamplingRow(
        seq_id=step.seq_id,
        params=step.params,
        seed=step.seed,
        choice=step.choice,
        position=step.end,
        forbid=step.forbid,
    )
