"""Make or compare the stored goldens: what transformers computes in float32 on tiny random models of both families.

    python scripts/make_goldens.py            make tests/golden/*.npz anew
    python scripts/make_goldens.py --check    compute everything again and compare with the stored files

Needs the extra `parity` (torch, transformers). A golden holds a configuration, the seed of its weights with a checksum
of them, prompt ids, logits and 64 greedy tokens; the weights themselves are drawn again by `tests.fixtures.tiny`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

from tests.fixtures.golden import GOLDEN_DIR, VARIANTS, Golden, Variant  # noqa: E402
from tests.fixtures.rope_cases import CASES, POSITIONS, RopeCase, load_golden, save_golden  # noqa: E402

TOLERANCE = 1e-5


def compute(variant: Variant) -> Golden:
    """Run transformers on one variant: logits of chosen positions of each prompt, greedy tokens after each."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        path = variant.write_hf(Path(folder))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        prompts = variant.prompts()
        logits: list[Any] = []
        greedy: list[Any] = []
        margin = float("inf")
        with torch.inference_mode():
            for prompt in prompts:
                ids = torch.tensor([prompt.tolist()])
                logits.append(model(ids).logits[0, variant.positions(len(prompt))].numpy())
                answer = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=variant.num_greedy,
                    min_new_tokens=variant.num_greedy,
                    eos_token_id=None,
                    pad_token_id=0,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
                greedy.append(answer.sequences[0, len(prompt) :].numpy().astype(np.int32))
                best = torch.stack(answer.logits).topk(2).values
                margin = min(margin, float((best[..., 0] - best[..., 1]).min()))
    return variant.golden(logits, greedy, margin, f"torch {torch.__version__}, transformers {transformers.__version__}")


def rope_of(case: RopeCase) -> tuple[Any, Any]:
    """transformers' inverse frequencies [dim/2] and table at POSITIONS [positions, dim] f32: cosines, then sines."""
    config = transformers.LlamaConfig(
        hidden_size=4 * case.head_dim,
        num_attention_heads=4,
        max_position_embeddings=case.context,
        rope_parameters=dict(case.parameters),
    )
    rope = LlamaRotaryEmbedding(config)
    cos, sin = rope(torch.zeros(1), torch.tensor([list(POSITIONS)]))
    half = case.head_dim // 2
    return rope.inv_freq.numpy(), torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1).numpy()


def difference(stored: Golden, live: Golden) -> float:
    """Largest difference of a logit. Raises ValueError where prompts, weights or greedy tokens differ."""
    if stored.weights_sha256 != live.weights_sha256:
        raise ValueError(f"{stored.name}: the weights drawn from the seed are not those of the stored golden")
    for old, new in zip(stored.greedy, live.greedy, strict=True):
        if not np.array_equal(old, new):
            raise ValueError(f"{stored.name}: greedy tokens differ")
    return max(float(np.abs(old - new).max()) for old, new in zip(stored.logits, live.logits, strict=True))


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the stored goldens and write nothing")
    check = parser.parse_args().check
    GOLDEN_DIR.mkdir(parents=True, exist_ok=True)
    worst = 0.0
    for variant in VARIANTS.values():
        live = compute(variant)
        if check:
            largest = difference(Golden.load(variant.name), live)
            worst = max(worst, largest)
            print(f"{variant.name}: max abs logit difference {largest:.2e}")
        else:
            path = live.save()
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes, smallest greedy margin {live.margin:.1e}")
    rope = {name: rope_of(case) for name, case in CASES.items()}
    if check:
        largest = max(float(np.abs(rope[n][i] - load_golden(n)[i]).max()) for n in CASES for i in (0, 1))
        worst = max(worst, largest)
        print(f"rope: max abs difference {largest:.2e}")
    else:
        print(f"{save_golden(rope).relative_to(ROOT)}: {len(rope)} cases")
    if worst > TOLERANCE:
        print(f"error: {worst:.2e} is above {TOLERANCE:.0e}; make the goldens again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
