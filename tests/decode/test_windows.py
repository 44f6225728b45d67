"""Layers that see a window or a chunk: drafts that cross its edge change no token, and neighbours do not either."""

import pytest
import torch

from tiny import tiny_model
from trimtab import AlignedModel, SamplingParams

V, WINDOW = 32, 5
PROMPTS = [[1], [2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12, 13], [4, 3, 2, 1, 9, 8], list(range(1, 12))]
"""Shorter than the window, one less, as long, one more, and far longer, with the token that comes next."""


@pytest.mark.parametrize("kind", ["mistral", "qwen3", "gemma2", "gpt_oss", "llama4_text", "smollm3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_across_the_edge_of_a_window_change_no_token(kind, temperature):
    settings = {
        "mistral": {"sliding_window": WINDOW},
        "qwen3": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    }
    proposal = tiny_model(kind, V, **settings.get(kind, {}))
    aligner = tiny_model("llama", V, seed=1)
    params = SamplingParams(max_tokens=12, temperature=temperature, seed=3, ignore_eos=True)
    plain = AlignedModel.from_pretrained(proposal, aligner, num_speculative_tokens=0, max_num_seqs=1).generate(PROMPTS, params)
    for length in (1, 2, 4, 7):
        model = AlignedModel.from_pretrained(proposal, aligner, num_speculative_tokens=length)
        assert [one.tokens for one in model.generate(PROMPTS, params)] == [one.tokens for one in plain]


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_window_changes_what_is_said_beyond_it_and_nothing_within_it(kind):
    """Or the test above would pass without one."""
    wide, narrow = (tiny_model(kind, V, sliding_window=size) for size in (40, WINDOW))
    narrow.load_state_dict(wide.state_dict())
    ids = torch.arange(1, 13).tolist()
    scores = [AlignedModel.from_pretrained(model).score([ids[:1]], [ids[1:]])[0].proposal for model in (wide, narrow)]
    apart = [abs(one - other) for one, other in zip(*scores, strict=True)]
    assert max(apart[: WINDOW - 1]) < 1e-5
    assert max(apart[WINDOW:]) > 1e-3
