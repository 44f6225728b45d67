"""Sequence-level sampling beside genlm-control's: the same targets, exactly known, and the same pair of models, in time.

    pip install genlm-control
    OMP_NUM_THREADS=1 python benchmarks/sequence_level.py [--particles 16] [--tokens 32] [--repeats 3]

genlm-control draws particles from the product of two potentials by its `direct_token_sampler`, which is the token-level law,
too, with systematic resampling at half the effective size. It keeps no keys and values of particles, only of the prompt; it is
given batches of all particles at once, without the 20 ms that it waits for more by default, and, in a line of its own, as it
comes. It draws from global generators, which nobody seeds here.
"""

import argparse
import asyncio
import math
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genlm.backend.llm import AsyncTransformer
from genlm.control import EOS, Potential, PromptedLLM, direct_token_sampler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from trimtab import AlignedModel, SamplingParams
from trimtab.hardware import describe_hardware
from trimtab.models.table import TableLM, enumerate_sequences

Run = tuple[float, Mapping[tuple[int, ...], float]]
"""The estimate of log Z, and the weight of each sequence."""


class TableProduct(Potential):
    """What a proposal and an aligner make of the tokens after a prompt; the token 0 ends a sequence."""

    def __init__(self, row: Callable[[list[int]], torch.Tensor], vocab_size: int) -> None:
        super().__init__(list(range(1, vocab_size)))
        self._row = row

    async def prefix(self, context: list[int]) -> float:
        return sum(float(self._row(context[:i])[token]) for i, token in enumerate(context))

    async def complete(self, context: list[int]) -> float:
        return await self.prefix(context) + float(self._row(context)[0])

    async def logw_next(self, context: list[int]) -> Any:
        row = self._row(context)
        return self.make_lazy_weights(torch.cat([row[1:], row[:1]]).numpy())


def theirs(potential: Any, particles: int, tokens: int) -> Run:
    """One run of genlm-control; its end of sequence is the token 0, and what it adds at the limit is left out."""
    run = direct_token_sampler(potential).smc(
        n_particles=particles,
        ess_threshold=0.5,
        max_tokens=tokens + 2,
        resampling_method="systematic",
        terminate_when=lambda context: len(context) >= tokens,
    )
    found = asyncio.run(run)
    weights: Counter[tuple[int, ...]] = Counter()
    for context, weight in zip(found.contexts, found.normalized_weights, strict=True):
        weights[tuple(0 if token is EOS else getattr(token, "token_id", token) for token in context[:tokens])] += weight
    return float(found.log_ml), weights


def ours(done: Any) -> Run:
    """What a completion that was drawn at the sequence level says of its run."""
    weights: Counter[tuple[int, ...]] = Counter()
    for one, weight in zip(done.particles.completions, done.particles.weights, strict=True):
        weights[tuple(one.tokens)] += weight
    return done.particles.log_z, weights


def compare_tables(runs: int) -> None:
    """A pair of tables of four tokens and order 2, sequences of up to four: all of them are known."""
    prompt, length, particles = [1], 4, 32
    proposal, aligner = (TableLM.random(4, order=2, seed=seed, scale=1.5) for seed in (30, 31))

    def row(context: list[int]) -> torch.Tensor:
        return proposal.row([*prompt, *context]) + aligner.row([*prompt, *context])

    masses = enumerate_sequences(lambda prefix: row(list(prefix)[1:]), prompt, length, [0])
    log_z = float(torch.tensor(list(masses.values())).logsumexp(-1))
    law = {y: math.exp(value - log_z) for y, value in masses.items()}
    model = AlignedModel(proposal, [aligner], eos_token_ids=[0], max_num_seqs=4096)
    asked = SamplingParams(n=runs, max_tokens=length, seed=0)
    started = time.perf_counter()
    mine = list(map(ours, model.generate([prompt], asked, sequence_level=f"particles={particles}")))
    middle = time.perf_counter()
    rivals = [theirs(TableProduct(row, 4), particles, length) for _ in range(runs)]
    ended = time.perf_counter()
    print(f"tables, {len(law)} sequences, {runs} runs of {particles} particles")
    print(f"  trimtab       {judged(mine, log_z, law)}, {1e3 * (middle - started) / runs:.1f} ms a run")
    print(f"  genlm-control {judged(rivals, log_z, law)}, {1e3 * (ended - middle) / runs:.1f} ms a run")
    tokenwise = Counter(tuple(done.tokens) for done in model.generate([prompt], asked))
    distance = sum(abs(tokenwise[y] / runs - mass) for y, mass in law.items()) / 2
    print(f"  the token-level law is {distance:.2f} from the sequence-level one in total variation")


def judged(runs: list[Run], log_z: float, law: Mapping[tuple[int, ...], float]) -> str:
    """Ẑ/Z, and Ẑ·W(y)/Z of each sequence y of more than 1 %, whose means are 1 and y's probability, in standard errors."""
    ratios = np.exp(np.array([value for value, _ in runs]) - log_z)
    error = ratios.std(ddof=1) / len(ratios) ** 0.5
    off = []
    for y in (y for y, mass in law.items() if mass > 0.01):
        found = ratios * np.array([weights.get(y, 0.0) for _, weights in runs])
        off.append(abs(found.mean() - law[y]) / (found.std(ddof=1) / len(runs) ** 0.5))
    told = f"mean Z-hat / Z {ratios.mean():.3f} ± {error:.3f}"
    return f"{told}, of {len(off)} sequences the farthest by {max(off):.1f} standard errors" if off else told


# ---- a pair of transformers


def make_pair(vocab_size: int, sizes: tuple[tuple[int, int], ...], scale: float) -> tuple[Any, list[Any]]:
    """A byte-level tokenizer of Python's own sources, and Llamas of random weights: their widths and depths."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    tokenizer.train_from_iterator((path.read_text("utf-8", "replace") for path in sources), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    made = []
    for seed, (width, depth) in enumerate(sizes):
        config = LlamaConfig(
            vocab_size=len(fast),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=depth,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = AutoModelForCausalLM.from_config(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, scale if "lm_head" in name else 0.05, generator=generator)
        made.append(model.eval())
    return fast, made


def potentials(tokenizer: Any, pair: list[Any], prompt: list[int], **settings: Any) -> Any:
    """The product of the two models after a prompt, which both have read."""
    parts = []
    for model in pair:
        llm = AsyncTransformer(model, tokenizer, **settings)
        llm.cache_kv(prompt)
        parts.append(PromptedLLM(llm, prompt_ids=prompt))
    return parts[0] * parts[1]


def exact_log_z(pair: list[Any], prompt: list[int], length: int) -> float:
    """Log Σ_y P_M(y)·Q(y) of sequences of up to so many tokens, by reading every prefix."""

    @torch.no_grad()
    def rows(prefixes: torch.Tensor) -> torch.Tensor:
        return sum(model(prefixes).logits[:, -1].double().log_softmax(-1) for model in pair)

    prefixes, logw, ended = torch.tensor([prompt]), torch.zeros(1, dtype=torch.float64), []
    for position in range(length):
        here = torch.cat([rows(part) for part in prefixes.split(512)]) + logw[:, None]
        ended.append(here[:, 0])
        if position == length - 1:
            ended.append(here[:, 1:].flatten())
            break
        others = torch.arange(1, here.shape[1])
        prefixes = torch.cat([prefixes.repeat_interleave(len(others), 0), others.repeat(len(prefixes))[:, None]], 1)
        logw = here[:, 1:].flatten()
    return float(torch.cat(ended).logsumexp(-1))


def compare_models(runs: int) -> None:
    """A pair over bytes, three tokens: Z is known, and both must find it."""
    tokenizer, pair = make_pair(257, ((128, 2), (64, 2)), scale=0.4)
    prompt = tokenizer.encode("def ")
    log_z = exact_log_z(pair, prompt, 3)
    model = AlignedModel.from_pretrained(pair[0], pair[1], tokenizer=tokenizer, eos_token_ids=[0], max_num_seqs=256)
    asked = SamplingParams(n=runs, max_tokens=3, seed=0)
    mine = list(map(ours, model.generate([prompt], asked, sequence_level="particles=32")))
    product = potentials(tokenizer, pair, prompt, batch_size=32, timeout=0.0)
    rivals = [theirs(product, 32, 3) for _ in range(runs)]
    print(f"two transformers, {len(tokenizer)} tokens, {runs} runs of 32 particles, log Z {log_z:.3f}")
    print(f"  trimtab       {judged(mine, log_z, {})}")
    print(f"  genlm-control {judged(rivals, log_z, {})}")


def compare_speeds(particles: int, tokens: int, context: int, repeats: int) -> None:
    """Interleaved runs from one prompt; medians."""
    tokenizer, pair = make_pair(8192, ((512, 6), (192, 2)), scale=0.1)
    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in pair]
    prompt = tokenizer.encode((Path(sysconfig.get_paths()["stdlib"]) / "heapq.py").read_text("utf-8"))[:context]
    with tempfile.TemporaryDirectory() as folder:  # as users have them: what is loaded here is laid out for the machine
        for name, part in zip("pq", pair, strict=True):
            part.save_pretrained(f"{folder}/{name}")
            tokenizer.save_pretrained(f"{folder}/{name}")
        model = AlignedModel.from_pretrained(f"{folder}/p", f"{folder}/q", prefix_cache_tokens=0)

    def mine(repeat: int) -> Any:
        asked = SamplingParams(max_tokens=tokens, seed=repeat)
        return model.generate([prompt], asked, sequence_level=f"particles={particles}")

    def rival(**settings: Any) -> Any:
        return theirs(potentials(tokenizer, pair, prompt, **settings), particles, tokens)

    kinds: dict[str, Callable[[int], Any]] = {
        "trimtab": mine,
        "genlm-control": lambda repeat: rival(batch_size=particles, timeout=0.0),
        "genlm-control, as it comes": lambda repeat: rival(),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(repeats + 1):
        for name, work in kinds.items():
            started = time.perf_counter()
            work(repeat)
            times[name].append(time.perf_counter() - started)
    medians = {name: float(np.median(taken[1:])) for name, taken in times.items()}  # the first one warms up
    print(
        f"speed: proposal {sizes[0]:.1f}M, aligner {sizes[1]:.1f}M, {len(tokenizer)} tokens, {particles} particles, {tokens}"
        f" tokens after {len(prompt)}, {repeats} repeats"
    )
    for name, seconds in medians.items():
        ratio, speed = seconds / medians["trimtab"], particles * tokens / seconds
        print(f"  {name:27} {seconds:7.2f} s a run, {speed:7.0f} tokens/s, {ratio:5.1f} times the time of trimtab")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runs", type=int, default=300, help="of the comparison of laws; 0 leaves it out")
    options = parser.parse_args()
    print(describe_hardware(), f"{torch.get_num_threads()} threads")
    if options.runs:
        compare_tables(options.runs)
        compare_models(options.runs)
    compare_speeds(options.particles, options.tokens, options.context, options.repeats)


if __name__ == "__main__":
    main()
