"""S8: after a text has gone, no bytes of its keys and values are left anywhere in the process.

    python -m tests.trust.residue MODEL CASE CODEC

runs one case in a process of its own and prints its counts as JSON. Needles are taken from the canary's pages as they
lie there, and, where keys are stored as 32-bit floats, as a row of activations would hold them. Before the wipe all of
them must be found (the control); afterwards none may be, in pages, scratch memory, staging or freed memory. Prompt
texts and token ids are out of scope: their owner is the caller.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import numpy as np

from pagemill import LLM, CacheOptions, SamplingParams
from pagemill.base.kv_spec import PAGE_POSITIONS, KVSpec
from pagemill.engine.output import Delta
from tests.trust.figures import Figure
from tests.trust.memory import NEEDLE_BYTES, Bytes, Scanner, masked

CANARY = [249, *((37 * i * i + 11 * i + 5) % 250 for i in range(74))]
OPTIONS = CacheOptions("canary")
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
NUM_BLOCKS = 40
PER_HEAD = 4


def needles_of(block: Bytes, spec: KVSpec) -> tuple[set[bytes], set[bytes]]:
    """Runs of 16 masked bytes of one block: as each head's first page holds them, and, of 32-bit floats, as a row of
    activations would. Layer 0 is left out: there a token's values are the same in every text."""
    stored: set[bytes] = set()
    rows: set[bytes] = set()
    for layer, each in enumerate(spec.layers[1:], 1):
        page, offset = spec.page_bytes(layer), spec.layer_offset(layer)
        for head in range(each.num_kv_heads):
            start = offset + head * spec.pages_per_block * page
            data = masked(block[start : start + page])
            for at in range(64, page - NEEDLE_BYTES, page // (2 * PER_HEAD) // 4 * 4):
                stored.add(data[at : at + NEEDLE_BYTES].tobytes())
            if spec.codec == "f32":  # a key by dimension; the value of position 0 is its attention's output as well
                keys, first = data[: page // 2].view(np.uint32).reshape(-1, PAGE_POSITIONS), page // 2
                for dim in range(0, each.head_dim - 3, 4):
                    rows |= {keys[dim : dim + 4, at].tobytes() for at in (0, 3, 15)}
                    rows.add(data[first + 4 * dim : first + 4 * dim + NEEDLE_BYTES].tobytes())
    return {each for each in stored if len(set(each)) > 4}, {each for each in rows if len(set(each)) > 4}


def blocks_of(llm: LLM) -> list[int]:
    """Blocks whose pages hold anything."""
    pages = llm.built.executor.model._pages._blocks  # type: ignore[attr-defined]
    return [index for index in range(len(pages)) if pages[index].any()]


class Case:
    """A canary's way through the cache and out of it. Mutated by `run`."""

    def __init__(self, model: str, codec: str) -> None:
        size = LLM(model, kv_cache_dtype=codec, packed_weights_cache="off", kv_cache_memory_bytes="1MiB")
        block_bytes = size.built.kv_spec.block_bytes
        size.close()
        self.llm = LLM(
            model,
            kv_cache_dtype=codec,
            packed_weights_cache="off",
            kv_cache_memory_bytes=str(NUM_BLOCKS * block_bytes),
            max_model_len=300,
        )
        self.scanner = Scanner()
        self.block_bytes = block_bytes
        self.needles: set[bytes] = set()
        self.num_missing = 0
        self.answer: list[int] = []
        self.stream: Generator[Delta] | None = None

    def generate(self, options: CacheOptions) -> None:
        """The canary's text, read in one step behind another tenant's, so that it is not the first to have rows."""
        engine, tokens = self.llm.built.engine, []
        engine.add_request("beside", [9] * 20, PARAMS, cache=CacheOptions("beside", bypass=True))
        engine.add_request("canary", CANARY, PARAMS, cache=options)
        while engine.has_unfinished:
            tokens += [token for each in engine.step() if each.request_id == "canary" for token in each.token_ids]
        self.answer = tokens

    def mark(self) -> None:
        """Take needles from what is in the cache now, and look for them: the control."""
        spec, pages = self.llm.built.kv_spec, self.llm.built.executor.model._pages._blocks  # type: ignore[attr-defined]
        found = [needles_of(pages[block], spec) for block in blocks_of(self.llm)[:-1]]  # the last is not full
        stored = set().union(*(each[0] for each in found))
        self.needles = stored.union(*(each[1] for each in found))
        seen = {needle for needle, _ in self.scanner.scan(self.needles).values()}
        self.num_missing = len(stored - seen)

    def flood(self) -> None:
        """Other tenants' texts, more than the cache holds."""
        for seed in range(12):
            tokens = [(seed * 29 + 13 * i * i + i) % 240 for i in range(90)]
            params = replace(PARAMS, max_tokens=1)
            self.llm.generate({"prompt_token_ids": tokens}, params, cache=CacheOptions(f"other {seed}"))

    def run(self, case: str) -> dict[str, object]:
        """The case's name says how the text goes."""
        if case == "aborted":
            stream = self.llm.stream({"prompt_token_ids": CANARY}, PARAMS, cache=replace(OPTIONS, bypass=True))
            next(stream)
            self.mark()
            stream.close()
        else:
            self.generate(replace(OPTIONS, salt="s") if case == "namespace" else OPTIONS)
            self.mark()
            WAYS[case](self)
        left = self.scanner.scan(self.needles)
        return {
            "needles": len(self.needles),
            "missing_before": self.num_missing,
            "left": len(left),
            "where": sorted({name for _, name in left.values()}),
            "bytes": self.scanner.num_bytes,
        }


def _purge_resized(case: Case) -> None:
    case.llm.resize_kv_cache(2 * NUM_BLOCKS * case.block_bytes)
    case.llm.resize_kv_cache(20 * case.block_bytes)
    case.llm.cache.purge_tenant("canary")


def _purge_busy(case: Case) -> None:
    """While another tenant's request runs; looked for before that ends."""
    case.stream = case.llm.stream({"prompt_token_ids": [9] * 30}, PARAMS, tenant="other")
    next(case.stream)
    case.llm.cache.purge_tenant("canary")


def _purge_text(case: Case) -> None:
    ids = CANARY + case.answer
    case.llm.cache.purge({"prompt_token_ids": ids}, OPTIONS)


WAYS: dict[str, Callable[[Case], object]] = {
    "text": _purge_text,
    "prefix": lambda case: case.llm.cache.purge_prefix({"prompt_token_ids": CANARY[:10]}, OPTIONS),
    "namespace": lambda case: case.llm.cache.purge_namespace(replace(OPTIONS, salt="s")),
    "tenant": lambda case: case.llm.cache.purge_tenant("canary"),
    "evicted": Case.flood,
    "resized": _purge_resized,
    "busy": _purge_busy,
    "closed": lambda case: case.llm.close(),
}
CASES = ("aborted", *WAYS)


def count(model: str, cases: Sequence[tuple[str, str]]) -> Figure:
    """Cases (how the text goes, codec), each in a process of its own. A control that fails counts as a failure."""
    replays, num_needles, num_bytes = [], 0, 0
    for case, codec in cases:
        arguments = [sys.executable, "-m", "tests.trust.residue", model, case, codec]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
        told = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-300:]}
        if "error" in told or told["left"] or told["missing_before"] or not told["needles"]:
            replays.append(f"python -m tests.trust.residue MODEL {case} {codec}  # {told}")
        num_needles += told.get("needles", 0)
        num_bytes += told.get("bytes", 0)
    also = {"needles, all of them found before": num_needles, "MB searched": num_bytes // 10**6}
    return Figure("S8", "residues of keys and values", len(replays), len(cases), "ways to go", also, replays)


def main() -> None:
    """One case."""
    model, case, codec = sys.argv[1:]
    print(json.dumps(Case(model, codec).run(case)))


if __name__ == "__main__":
    main()
