"""Weights of a GGUF file in the form that a peer reads: `python remake_weights.py MODEL.gguf FORMAT DESTINATION`.

Formats: Q4_0, Q4_1, Q8_0 and BF16 make a GGUF file, every quantised matrix dequantised and quantised anew (one in a
finer format than the new one keeps it, as llama.cpp's own quantiser does with the head; metadata and vectors are
copied); safetensors makes a directory with bf16 matrices, f32 vectors and config.json, without a
tokeniser, for Llama shapes. Needs numpy and the package gguf.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

BITS = {"Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5, "BF16": 16.0, "F16": 16.0, "F32": 32.0}
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def remake_gguf(source: gguf.GGUFReader, name: str, destination: Path) -> None:
    """Write `source` to `destination` with its matrices in the format `name`."""
    wanted = gguf.GGMLQuantizationType[name]
    writer = gguf.GGUFWriter(destination, text(source, "general.architecture"))
    for key, entry in source.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        inner = entry.types[1] if len(entry.types) > 1 else None
        writer.add_key_value(key, entry.contents(), entry.types[0], inner)
    writer.add_file_type(FILE_TYPES[name])
    for tensor in source.tensors:
        held = tensor.tensor_type
        keep = len(tensor.shape) < 2 or (held.name.startswith("Q") and BITS.get(held.name, 32) > BITS[name])
        data = tensor.data if keep else gguf.quants.quantize(dequantised(tensor), wanted)
        writer.add_tensor(tensor.name, data, raw_dtype=held if keep else wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def remake_safetensors(source: gguf.GGUFReader, directory: Path) -> None:
    """Write a checkpoint directory with bf16 matrices, as transformers and vLLM read it."""
    directory.mkdir(parents=True, exist_ok=True)
    config = llama_config(source)
    tensors: dict[str, NDArray[Any]] = {}
    for tensor in source.tensors:
        values = dequantised(tensor)
        short = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if short in ("attn_q", "attn_k"):
            values = unpermuted(values, config["num_attention_heads" if short == "attn_q" else "num_key_value_heads"])
        tensors[hub_name(tensor.name)] = values if values.ndim == 1 else bf16(values)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def dequantised(tensor: Any) -> NDArray[np.float32]:
    """A tensor's values, [out, in] f32."""
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return np.ascontiguousarray(values, dtype=np.float32).reshape([int(each) for each in reversed(tensor.shape)])


def unpermuted(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of Q or K from GGUF's order (rotated pairs adjacent) to that of the hub (halves)."""
    rows, columns = values.shape
    return values.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest bf16 of finite values, ties to even, as bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def hub_name(name: str) -> str:
    """A tensor's name in a checkpoint of the hub."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    block, layer, short, ending = name.split(".")
    if block != "blk" or short not in NAMES:
        raise SystemExit(f"tensor {name} is of no Llama shape; the safetensors form is made for those alone")
    return f"model.layers.{layer}.{NAMES[short]}.{ending}"


def write_safetensors(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    """f32 arrays, and bf16 ones as their bits. Format: https://github.com/huggingface/safetensors, `Format`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": {"float32": "F32", "uint16": "BF16"}[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for values in tensors.values():
            stream.write(values.tobytes())


def llama_config(source: gguf.GGUFReader) -> dict[str, Any]:
    """config.json of a Llama model."""
    if text(source, "general.architecture") != "llama":
        raise SystemExit("only the Llama architecture can be made into a safetensors checkpoint")

    def value(key: str, default: Any = None) -> Any:
        entry = source.fields.get(f"llama.{key}")
        return default if entry is None else entry.contents()

    num_heads = value("attention.head_count")
    embedding = next(tensor for tensor in source.tensors if tensor.name == "token_embd.weight")
    eos = source.fields.get("tokenizer.ggml.eos_token_id")
    bos = source.fields.get("tokenizer.ggml.bos_token_id")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": value("attention.head_count_kv", num_heads),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base", 10000.0),
        "vocab_size": int(embedding.shape[1]),
        "bos_token_id": None if bos is None else bos.contents(),
        "eos_token_id": None if eos is None else eos.contents(),
        "torch_dtype": "bfloat16",
    }


def text(source: gguf.GGUFReader, key: str) -> str:
    """A string of the metadata."""
    return str(source.fields[key].contents())


def main(model: str, form: str, destination: str) -> None:
    source = gguf.GGUFReader(model)
    if form == "safetensors":
        remake_safetensors(source, Path(destination))
    else:
        remake_gguf(source, form, Path(destination))


if __name__ == "__main__":
    main(*sys.argv[1:])
