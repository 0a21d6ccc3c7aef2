"""What a start from packed weights checks anew, and what it takes the file's word for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pagemill.base.errors import ModelError
from pagemill.execution import packed
from pagemill.kernels.native import PANEL
from pagemill.kernels.tensors import Tensor
from pagemill.models import checkpoint, weights
from pagemill.models.checkpoint import open_checkpoint
from pagemill.models.gguf import open_gguf
from tests.fixtures.packed_starts import Starter, only, packed_of, rewrite, same
from tests.fixtures.tiny import tiny_llama


@pytest.mark.parametrize("handle", ["layers.0.q", "layers.1.q", "layers.1.k", "layers.1.down", "embed"])
def test_an_unannounced_layout_of_any_one_matrix_is_noticed(model: Path, start: Starter, handle: str) -> None:
    expected = start(model)
    rewrite(packed_of(model), alter=only(handle, lambda m: replace(m, data=m.data[::-1].copy())))
    found = start(model)
    assert f"{handle} is not what packing gives" in found.notices[0]
    assert same(found, expected)


def test_of_most_matrices_a_few_rows_are_packed_again_and_of_each_kind_one_panel(
    tmp_path: Path, start: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(tmp_path / "models", format="gguf", weight_format="q4_1", layers=6, vocab=288)
    start(model)
    checked: dict[str, int] = {}
    original = packed.pack_over

    def spied(rows: Tensor, layout: str, column0: int, panels: NDArray[np.uint8]) -> None:
        checked[f"{layout} {rows.shape[-1]} {len(checked)}"] = rows.num_rows
        original(rows, layout, column0, panels)

    monkeypatch.setattr(packed, "pack_over", spied)
    assert start(model).converted == 0
    kinds = {name.rpartition(" ")[0] for name in checked}
    assert len(checked) == 2 + 6 * 7
    assert sorted(checked.values())[-len(kinds) :] == [PANEL] * len(kinds)
    assert sum(checked.values()) == PANEL * len(kinds) + 4 * (len(checked) - len(kinds))


def _spoil(model: Path, handle: str) -> None:
    """Make the first scale of a matrix of a GGUF file infinite, in place."""
    file = open_gguf(model)
    at = model.read_bytes().index(file.tensors[handle].data[0].tobytes())
    with model.open("r+b") as stream:
        stream.seek(at)
        stream.write(np.float16(np.inf).tobytes())


def test_values_are_checked_where_they_are_read_and_not_where_the_file_vouches_for_them(
    model: Path, start: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    original = weights.check_finite

    def spied(tensors: dict[str, Tensor], handles: list[str], origin: str) -> None:
        checked.extend(handles)
        original(tensors, handles, origin)

    monkeypatch.setattr(checkpoint, "check_finite", spied)
    matrices = {handle for handle, tensor in open_checkpoint(model).tensors.items() if len(tensor.shape) == 2}

    def checked_by(cache: str) -> set[str]:
        checked.clear()
        start(model, cache, check_values=False)
        assert len(checked) == len(set(checked))
        return set(checked)

    everything = checked_by("off")
    assert matrices < everything
    assert checked_by("auto") == everything
    assert checked_by("auto") == everything - matrices


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_infinite_weights_are_refused_also_where_a_file_of_the_weights_before_is_there(
    model: Path, start: Starter, cache: str
) -> None:
    start(model, cache)
    _spoil(model, "blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=r"tensor 'layers\.1\.up' holds NaN or infinite values"):
        start(model, cache, check_values=False)
