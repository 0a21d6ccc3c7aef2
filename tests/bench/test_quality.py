"""`bench quality` on tiny random models: its figures against plain numpy, its windows, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pagemill.base.config import EngineConfig
from pagemill.base.errors import CapacityError, ConfigError, ModelError
from pagemill.bench import quality
from pagemill.bench.quality import Measurement, Scores, Settings, Subject, measure, open_subject, total_tokens
from pagemill.bench.quality_modes import REFERENCE, WEIGHTS, Comparison, Mode, parse_apart
from pagemill.execution.loader import load_executor
from pagemill.kernels.batch import Batch
from pagemill.models.checkpoint import open_checkpoint
from pagemill.planner.machine import Machine
from tests.fixtures.byte_tokenizer import special_id
from tests.fixtures.tiny import llama_config, llama_weights, tiny_llama, write_hf

AUTO = Mode("auto", "bf16")
VOCAB = 272


class Counter:
    """A watcher that adds up. Mutated as it is told."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.windows: list[tuple[int, int, int]] = []

    def advanced(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens

    def ended(self, scores: Scores, num_windows: int) -> None:
        self.windows.append((scores.n_ctx, scores.num_windows, num_windows))


@pytest.fixture(scope="module")
def integer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama in 4-bit groups."""
    return tiny_llama(tmp_path_factory.mktemp("q4"), format="gguf", weight_format="q4_1", vocab=VOCAB)


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama in f32."""
    return tiny_llama(tmp_path_factory.mktemp("f32"), vocab=VOCAB)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 random capital letters, which no merge joins: a token each."""
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_bytes(bytes(np.random.RandomState(3).randint(65, 91, 1000).astype(np.uint8)))
    return path


def opened(model: Path, settings: Settings) -> Subject:
    return open_subject(EngineConfig(model=str(model), num_threads=1), settings)


def measured(model: Path, settings: Settings) -> Measurement:
    return measure(opened(model, settings), settings, Counter())


def plain_logits(model: Path, mode: Mode, ids: list[int]) -> np.ndarray:
    """Logits of every position of one sequence, run in one piece: [n, vocab] f64."""
    checkpoint = open_checkpoint(model)
    executor = load_executor(
        checkpoint, weight_format=WEIGHTS[mode.weights], kv_codec=mode.kv, num_blocks=-(-len(ids) // 16)
    ).model
    n = len(ids)
    batch = Batch(
        np.array(ids, np.int32),
        np.arange(n, dtype=np.int32),
        np.array([0, n], np.int32),
        np.arange(-(-n // 16), dtype=np.int32)[None],
        np.arange(n, dtype=np.int32),
    )
    return executor.forward(batch).astype(np.float64)


@pytest.mark.parametrize(("n_ctx", "num_windows"), [(33, 3), (300, 2), (4, 1)])
def test_figures_are_those_of_plain_numpy(integer_model: Path, text: Path, n_ctx: int, num_windows: int) -> None:
    found = measured(integer_model, Settings(text, (AUTO,), (n_ctx,), (num_windows,))).scores[0]
    ids = list(text.read_bytes())
    nll: dict[Mode, list[float]] = {REFERENCE: [], AUTO: []}
    kld, top1 = [], []
    for i in range(num_windows):
        window = ids[i * n_ctx : (i + 1) * n_ctx]
        logits = {mode: plain_logits(integer_model, mode, window) for mode in nll}
        for position in range(n_ctx // 2, n_ctx - 1):
            p, q = (np.exp(logits[mode][position]) / np.exp(logits[mode][position]).sum() for mode in nll)
            nll[REFERENCE].append(-np.log(p[window[position + 1]]))
            nll[AUTO].append(-np.log(q[window[position + 1]]))
            kld.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))
            top1.append(float(p.argmax() == q.argmax()))
    assert len(kld) == num_windows * (n_ctx - n_ctx // 2 - 1)
    for mode in nll:
        assert np.concatenate(found.nll[mode]) == pytest.approx(nll[mode], rel=1e-9)
    comparison = Comparison(AUTO, REFERENCE)
    assert np.concatenate(found.kld[comparison]) == pytest.approx(kld, rel=1e-6, abs=1e-12)
    assert np.concatenate(found.top1[comparison]).tolist() == top1
    assert min(kld) > 0


def test_the_same_arithmetic_under_another_name_costs_exactly_nothing(float_model: Path, text: Path) -> None:
    same = Mode("auto", "f32")
    found = measured(float_model, Settings(text, (same,), (64,), (2,))).scores[0]
    comparison = Comparison(same, REFERENCE)
    assert not np.concatenate(found.kld[comparison]).any()
    assert np.concatenate(found.top1[comparison]).all()
    assert np.array_equal(found.nll[same], found.nll[REFERENCE])


def test_stored_keys_and_values_are_read_back(float_model: Path, text: Path) -> None:
    rounded = Mode("auto", "bf16")
    found = measured(float_model, Settings(text, (rounded,), (64,), (1,))).scores[0]
    assert 0 < found.kld[Comparison(rounded, REFERENCE)][0].mean() < 1e-3


def test_quantised_kv_is_run_beside_bf16_and_differs_more_from_float32(float_model: Path, text: Path) -> None:
    int8 = Mode("float32", "int8")
    found = measured(float_model, Settings(text, (int8,), (64,), (2,))).scores[0]
    bf16 = Mode("float32", "bf16")
    kld = {each: np.concatenate(found.kld[Comparison(each, REFERENCE)]).mean() for each in (bf16, int8)}
    assert 0 < kld[bf16] < kld[int8] < 1e-2
    assert np.concatenate(found.kld[Comparison(int8, bf16)]).mean() == pytest.approx(kld[int8], rel=0.5)


def test_parts_of_int8_cost_less_than_all_of_it_and_the_reference_is_as_exact_as_float32(
    float_model: Path, text: Path
) -> None:
    apart = parse_apart("float32")
    found = measured(float_model, Settings(text, apart, (64,), (2,))).scores[0]
    exact = apart[0]
    kld = {each.kv: np.concatenate(found.kld[Comparison(each, exact)]).mean() for each in apart[1:]}
    assert np.concatenate(found.kld[Comparison(exact, REFERENCE)]).mean() < 1e-9
    parts = ("int8-k", "int8-v", "int8-q", "int8-p")
    assert all(0 < kld[part] < kld["int8"] < 1e-2 for part in parts)
    assert kld["int8-p"] < kld["int8-q"] / 10  # 16 bits against 8
    # Errors of independent roundings add up, as their squares do.
    assert sum(kld[part] for part in parts) == pytest.approx(kld["int8"], rel=0.5)


def test_the_parts_all_rounded_are_the_native_int8(float_model: Path, text: Path) -> None:
    native, numpy = Mode("float32", "int8"), Mode("float32", "int8", apart=True)
    found = measured(float_model, Settings(text, (native, *parse_apart("float32")), (64,), (2,))).scores[0]
    nll = {mode: np.concatenate(found.nll[mode]) for mode in (native, numpy, REFERENCE)}
    assert np.abs(nll[numpy] - nll[native]).mean() < np.abs(nll[native] - nll[REFERENCE]).mean() / 4


def test_windows_may_differ_by_context(float_model: Path, text: Path) -> None:
    settings = Settings(text, (REFERENCE,), (64, 300), (3, 1))
    found = measured(float_model, settings).scores
    assert [(each.n_ctx, each.num_windows) for each in found] == [(64, 3), (300, 1)]


def test_windows_are_whole_and_from_the_beginning(float_model: Path, text: Path) -> None:
    settings = Settings(text, (REFERENCE,), (64, 300), (40,))
    subject = opened(float_model, settings)
    ids = np.frombuffer(text.read_bytes(), np.uint8)
    assert (subject.num_windows(64, 40), subject.num_windows(300, 40), subject.num_windows(64, 7)) == (15, 3, 7)
    assert np.array_equal(subject.window(300, 2), ids[600:900])


def test_progress_adds_up_to_what_was_announced(float_model: Path, text: Path) -> None:
    settings = Settings(text, (AUTO,), (64, 300), (2,))
    subject, counter = opened(float_model, settings), Counter()
    measure(subject, settings, counter)
    assert counter.num_tokens == total_tokens(subject, settings) == 2 * 2 * (63 + 299)
    assert counter.windows == [(64, 1, 2), (64, 2, 2), (300, 1, 2), (300, 2, 2)]


def test_an_interruption_leaves_whole_windows_of_every_mode(float_model: Path, text: Path) -> None:
    settings = Settings(text, (AUTO,), (300, 64), (3,))
    subject, calls = opened(float_model, settings), iter(range(100))
    found = measure(subject, settings, Counter(), interrupted=lambda: next(calls) == 9)  # in the second window
    assert found.interrupted
    [scores] = found.scores
    assert scores.num_windows == 1
    whole = measure(subject, Settings(text, (AUTO,), (300,), (1,)), Counter()).scores[0]
    assert all(np.array_equal(scores.nll[mode], whole.nll[mode]) for mode in subject.modes)


def test_a_model_with_a_bos_gets_it_at_the_start_of_each_window(tmp_path: Path, text: Path) -> None:
    model = tiny_llama(tmp_path, vocab=VOCAB)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(
        json.dumps(config | {"add_bos_token": True, "bos_token": "<|endoftext|>"})
    )
    subject = opened(model, Settings(text, (REFERENCE,), (64,), (2,)))
    bos, ids = special_id(VOCAB, "<|endoftext|>"), list(text.read_bytes())
    assert subject.window(64, 0).tolist() == [bos, *ids[:63]]
    assert subject.window(64, 1).tolist() == [bos, *ids[64:127]]


def test_control_tokens_spelt_out_are_text(float_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "control.txt"
    path.write_bytes(b"a<|im_end|>\r\nb")
    subject = opened(float_model, Settings(path, (REFERENCE,), (4,), (1,)))
    assert subject.tokens.tolist() == list(b"a<|im_end|>\r\nb")


@pytest.mark.parametrize(
    ("contexts", "windows", "message"),
    [
        ((), (1,), "--n-ctx is empty"),
        ((512, 3), (1,), "--n-ctx is 512, 3; .* at least 4"),
        ((512, 512), (1,), "--n-ctx names 512, 512; give each number once"),
        ((64,), (0,), "--windows is 0"),
        ((64,), (10**7,), "--windows is 10000000"),
        ((64,), (), "--windows is empty"),
        ((64, 128, 256), (4, 2), "--windows gives 2 numbers for 3 of --n-ctx; give one for each, or one for all"),
    ],
)
def test_settings_that_cannot_be_are_refused(contexts: tuple[int, ...], windows: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(Path("x"), (REFERENCE,), contexts, windows)


def test_a_text_too_short_for_one_window_tells_both_lengths(float_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("seventeen letters")
    with pytest.raises(ConfigError, match=r"short\.txt has 17 tokens and a single window needs 64"):
        opened(float_model, Settings(path, (REFERENCE,), (4, 64), (1,)))


def test_a_window_beyond_the_models_context_is_refused(float_model: Path, text: Path) -> None:
    with pytest.raises(ConfigError, match=r"--n-ctx is 1,024 and .* reaches 512 tokens; lower --n-ctx to 512"):
        opened(float_model, Settings(text, (REFERENCE,), (64, 1024), (1,)))


def test_a_missing_text_is_refused(float_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.txt: No such file"):
        opened(float_model, Settings(tmp_path / "none.txt", (REFERENCE,)))
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        opened(float_model, Settings(tmp_path, (REFERENCE,)))


def test_a_text_that_is_not_utf8_is_refused(float_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("Müller".encode("latin-1") * 100)
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 1\)"):
        opened(float_model, Settings(path, (REFERENCE,), (64,)))


def test_a_model_without_vocabulary_is_refused(tmp_path: Path, text: Path) -> None:
    model = tiny_llama(tmp_path, tokenizer=False)
    with pytest.raises(ModelError, match="brings no vocabulary"):
        opened(model, Settings(text, (REFERENCE,), (64,)))


def test_modes_that_do_not_fit_in_memory_are_refused_with_the_arithmetic(
    float_model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "this_machine", lambda: Machine(2**20, 2**30, 1))
    with pytest.raises(CapacityError, match=r"2 modes side by side need .* of weights \+ .* of logits, and 1 MiB"):
        opened(float_model, Settings(text, (AUTO,), (64,)))


def test_a_mode_that_overflows_is_named(tmp_path: Path, text: Path) -> None:
    config = llama_config(vocab=VOCAB)
    weights = llama_weights(config)
    weights["lm_head.weight"] = weights["lm_head.weight"] * np.float32(2e38)
    model = write_hf(tmp_path / "huge", config, weights)
    with pytest.raises(ModelError, match=r"float32, KV f32 gives logits that are not finite in the 64 tokens"):
        measured(model, Settings(text, (REFERENCE,), (64,), (1,)))
