"""A teacher's rows: the loss is the exact divergence, least where Q ∝ P(·|teacher, x)/P(·|x), and honest where rows are cut."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiny import tiny_model
from trimtab.core.logprobs import kl_divergence
from trimtab.core.objectives import sampled_distillation
from trimtab.core.rules import Geometric, Product
from trimtab.data.examples import Example
from trimtab.decode.prefill import prefill
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.table import TableLM
from trimtab.train import rows as rows_module
from trimtab.train.fused_likelihood import fused_distillation
from trimtab.train.rows import Layout, ModelRows, TaughtRows
from trimtab.train.taught_rows import TaughtCache, TeacherRows, compress_both

V, EOS = 4, 0
RULES = [(Product(), 1.0), (Product(), 0.6), (Geometric(), 0.4)]


def random_rows(seed: int, count: int = 4, v: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, v, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)


def points_for(uniforms: int, samples: int) -> Tensor:
    start = torch.arange(uniforms, dtype=torch.float64).unsqueeze(-1) / uniforms
    return (torch.arange(samples, dtype=torch.float64) + start) / max(samples, 1)


def taught(bare: Tensor, teacher: Tensor, top_k: int, samples: int = 0) -> TaughtRows:
    tokens = torch.arange(len(bare)) % bare.shape[-1]
    return compress_both(bare, teacher, tokens, top_k, points_for(len(bare), samples))


def loss_of(rule, found, logits, weight):
    return fused_distillation(rule, found, logits, torch.arange(len(logits)), weight, 1.0, logits.shape[-1])


def answers_of(length: int):
    """Every answer that ends within `length` tokens, or is cut there."""
    for tokens in product(range(V), repeat=length):
        ends = [i for i, token in enumerate(tokens) if token == EOS]
        if not ends or ends[0] == length - 1:
            yield list(tokens)
        elif tokens[ends[0] + 1 :] == (EOS,) * (length - ends[0] - 1):  # each short answer once
            yield list(tokens[: ends[0] + 1])


@pytest.mark.parametrize(("rule", "weight"), RULES)
def test_on_the_proposals_own_answers_the_loss_is_the_divergence_of_whole_answers(rule, weight):
    """By enumeration: Σ_y P(y|t,x) Σ_s KL(P(·|t,x,y<s)‖P_θ(·|x,y<s)) = Σ_y P(y|t,x) log(P(y|t,x)/P_θ(y|x)).

    The chain rule; P_θ(v|x,y) ∝ P(v|x,y)^a Q(v|x,y)^λ, both of order two, so that the teacher's tokens matter to the first
    token of an answer and, through it, to the others. With all entries kept, and draws or none, nothing is estimated.
    """
    proposal, aligner = TableLM.random(V, order=2, seed=3), TableLM.random(V, order=2, seed=4)
    prompt, teacher, length = [2], [3, 1, 2], 3
    examples = [Example(prompt, answer, [], teacher) for answer in answers_of(length)]
    found = TeacherRows(ModelRows(proposal, "")).compress(examples, Layout.of(0, 0, V), 1.0).rows
    a, chance, by_loss, by_answers = 1.0 if isinstance(rule, Product) else 1 - weight, 0.0, 0.0, 0.0
    for example, rows in zip(examples, found, strict=True):
        answer, contexts = list(example.chosen), [[*prompt, *example.chosen[:i]] for i in range(len(example.chosen))]
        logits = torch.stack([aligner.row(context) for context in contexts])
        bare = torch.stack([proposal.row(context) for context in contexts])
        behind = torch.stack([proposal.row([*teacher, *answer[:i]]) for i in range(len(answer))])
        own = torch.tensor(answer).unsqueeze(-1)
        p = math.exp(behind.gather(-1, own).sum())
        aligned = (a * bare + weight * logits).log_softmax(-1)
        chance += p
        by_loss += p * float(loss_of(rule, rows, logits, weight).sum())
        by_answers += p * float((behind - aligned).gather(-1, own).sum())
    assert chance == pytest.approx(1)
    assert by_answers > 0.1
    assert by_loss == pytest.approx(by_answers, abs=1e-6)


@pytest.mark.parametrize(("top_k", "samples"), [(12, 0), (3, 4), (1, 1)])
@pytest.mark.parametrize(("rule", "weight"), RULES)
def test_the_loss_is_least_where_q_is_the_ratio_of_the_rows_whatever_was_drawn(rule, weight, top_k, samples):
    """P̃^a Q^λ ∝ P(·|t): λ log Q = log P(·|t) − a log P + const. There the gradient is 0, and a Newton step away it is not."""
    bare, teacher = random_rows(0), random_rows(1)
    a = 1.0 if isinstance(rule, Product) else 1 - weight
    best = ((teacher - a * bare) / weight + torch.randn(4, 1, generator=torch.Generator().manual_seed(2))).requires_grad_()
    found = taught(bare, teacher, top_k, samples)
    losses = loss_of(rule, found, best, weight)
    losses.sum().backward()
    assert_close(best.grad, torch.zeros_like(best), atol=1e-9, rtol=0)
    mass = (found.logt + found.logc).exp().sum(-1)
    assert_close(losses.detach(), mass * mass.log() - mass + 1)  # 0 where the entries' mass is 1, as it is on average
    for seed in range(5):
        other = best.detach() + 0.3 * random_rows(10 + seed)
        assert (loss_of(rule, found, other, weight) > losses).all()


@pytest.mark.parametrize(("rule", "weight"), RULES)
def test_sums_over_compressed_rows_are_right_on_average(rule, weight):
    """Over a grid of uniforms, Z of either rule, both masses and Σ P(·|t) log P_θ up to log Z are the exact sums.

    Each is Σ_v f(v), and Σ_u c_u f(u) counts a token of the tail S·m(v)/r times on average, each time as r/(S·m(v)).
    """
    count, v = 4000, 12
    bare, teacher, logits = (random_rows(seed, 1, v) for seed in (5, 6, 7))
    wide = [rows.expand(count, v) for rows in (bare, teacher)]
    found = compress_both(*wide, torch.full((count,), 2), 2, points_for(count, 3))
    a = 1.0 if isinstance(rule, Product) else 1 - weight
    c, here = found.logc.exp(), logits[0, found.ids.long()]
    exact = {
        "z": (a * bare + weight * logits).exp().sum(),
        "teacher": (teacher.exp() * (a * bare + weight * logits)).sum(),
        "mass": torch.tensor(1.0, dtype=torch.float64),
    }
    estimates = {
        "z": c * (a * found.logp + weight * here).exp(),
        "teacher": c * found.logt.exp() * torch.where(c > 0, a * found.logp + weight * here, 0),
        "mass": c * found.logt.exp(),
    }
    for name, value in estimates.items():
        assert float(value.sum(-1).mean()) == pytest.approx(float(exact[name]), abs=3e-3), name
        assert value.sum(-1).std() > 1e-3, "there is something to estimate"


@pytest.mark.parametrize(("rule", "weight"), RULES)
def test_the_loss_is_a_little_low_and_the_less_the_more_is_drawn(rule, weight):
    """log Ẑ is below log Z on average, as the logarithm is concave; the rest of the estimate is unbiased where Z is right."""
    bare, teacher, logits = (random_rows(seed, 1) for seed in (5, 6, 7))
    a = 1.0 if isinstance(rule, Product) else 1 - weight
    exact, biases = float(kl_divergence(teacher, (a * bare + weight * logits).log_softmax(-1))), []
    for samples in (3, 12, 64):
        wide = [rows.expand(500, 12) for rows in (bare, teacher)]
        found = compress_both(*wide, torch.full((500,), 2), 2, points_for(500, samples))
        losses = loss_of(rule, found, logits.expand(500, 12), weight)
        assert (losses > 0).all()
        biases.append(float(losses.mean()) / exact - 1)
    assert -0.25 < biases[0] < biases[1] < biases[2] < 1e-6
    assert biases[2] > -0.006


def test_no_token_is_likely_at_no_cost():
    """What the teacher says and the bare proposal hardly ever does is an entry of both: its logit cannot grow for nothing."""
    bare = torch.tensor([[0.6, 0.3999, 1e-4, 0.0]]).log().clamp(min=-30).log_softmax(-1)
    teacher = torch.tensor([[0.05, 0.05, 0.9, 0.0]]).log().clamp(min=-30).log_softmax(-1)
    found = compress_both(bare, teacher, torch.tensor([0]), 1, points_for(1, 1))
    assert 2 in found.ids[0]
    logits = torch.zeros(1, 4)
    logits[0, 2] = 60.0
    assert loss_of(Product(), found, logits, 1.0) > 2


def test_entries_count_once_and_ends_of_sequence_are_kept():
    bare, teacher = random_rows(0), random_rows(1)
    found = compress_both(bare, teacher, teacher.argmax(-1), 4, points_for(4, 6), ends=(3, 7))
    for ids, logc in zip(found.ids.tolist(), found.logc.tolist(), strict=True):
        kept = [token for token, c in zip(ids[:5], logc[:5], strict=True) if c == 0]
        assert len(set(kept)) == len(kept) >= 4
        assert {3, 7} <= set(kept)
        assert not set(ids[5:]) & set(kept)
    assert_close(found.logt, teacher.gather(-1, found.ids.long()))
    assert_close(found.logp, bare.gather(-1, found.ids.long()))


def test_where_nothing_is_left_draws_count_for_nothing():
    bare = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    teacher = torch.tensor([[0.25, 0.75, 0.0, 0.0]]).log()
    found = compress_both(bare, teacher, torch.tensor([0]), 2, points_for(1, 3))
    assert_close(sampled_distillation(found.logt, found.logp, found.logc), kl_divergence(teacher, bare))


# ---- where they come from


def test_the_rows_are_those_of_both_contexts_read_apart(monkeypatch):
    """Prompts of several lengths, some of which begin alike behind the teacher's; batches of two, and a temperature."""
    monkeypatch.setattr(rows_module, "BATCH", 2)
    model, layout = tiny_model("llama", 16), Layout.of(0, 0, 16)
    examples = [
        Example([3, 4], [5, 6, 0], [], [9, 8, 7, 3, 4]),
        Example([2], [1], [], [9, 8, 7, 2]),
        Example([1, 2, 3], [4, 4], [], [9, 1, 2, 3]),
    ]
    found = TeacherRows(ModelRows(HuggingFaceLM(model, 16), "")).compress(examples, layout, 0.8)
    exact = []
    for example, rows in zip(examples, found.rows, strict=True):
        contexts = []
        for context in (example.prompt, example.teacher):
            ids = torch.tensor([[*context, *example.chosen]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(context) - 1 : -1]
            contexts.append((logits / 0.8).log_softmax(-1))
        for column, row in zip((rows.logp, rows.logt), contexts, strict=True):
            assert_close(column[:, 1:].gather(-1, rows.ids[:, 1:].long().argsort(-1)), row, atol=3e-5, rtol=0)
        exact.append(kl_divergence(contexts[1], contexts[0]))
    exact = torch.cat(exact).double()
    assert exact.min() > 0.01
    assert_close(found.error[:2], torch.stack([exact.sum(), exact.max()]), atol=1e-4, rtol=0)
    assert found.error[2:].abs().max() < 1e-4


def test_what_all_prompts_begin_with_is_read_once():
    """Slots that were copied from one prefix go on as those that read it."""
    model = HuggingFaceLM(tiny_model("llama", 16), 16)
    prompts, more = [[9, 8, 7, 3, 4], [9, 8, 7], [9, 8, 7, 2]], torch.tensor([[5], [6], [1]])
    states = prefill([model], prompts, 8)[0], prefill([model], prompts, 8, shared=3)[0]
    assert [state.lengths for state in states] == [[5, 3, 4]] * 2
    one, other = (model.extend(state, more, [1, 1, 1]) for state in states)
    assert_close(one, other, atol=1e-5, rtol=0)


def test_the_cache_says_its_error(tmp_path):
    """Mean and root mean square of the estimate of KL(teacher‖proposal), which is KL at a uniform aligner."""
    model = HuggingFaceLM(tiny_model("llama", 16), 16)
    examples = [Example([i, 4], [5, 6, i, 2], [], [9, 8, 7, i, 4]) for i in range(1, 9)]
    source = TeacherRows(ModelRows(model, "sha256:p", (0,)))
    cache = TaughtCache.build(tmp_path / "cache", source, "sha256:v", examples, layout=Layout(3, 2))
    whole = source.compress(examples, Layout.of(0, 0, 16), 1.0).rows
    exact = torch.cat([sampled_distillation(*rows[2:0:-1], rows.logc) for rows in whole])
    rough = torch.cat([sampled_distillation(rows.logt, rows.logp, rows.logc) for rows in map(cache.__getitem__, range(8))])
    assert cache.facts["kl_teacher_proposal"] == pytest.approx(float(exact.mean()), rel=1e-4)
    assert cache.facts["kl_error"] == pytest.approx(float((rough - exact).mean()), abs=1e-5)
    assert cache.facts["kl_error_rms"] == pytest.approx(float((rough - exact).square().mean().sqrt()), abs=1e-5)
    assert 0 < cache.facts["kl_error_rms"] < 0.5 * cache.facts["kl_teacher_proposal"]
