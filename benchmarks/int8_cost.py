"""What `--quantize int8` does to the time of a pass, by how many tokens it reads, as a ratio to the same pass in float32.

    python benchmarks/int8_cost.py

The model is a Llama of 401M with random weights. A prompt of 64 tokens is read first; what counts is the least of nine passes.
What it does to likelihood, `trimtab score` says of any model and data, once with the flag and once without.
"""

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.hardware import describe_hardware
from trimtab.models.huggingface import HuggingFaceLM

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXT = 64
SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 16}
VOCAB = 32_000


def main() -> None:
    plain, small = (times(quantize) for quantize in (None, "int8"))
    print(f"{'tokens':>8}{'float32':>12}{'int8':>12}{'ratio':>8}")
    for count in TOKENS:
        print(f"{count:8}{1e3 * plain[count]:9.1f} ms{1e3 * small[count]:9.1f} ms{small[count] / plain[count]:8.2f}")
    print(describe_hardware())


@torch.no_grad()
def times(quantize: str | None) -> dict[int, float]:
    """Seconds of a pass by the tokens that it reads."""
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=16, max_position_embeddings=2048, **SHAPE)
    model = HuggingFaceLM(LlamaForCausalLM(config).eval(), owned=True, quantize=quantize)
    state = model.new_state(1, CONTEXT + max(TOKENS))
    ids = torch.arange(CONTEXT + max(TOKENS))[None] * 97 % VOCAB
    model.prefill(state, ids[:, :CONTEXT], [CONTEXT])
    return {count: min(one_pass(model, state, ids[:, :count]) for _ in range(9)) for count in TOKENS}


def one_pass(model: HuggingFaceLM, state: object, ids: torch.Tensor) -> float:
    count = ids.shape[1]
    started = time.perf_counter()
    model.extend(state, ids, [count])
    seconds = time.perf_counter() - started
    model.rollback(state, [count])
    return seconds


if __name__ == "__main__":
    main()
