"""Opening a checkpoint: from a path to spec, vocabulary and checked weights. Owns the recognition of formats and the
order of the checks; readers, families, vocabulary and weight checks are modules of their own.

A GGUF file (general.architecture llama or gpt2) or a directory with config.json, *.safetensors and, for text,
tokenizer.json. Weights stay memory-mapped; only what must be transposed is copied.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pagemill.base.errors import ModelError
from pagemill.base.model_spec import ModelSpec, VocabSpec
from pagemill.kernels.tensors import Tensor
from pagemill.models import registry
from pagemill.models.gguf import GGUFFile, open_gguf
from pagemill.models.vocabulary import vocab_from_directory, vocab_from_gguf
from pagemill.models.weights import Weights, check_finite, gather

_MAX_NAME = 100


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A model ready to be planned and loaded; keeps its digest, and which values were checked, once asked for.

    tensors: by canonical handle, in the checkpoint's own formats, matrices [out, in]. source_format: "gguf",
    "safetensors" or "random". path: what was opened; of weights made in memory, the name alone.
    """

    spec: ModelSpec
    vocab: VocabSpec
    tensors: Mapping[str, Tensor]
    source_format: str
    path: Path
    _digest: list[str] = field(default_factory=list, repr=False)
    _unchecked: set[str] = field(default_factory=set, repr=False)

    @property
    def weights(self) -> Weights:
        """The tensors with access by use."""
        return Weights(self.tensors)

    @property
    def weight_format(self) -> str:
        """The format that most parameters are in."""
        return self.weights.main_format

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors."""
        return self.weights.num_parameters

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return self.weights.num_bytes

    def check_values(self, but: Collection[str] = ()) -> None:
        """Raise ModelError where a tensor holds NaN or infinite values; what was checked once is not read again.

        but: handles that need no check, since their values come from elsewhere.
        """
        handles = [handle for handle in self.tensors if handle in self._unchecked and handle not in but]
        check_finite(self.tensors, handles, str(self.path))
        self._unchecked.difference_update(handles)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over what is computed: the spec but its name, and every tensor's handle, format, shape, bytes.

        Reads all weights on first use; the same model under another path or name has the same digest.
        """
        if not self._digest:
            self._digest.append(_digest(self.spec, self.tensors))
        return self._digest[0]


def open_checkpoint(path: str | os.PathLike[str], *, check_values: bool = True) -> Checkpoint:
    """Open a GGUF file or a checkpoint directory and check all of it but the tokeniser's inner consistency.

    check_values: False where the caller has the weights checked by `Checkpoint.check_values`, so far as it reads them.
    Raises ModelError where it is missing, damaged, of a kind that is not supported, or inconsistent.
    """
    path = Path(path)
    checkpoint = _open(path)
    checkpoint._unchecked.update(checkpoint.tensors)
    if check_values:
        checkpoint.check_values()
    return checkpoint


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise ModelError(f"{path} does not exist; give a GGUF file or a checkpoint directory")
    if path.suffix in (".safetensors", ".json"):
        raise ModelError(f"{path} is one file of a checkpoint; give its directory, {path.parent}")
    return _open_gguf_file(path)


def _open_gguf_file(path: Path) -> Checkpoint:
    file = open_gguf(path)
    family = registry.family(file.get_str("general.architecture"), str(path))
    spec = family.spec_from_gguf(file, _display_name(_gguf_name(file), path.stem))
    registry.check_sizes(spec, str(path))
    # A table for one position: only the declarations are needed here.
    expected = registry.build_plan(spec, max_positions=1).weights
    tensors = gather(expected, family.NAMES, spec.num_layers, file.tensors, "gguf", str(path))
    return Checkpoint(spec, vocab_from_gguf(file, spec.vocab_size), tensors, "gguf", path)


def _open_directory(path: Path) -> Checkpoint:
    if not (path / "config.json").is_file():
        return _open_gguf_file(_only_gguf(path))
    # Readers of hostile JSON, which a start from a GGUF file need not wait for.
    from pagemill.models.config_json import read_config
    from pagemill.models.safetensors import read_safetensors

    config = read_config(path / "config.json")
    family = registry.family(config.get_str("model_type"), config.origin)
    architectures = config.values.get("architectures") or list(family.ARCHITECTURES)
    if not isinstance(architectures, list) or architectures[0] not in family.ARCHITECTURES:
        raise ModelError(
            f"{config.origin}: architectures is {str(architectures)[:80]}; supported for this model_type: "
            f"{', '.join(family.ARCHITECTURES)}. Use a checkpoint of one of these"
        )
    spec = family.spec_from_config(config, _display_name("", path.resolve().name))
    registry.check_sizes(spec, config.origin)
    source = read_safetensors(path, ignored=family.NAMES.ignored)
    if spec.tied_head:
        source = {name: tensor for name, tensor in source.items() if name != "lm_head.weight"}
    expected = registry.build_plan(spec, max_positions=1).weights
    tensors = gather(expected, family.NAMES, spec.num_layers, source, "safetensors", str(path))
    vocab = vocab_from_directory(path, config, spec.vocab_size)
    return Checkpoint(spec, vocab, tensors, "safetensors", path)


def _only_gguf(directory: Path) -> Path:
    found = sorted(directory.glob("*.gguf"))
    if len(found) != 1:
        listed = f"; it holds {', '.join(p.name for p in found[:8])}" if found else ""
        raise ModelError(
            f"{directory} is no checkpoint directory: neither config.json nor exactly one GGUF file is in it{listed}; "
            "give the file itself, or fetch the whole checkpoint"
        )
    return found[0]


def _gguf_name(file: GGUFFile) -> str:
    return file.get_str("general.name", "")


def _display_name(name: str, otherwise: str) -> str:
    """A name that is safe to print: it comes from the file."""
    printable = "".join(c for c in name if c.isprintable()).strip()[:_MAX_NAME]
    return printable or otherwise


def _digest(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256(b"pagemill checkpoint 1\0")
    for name in sorted(ModelSpec.__dataclass_fields__):
        if name != "name":
            state.update(f"{name}={getattr(spec, name)!r}\0".encode())
    for handle in sorted(tensors):
        tensor = tensors[handle]
        state.update(f"{handle}\0{tensor.format}\0{tensor.shape}\0".encode())
        state.update(np.ascontiguousarray(tensor.data).data)
    return state.hexdigest()
