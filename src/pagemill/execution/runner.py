"""Runs step plans: batch, forward, sample. Owns the order of these three, no decisions."""

from __future__ import annotations

from collections.abc import Callable

from pagemill.base.kv_spec import KVSpec
from pagemill.base.step import StepPlan, StepResult
from pagemill.decoding.step_sampler import BatchSampler, SpecificationSampler, StepSampler
from pagemill.execution.batch import BatchBuilder
from pagemill.kernels.batch import ModelExecutor
from pagemill.kernels.native import NativeExecutor


class Runner:
    """The executor of an engine (base.step.Executor) around a model executor, native or reference.

    on_stage: called at the end of "batch", "native" and "sampling" with that name, for profiles; None costs nothing.
    """

    def __init__(self, model: ModelExecutor) -> None:
        self.model = model
        self.on_stage: Callable[[str], None] | None = None
        self._batches = BatchBuilder(model.kv_spec.block_size)
        self._sampler: StepSampler = (
            BatchSampler(model.sampler()) if isinstance(model, NativeExecutor) else SpecificationSampler()
        )

    @property
    def kv_spec(self) -> KVSpec:
        """Geometry of the blocks that the plans' tables name."""
        return self.model.kv_spec

    def resize(self, num_blocks: int) -> None:
        """Have so many blocks from now on; the first ones keep their contents."""
        self.model.resize(num_blocks)

    def run(self, plan: StepPlan) -> StepResult:
        """Make the plan's moves, compute its tokens, then choose the next token of each sequence that samples."""
        if plan.moves:
            self.model.move(plan.moves)
        if not plan.sequences:
            return StepResult(())
        on_stage = self.on_stage
        batch = self._batches.build(plan)
        if on_stage is not None:
            on_stage("batch")
        logits, best = self.model.forward_best(batch)
        if on_stage is not None:
            on_stage("native")
        rows = [s for s in plan.sequences if s.sample]
        result = StepResult(*self._sampler.choose(rows, logits, best)) if rows else StepResult(())
        if on_stage is not None:
            on_stage("sampling")
        return result
