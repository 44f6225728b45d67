"""Decoding rules: how the proposal's row and the aligners' rows become the row that is decoded. Each is a file here.

    product     ∝ p̃ · Π q_i^λ_i                          the Residual Alignment Model, arXiv 2505.19700
    geometric   ∝ p̃^(1−Σw) · Π q_i^w_i                   interpolation between language models
    nucleus     ∝ Π q_i^λ_i on the support of p̃          the official code's `par`
    mixture     ∝ (1−Σw)·p̃ + Σ w_i q_i                   interpolation in probability: Accept-Reject, arXiv 2505.07783
    gate        any rule with a row where the rows call for it, else p̃
    kl_gate     `nucleus` where KL(p̃‖q) ≤ τ, else p̃      the official code's `par_kl`: a case of `gate`
    nudge       `nucleus` where max p̃ < τ, else p̃        Nudging, arXiv 2410.09300: a case of `gate`
    confidence  one rule until p̃ finds the last tokens likely, then another: weak-to-strong decoding, arXiv 2506.07434
    proposal    p̃ alone, for rules that are made of others
    candidates  draw n from p̃, weight by Π q_i^λ_i, draw one of them: a sampler, without a row in closed form

`base` says what a rule is, `text` how it is written, and `context` what it may know of the text before its row. To add a rule,
write a frozen dataclass with a `name` and `log_weights`, in a package of your own (docs/extending.md) or in a file here that is
registered below. `AlignedModel`, manifests and every `--rule` know it then, and `tests/core/test_rules.py` runs its contract
over it.
"""

from trimtab.core.rules.base import RULES, Rule, check_rule, log_power, register, weighted_sum
from trimtab.core.rules.candidates import Candidates
from trimtab.core.rules.confidence import Confidence
from trimtab.core.rules.context import Context
from trimtab.core.rules.gate import Gate, KLGate, Nudge
from trimtab.core.rules.geometric import Geometric
from trimtab.core.rules.mixture import Mixture
from trimtab.core.rules.nucleus import Nucleus
from trimtab.core.rules.product import Product
from trimtab.core.rules.proposal import Proposal
from trimtab.core.rules.text import parse_rule

__all__ = [
    "RULES",
    "Candidates",
    "Confidence",
    "Context",
    "Gate",
    "Geometric",
    "KLGate",
    "Mixture",
    "Nucleus",
    "Nudge",
    "Product",
    "Proposal",
    "Rule",
    "check_rule",
    "log_power",
    "parse_rule",
    "register",
    "weighted_sum",
]

for _rule in (Product, Geometric, Nucleus, Mixture, Gate, KLGate, Nudge, Confidence, Proposal, Candidates):
    register(_rule)
