"""Aligners inside vLLM: tensor and pipeline parallelism, paged memory and the scheduler are vLLM's; the aligners are ours.

    settings.py     what `additional_config["trimtab"]` and a request's `extra_args` may say
    cache.py        an aligner's ragged cache: which slot holds which request, and reading what is new
    mixing.py       the proposal's logits and the aligners' rows become aligned logits
    processor.py    vLLM's logits processor, which ties the three together
    internals.py    all that vLLM does not promise, and which versions were tried
    launch.py       `trimtab serve --engine vllm`: the same flags as `vllm serve` wants them

vLLM loads the plugin by itself through two entry points: `vllm.logits_processors` names the processor, `vllm.general_plugins`
installs what internals.py holds. Without `additional_config["trimtab"]` both do nothing.
"""
