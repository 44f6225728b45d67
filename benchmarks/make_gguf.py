"""GGUF files to try llama.cpp with: a file in 8 or 16 bits, its first layers as an aligner, or random weights of another shape.

    python benchmarks/make_gguf.py model.gguf q8.gguf                       # llama.cpp's own quantiser: Q8_0
    python benchmarks/make_gguf.py model.gguf f16.gguf --type F16
    python benchmarks/make_gguf.py model.gguf two.gguf --layers 2           # and of its layers the first two
    python benchmarks/make_gguf.py model.gguf big.gguf --shape 2048 20 32 8 6144      # 1.1B, with the tokenizer of model.gguf

Random weights are Q8_0 with even codes, so about normal logits come out; speeds do not depend on them.
"""

import argparse
import ctypes
from pathlib import Path

import gguf
import numpy as np

TYPES = {"Q8_0": 7, "F16": 1}
"""llama.cpp's numbers of files of these types."""
BLOCK = 32
SCALE = np.float16(0.02 / 73)  # codes up to ±127 have a spread of 73: weights of 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a GGUF file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=TYPES, default="Q8_0", help="of the file, but for random weights [default: Q8_0]")
    parser.add_argument("--layers", type=int, help="keep the first so many [default: all]")
    parser.add_argument(
        "--shape", type=int, nargs=5, metavar=("HIDDEN", "LAYERS", "HEADS", "KEYS", "MLP"), help="random weights of this shape"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights [default: 0]")
    said = parser.parse_args()
    if said.shape is None:
        quantize(said.source, said.out, TYPES[said.type], said.layers)
    else:
        write_random(said.source, said.out, said.shape, said.seed)


def quantize(source: Path, out: Path, kind: int, layers: int | None) -> None:
    """By llama.cpp, which leaves layers out, too."""
    from llama_cpp import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = kind, True
    if layers is not None:
        fields = gguf.GGUFReader(source).fields
        count = fields[f"{fields['general.architecture'].contents()}.block_count"].contents()
        pruned = (ctypes.c_int32 * (count - layers + 1))(*range(layers, count), -1)
        params.prune_layers = ctypes.cast(pruned, type(params.prune_layers))
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params):
        raise SystemExit(f"llama.cpp could not quantise {source}")


def write_random(source: Path, out: Path, shape: list[int], seed: int) -> None:
    """A Llama of this shape with the tokenizer of another file."""
    hidden, layers, heads, keys, mlp = shape
    fields = {name: field.contents() for name, field in gguf.GGUFReader(source).fields.items()}
    random, tokens = np.random.default_rng(seed), fields["tokenizer.ggml.tokens"]
    writer = gguf.GGUFWriter(out, "llama")
    for add, value in (
        (writer.add_block_count, layers), (writer.add_context_length, 4096), (writer.add_embedding_length, hidden),
        (writer.add_feed_forward_length, mlp), (writer.add_head_count, heads), (writer.add_head_count_kv, keys),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 10000.0), (writer.add_vocab_size, len(tokens)),
        (writer.add_tokenizer_model, fields["tokenizer.ggml.model"]), (writer.add_tokenizer_pre, fields["tokenizer.ggml.pre"]),
        (writer.add_token_list, tokens), (writer.add_token_types, fields["tokenizer.ggml.token_type"]),
        (writer.add_token_merges, fields["tokenizer.ggml.merges"]),
        (writer.add_bos_token_id, int(fields["tokenizer.ggml.bos_token_id"])),
        (writer.add_eos_token_id, int(fields["tokenizer.ggml.eos_token_id"])),
    ):  # fmt: skip
        add(value)

    def add_matrix(name: str, rows: int, columns: int) -> None:
        blocks = np.empty((rows, columns // BLOCK, 2 + BLOCK), np.uint8)
        blocks[..., :2] = np.frombuffer(SCALE.tobytes(), np.uint8)
        blocks[..., 2:] = random.integers(-127, 128, (rows, columns // BLOCK, BLOCK), dtype=np.int8).view(np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    ones = np.ones(hidden, np.float32)
    add_matrix("token_embd", len(tokens), hidden)
    writer.add_tensor("output_norm.weight", ones)
    for layer in (f"blk.{i}" for i in range(layers)):
        for name, rows, columns in (
            ("attn_q", hidden, hidden), ("attn_k", keys * hidden // heads, hidden), ("attn_v", keys * hidden // heads, hidden),
            ("attn_output", hidden, hidden), ("ffn_gate", mlp, hidden), ("ffn_up", mlp, hidden), ("ffn_down", hidden, mlp),
        ):  # fmt: skip
            add_matrix(f"{layer}.{name}", rows, columns)
        writer.add_tensor(f"{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"{layer}.ffn_norm.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
