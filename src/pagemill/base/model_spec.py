"""What a model is, as its own configuration says: sizes, rope, tokens. No weights, no arrays.

`models/` fills these from a checkpoint; `text/` builds tokenisers from VocabSpec; `engine/` reads limits and stops.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RopeScaling = Literal["none", "linear", "llama3", "yarn", "factors"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al., arXiv 2104.09864).

    style "halves" rotates dimension i with i + rotary_dim/2 (Hugging Face), "pairs" 2i with 2i + 1 (GGUF llama).
    scaling: "linear" (positions ÷ factor), "llama3" (Llama 3.1), "yarn" (arXiv 2309.00071), "factors" (one divisor per
    frequency, `freq_factors`). `attention_factor` multiplies cos and sin.
    """

    base: float
    rotary_dim: int
    style: Literal["halves", "pairs"] = "halves"
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    freq_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes and constants of a decoder-only model. Counts start with num_, `ffn_dim` is the MLP's inner width.

    window: positions that a layer reads, its own included; None for all. window_layers: numbers of the layers that read
    it; None where all do. attention_bias: of q, k and v; output_bias: of o, None for the same as these.
    """

    family: str
    name: str
    num_layers: int
    hidden_dim: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope: RopeSpec | None
    tied_head: bool
    window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    window_layers: tuple[int, ...] | None = None
    output_bias: bool | None = None

    def window_of(self, layer: int) -> int | None:
        """Positions that a layer reads, None for all."""
        return self.window if self.window_layers is None or layer in self.window_layers else None


@dataclass(frozen=True, slots=True)
class VocabSpec:
    """The tokeniser as the checkpoint describes it: either `tokenizer_json` (the file's text) or vocabulary lists.

    model: "gpt2" (byte-level BPE) or "llama" (SentencePiece-style BPE with scores), as in GGUF's tokenizer.ggml.model.
    pre: the pre-tokeniser's name, as in tokenizer.ggml.pre. token_types: GGUF's (1 normal, 2 unknown, 3 control,
    4 user defined, 5 unused, 6 byte). stop_ids: ids that end a text or a turn.
    """

    tokens: tuple[str, ...] = ()
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    token_types: tuple[int, ...] = ()
    model: str = "gpt2"
    pre: str = "default"
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    add_bos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None
    tokenizer_json: str | None = field(default=None, repr=False)
