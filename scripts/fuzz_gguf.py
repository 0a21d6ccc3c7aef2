"""Coverage-guided fuzzing of the model file readers, by hand:

    pip install atheris numpy
    PYTHONPATH=src:. python scripts/fuzz_gguf.py gguf -max_total_time=180
    PYTHONPATH=src:. python scripts/fuzz_gguf.py safetensors -max_total_time=180

Options after the format are libFuzzer's. A reader opens a file or raises ModelError; anything else is a finding, and so
is memory beyond twice the file and a constant (`-rss_limit_mb`, `-malloc_limit_mb`). What opens is dequantised whole.
The corpus stays in /dev/shm/pagemill-fuzz-<format> (else the directory for temporary files) for the next run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pagemill"]):
    from pagemill.base.errors import ModelError
    from pagemill.kernels.tensors import Tensor
    from pagemill.models.gguf import open_gguf
    from pagemill.models.safetensors import read_safetensors

import numpy as np

from tests.fixtures.gguf_files import BOOL, F32, GGUFBytes, TensorBytes, array, scalar

RAM_DISK = Path("/dev/shm")


def gguf_seeds() -> list[bytes]:
    """Small valid files that between them use every value type and tensor format."""
    rich = GGUFBytes(version=2)
    rich.metadata += [(f"k{kind}", scalar(kind, 1)) for kind in range(13) if kind not in (8, 9)]
    rich.metadata += [("flags", array(BOOL, [True, False])), ("floats", array(F32, [1.5]))]
    rich.tensors = [TensorBytes(name, [32, 2], name) for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0")]
    return [GGUFBytes().encode(), rich.encode()]


def safetensors_seeds() -> list[bytes]:
    """Small valid files."""
    entry = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
    half = {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]}
    headers = [json.dumps({"a": entry}), json.dumps({"__metadata__": {"format": "pt"}, "a": entry, "b": half})]
    sizes = [8, 12]
    return [len(h).to_bytes(8, "little") + h.encode() + bytes(n) for h, n in zip(headers, sizes, strict=True)]


def target(path: Path, read: Callable[[Path], dict[str, Tensor]]) -> Callable[[bytes], None]:
    """What libFuzzer calls with each input."""

    def run(raw: bytes) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(raw)
        try:
            tensors = read(path)
        except ModelError:
            return
        for tensor in tensors.values():
            tensor.dequantize()

    return run


def main() -> None:
    """Write the seeds and hand over to libFuzzer, which ends the process."""
    if len(sys.argv) < 2 or sys.argv[1] not in ("gguf", "safetensors"):
        sys.exit(__doc__)
    is_gguf = sys.argv[1] == "gguf"
    np.seterr(all="ignore")
    room = (RAM_DISK if RAM_DISK.is_dir() else Path(tempfile.gettempdir())) / f"pagemill-fuzz-{sys.argv[1]}"
    corpus = room / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(gguf_seeds() if is_gguf else safetensors_seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)
    read = (lambda path: open_gguf(path).tensors) if is_gguf else read_safetensors
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(corpus)], target(room / "input", read))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
