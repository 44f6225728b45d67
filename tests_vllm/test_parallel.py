"""Aligners with the proposal spread over two workers: greedy text stays that of the embedded engine."""

import json
import os
import subprocess
import sys

import pytest

from engines import CONTEXT, Models
from trimtab import AlignedModel
from trimtab import SamplingParams as Ours

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    llm = LLM(**given["engine"])
    params = [SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, extra_args=asked) for asked in given["asked"]]
    prompts = [{"prompt_token_ids": prompt} for prompt in given["prompts"]]
    outs = llm.generate(prompts, params, use_tqdm=False)
    with open(sys.argv[2], "w") as file:
        json.dump([out.outputs[0].token_ids for out in outs], file)
"""


@pytest.mark.parametrize(
    ("how", "holders"), [("tensor_parallel_size", 2), ("pipeline_parallel_size", 1)], ids=["tensor parallel", "pipeline"]
)
def test_two_workers_align_as_one_does(models: Models, tmp_path, how, holders):
    """Every rank of a tensor-parallel group draws, and so holds the aligners; of a pipeline, the last stage does."""
    names = [[], ["first"], ["second"], ["red", "first"]]
    prompts = [[1 + (i * j) % 6 for j in range(1, 4 + 5 * (i % 6))] for i in range(24)]
    chosen = [names[i % len(names)] for i in range(24)]
    engine = {
        "model": models.proposal,
        "dtype": "float32",
        "max_model_len": CONTEXT,
        "max_num_seqs": 8,
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": 2**26,
        "enforce_eager": how == "tensor_parallel_size",  # vLLM's pipeline on a CPU wants the warm-up that this leaves out
        "additional_config": {"trimtab": {"aligners": models.aligners}},
        how: 2,
    }
    (tmp_path / "script.py").write_text(SCRIPT)
    given = {"engine": engine, "asked": [{"aligner": of} if of else None for of in chosen], "prompts": prompts}
    cores = sorted(os.sched_getaffinity(0))
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}", "VLLM_LOGGING_LEVEL": "INFO"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    command = [sys.executable, str(tmp_path / "script.py"), json.dumps(given), str(tmp_path / "out.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("trimtab: aligners") == holders
    found = json.loads((tmp_path / "out.json").read_text())
    for of in names:
        whole = AlignedModel.from_pretrained(models.proposal, [models.aligners[name] for name in of], dtype="float32")
        mine = [i for i in range(24) if chosen[i] == of]
        outs = whole.generate([prompts[i] for i in mine], Ours(max_tokens=40, temperature=0, ignore_eos=True))
        assert [out.tokens for out in outs] == [found[i] for i in mine], of
