"""S8: after a text has gone, no bytes of its keys and values are left anywhere in the process.

    python -m tests.trust.residue MODEL CASE CODEC

runs one case in a process of its own and prints its counts as JSON. Needles are taken from the canary's pages as they
lie there, of all layers and of those that read a window, and from the rows of 32-bit floats that its steps left in
scratch memory, whatever the codec. Before the text goes all of them must be found (the control); afterwards none may
be, in pages, scratch memory, staging or freed memory. Prompt texts and token ids are out of scope: their owner is the
caller. So are logits, which are the last step's answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagemill import LLM, CacheOptions, SamplingParams
from pagemill.base.kv_spec import KVGroup
from pagemill.base.params import Retain
from pagemill.engine.output import Delta
from pagemill.engine.request import Sequence as Running
from pagemill.server.endings import _purge, _Text
from tests.fixtures.tiny import llama_weights, mistral_config, qwen2_config, write_hf
from tests.trust.figures import Figure
from tests.trust.memory import NEEDLE_BYTES, Bytes, Scanner, masked

CANARY = [249, *((37 * i * i + 11 * i + 5) % 250 for i in range(74))]
OPTIONS = CacheOptions("canary")
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
BESIDE = [251] * 20  # in no other text
NUM_BLOCKS = 40
PER_HEAD = 4
NUM_ROWS = 300  # needles of scratch memory, at most
LEASE_S = 0.8
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": mistral_config(window=40),
    "qwen2": qwen2_config(window=40, first=2, layers=4),
}
TWO_THREADS = "two threads"
LEAST_PAGED, LEAST_ROWS = 10, 50  # needles of a case


def needles_of(block: Bytes, group: KVGroup) -> set[bytes]:
    """Runs of 16 masked bytes of one block of a group, as each head's first page holds them. Layer 0 is left out: there
    a token's values are the same in every text."""
    found: set[bytes] = set()
    spec = group.spec
    for layer, each in enumerate(spec.layers):
        if group.layers[layer] == 0:
            continue
        page, offset = spec.page_bytes(layer), spec.layer_offset(layer)
        for head in range(each.num_kv_heads):
            start = offset + head * spec.pages_per_block * page
            data = masked(block[start : start + page])
            for at in range(64, page - NEEDLE_BYTES, page // (2 * PER_HEAD) // 4 * 4):
                found.add(data[at : at + NEEDLE_BYTES].tobytes())
    return {each for each in found if is_telling(each)}


def is_telling(needle: bytes) -> bool:
    """False for runs that stand anywhere, such as zeros."""
    return len(set(needle)) > 4


def runs_of(*pages: Bytes) -> set[bytes]:
    """All runs of 16 bytes at multiples of 4, masked, of pages that hold anything."""
    found: set[bytes] = set()
    for each in pages:
        data = masked(each).tobytes() if each.any() else b""
        found |= {data[at : at + NEEDLE_BYTES] for at in range(0, len(data) - NEEDLE_BYTES, 4)}
    return found


def checkpoint_of(model: str, setting: str) -> str:
    """A checkpoint of the setting's family, beside that of the model (a llama)."""
    if setting not in CONFIGS:
        return model
    path = Path(model).parent / f"residue-{setting}"
    config = CONFIGS[setting]
    return str(path if path.exists() else write_hf(path, config, llama_weights(config, 5)))


class Case:
    """A canary's way through the cache and out of it. Mutated by `run`. setting: a family with windows, TWO_THREADS or
    nothing."""

    def __init__(self, model: str, codec: str, setting: str = "") -> None:
        model = checkpoint_of(model, setting)
        fixed: dict[str, Any] = {"kv_cache_dtype": codec, "packed_weights_cache": "off", "max_model_len": 300}
        if setting == TWO_THREADS:
            fixed["num_threads"] = 2
        size = LLM(model, kv_cache_memory_bytes="2MiB", **fixed)
        block_bytes = size.built.kv_spec.block_bytes
        size.close()
        self.llm = LLM(model, kv_cache_memory_bytes=str(NUM_BLOCKS * block_bytes), **fixed)
        self.scanner = Scanner()
        self.block_bytes = block_bytes
        self.needles: set[bytes] = set()
        self.num_missing = self.num_rows = self.num_paged = 0
        self.answer: list[int] = []
        self.stream: Generator[Delta] | None = None
        self.llm.generate({"prompt_token_ids": [9] * 20}, PARAMS, cache=CacheOptions("first", bypass=True))
        self.before = self.scanner.copies()

    def _pages(self, blocks: Sequence[int]) -> list[tuple[Bytes, KVGroup]]:
        """Views of what these blocks have in each group, u8 [bytes of a page], with the group."""
        model: Any = self.llm.built.executor.model
        shared = self.llm.built.engine.cache.shared
        assert shared is not None
        found = [(model._pages._blocks[block], model._groups[0]) for block in blocks]
        windows = shared.windows.groups if shared.windows is not None else ()
        for window, pages, group in zip(windows, model._window_pages, model._groups[1:], strict=True):
            found += [(pages._blocks[window.pages[block]], group) for block in blocks if block in window.pages]
        return found

    def blocks(self) -> list[int]:
        """Of the canary, which runs."""
        engine = self.llm.built.engine
        running = [each for every in engine._unfinished.values() for each in every]
        [sequence] = [each for each in running if list(each.tokens[: len(CANARY)]) == CANARY]
        return list(engine.cache.block_table(sequence.seq_id))

    def generate(self, options: CacheOptions) -> list[int]:
        """The canary's text, read in one step behind another tenant's, so that it is not the first to have rows. That
        tenant's text stays, so that nothing is wiped before the canary goes. Returns the canary's blocks."""
        engine, tokens, blocks = self.llm.built.engine, [], []
        engine.add_request("beside", BESIDE, PARAMS, cache=CacheOptions("beside"))
        engine.add_request("canary", CANARY, PARAMS, cache=options)
        while engine.has_unfinished:
            tokens += [token for each in engine.step() if each.request_id == "canary" for token in each.token_ids]
            if engine.has_unfinished:
                blocks = self.blocks()
        self.answer = tokens
        return blocks

    def mark(self, blocks: Sequence[int]) -> None:
        """Take needles from these blocks and from what lies in scratch memory since the beginning, and look for them:
        the control."""
        others = [each for each in range(self.llm.built.engine.cache.num_blocks) if each not in set(blocks)]
        for page, group in self._pages(blocks[:-1]):  # the last is not full
            self.needles |= needles_of(page, group)
        self.num_paged = len(self.needles)
        model: Any = self.llm.built.executor.model
        arenas = [model._pages._blocks, *(each._blocks for each in model._window_pages)]
        lines = self.scanner.lines_since(self.before, [model._logits, *arenas])
        self.before = []
        stay = runs_of(*(page for page, _ in self._pages(others)))  # 32-bit floats of the one beside
        rows = [each for each in lines if is_telling(each) and each not in stay]
        self.needles |= set(rows[:: -(-len(rows) // NUM_ROWS)] if rows else [])
        first = self.scanner.scan(self.needles).values()
        moving = set(rows) - {needle for needle, _ in first}  # what has gone by itself was no scratch memory
        self.needles -= moving
        self.num_rows = len(self.needles) - self.num_paged
        seen = {needle for needle, _ in self.scanner.scan(self.needles).values()}
        self.num_missing = len(self.needles - seen)

    def flood(self) -> None:
        """Other tenants' texts, more than the cache holds."""
        for seed in range(12):
            tokens = [(seed * 29 + 13 * i * i + i) % 240 for i in range(90)]
            params = replace(PARAMS, max_tokens=1)
            self.llm.generate({"prompt_token_ids": tokens}, params, cache=CacheOptions(f"other {seed}"))

    def run(self, way: str) -> dict[str, object]:
        """The way's name says how the text goes."""
        if way in RUNNING:
            RUNNING[way](self)
        else:
            self.mark(self.generate(OF_WAY.get(way, OPTIONS)))
            WAYS[way](self)
        left = self.scanner.scan(self.needles)
        return {
            "paged": self.num_paged,
            "rows": self.num_rows,
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


def _purge_on_end(case: Case) -> None:
    """What the server does where a request asked for that."""
    _purge(case.llm.built.engine, [_Text(array("i", CANARY + case.answer), OF_WAY["purge on end"], whole=True)])


def _let_lease_end(case: Case) -> None:
    """A pin, and a range that is kept longer than others; the flood finds them ended."""
    case.llm.cache.pin({"prompt_token_ids": CANARY}, LEASE_S, OF_WAY["lease"])
    case.flood()
    kept = {needle for needle, _ in case.scanner.scan(case.needles).values()}
    case.num_missing += not kept  # held by the pin alone
    time.sleep(LEASE_S)
    case.flood()


def _abort(case: Case) -> None:
    stream = case.llm.stream({"prompt_token_ids": CANARY}, PARAMS, cache=replace(OPTIONS, bypass=True))
    next(stream)
    case.mark(case.blocks())
    stream.close()


def _enter(case: Case, options: CacheOptions) -> Running:
    """The canary's request, read and with a first token. Returns its sequence, which runs."""
    engine = case.llm.built.engine
    engine.add_request("canary", CANARY, replace(PARAMS, max_tokens=200), cache=options)
    while not any(each.request_id == "canary" for each in engine.step()):
        pass
    [sequence] = engine._unfinished["canary"]
    return sequence


def _preempt(case: Case) -> None:
    """Those that entered before it grow until it gives way and nothing that it left has room."""
    engine = case.llm.built.engine
    for number in range(engine.cache.num_blocks // 19 + 1):
        old = CacheOptions(OPTIONS.tenant, bypass=True)
        engine.add_request(f"old {number}", [7 + number] * 30, replace(PARAMS, max_tokens=260), cache=old)
    engine.step()
    sequence = _enter(case, OPTIONS)
    case.mark(case.blocks())
    while engine.stats().cache.num_cached_blocks or sequence.seq_id in engine.cache._sequences:
        engine.step()
    assert sequence.num_preemptions
    engine.settle()


def _roll_back(case: Case) -> None:
    """To its first block, as the scheduler has a running sequence give way in part."""
    engine = case.llm.built.engine
    sequence = _enter(case, replace(OPTIONS, bypass=True))
    case.mark(case.blocks()[1:])
    engine.cache.resize(sequence.seq_id, case.llm.built.kv_spec.block_size)
    engine.settle()


# How a text goes that has been read to its end, and one that still runs.
WAYS: dict[str, Callable[[Case], object]] = {
    "text": _purge_text,
    "prefix": lambda case: case.llm.cache.purge_prefix({"prompt_token_ids": CANARY[:10]}, OPTIONS),
    "namespace": lambda case: case.llm.cache.purge_namespace(OF_WAY["namespace"]),
    "tenant": lambda case: case.llm.cache.purge_tenant("canary"),
    "evicted": Case.flood,
    "resized": _purge_resized,
    "busy": _purge_busy,
    "closed": lambda case: case.llm.close(),
    "purge on end": _purge_on_end,
    "lease": _let_lease_end,
}
RUNNING: dict[str, Callable[[Case], object]] = {"aborted": _abort, "preempted": _preempt, "rolled back": _roll_back}
OF_WAY = {
    "namespace": replace(OPTIONS, salt="s"),
    "purge on end": replace(OPTIONS, salt="e"),
    "lease": replace(OPTIONS, retain=(Retain(0, len(CANARY), 90, 0.05),)),
}
# A way, or a way and a setting.
WINDOWED = ("tenant", "text", "evicted", "busy", "aborted", "preempted")
CASES = (
    *RUNNING,
    *WAYS,
    *(f"{way}, {family}" for family in CONFIGS for way in WINDOWED),
    f"busy, {TWO_THREADS}",
)


def count(model: str, cases: Sequence[tuple[str, str]]) -> Figure:
    """Cases (how the text goes, codec), each in a process of its own. A control that fails counts as a failure."""
    replays, num_paged, num_rows, num_bytes = [], 0, 0, 0
    for case, codec in cases:
        arguments = [sys.executable, "-m", "tests.trust.residue", model, case, codec]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
        told = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-300:]}
        whole = "error" not in told and told["paged"] >= LEAST_PAGED and told["rows"] >= LEAST_ROWS
        if not whole or told["left"] or told["missing_before"]:
            replays.append(f"python -m tests.trust.residue MODEL {case!r} {codec}  # {told}")
        num_paged += told.get("paged", 0)
        num_rows += told.get("rows", 0)
        num_bytes += told.get("bytes", 0)
    also = {
        "needles of pages": num_paged,
        "of scratch memory, all of both found before": num_rows,
        "MB searched": num_bytes // 10**6,
    }
    return Figure("S8", "residues of keys and values", len(replays), len(cases), "ways to go", also, replays)


def main() -> None:
    """One case."""
    model, case, codec = sys.argv[1:]
    way, _, setting = case.partition(", ")
    print(json.dumps(Case(model, codec, setting).run(way)))


if __name__ == "__main__":
    main()
