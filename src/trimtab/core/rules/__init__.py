"""Decoding rules: how the proposal's row and the aligners' rows become the row that is decoded. Each is a file here.

    product     ∝ p̃ · Π q_i^λ_i                          the Residual Alignment Model, arXiv 2505.19700
    geometric   ∝ p̃^(1−Σw) · Π q_i^w_i                   interpolation between language models
    nucleus     ∝ Π q_i^λ_i on the support of p̃          the official code's `par`
    kl_gate     `nucleus` where KL(p̃‖q) ≤ τ, else p̃      the official code's `par_kl`
    candidates  draw n from p̃, weight by Π q_i^λ_i, draw one of them: a sampler, without a row in closed form

`base` says what a rule is, and `context` what it may know of the text before its row. To add a rule, write a frozen dataclass
with a `name` and `log_weights`, in a package of your own (docs/extending.md) or in a file here that is registered below.
`AlignedModel`, manifests and every `--rule` know it then, and `tests/core/test_rules.py` runs its contract over it.
"""

from trimtab.core.rules.base import RULES, Rule, check_rule, log_power, parse_rule, register, weighted_sum
from trimtab.core.rules.candidates import Candidates
from trimtab.core.rules.context import Context
from trimtab.core.rules.geometric import Geometric
from trimtab.core.rules.kl_gate import KLGate
from trimtab.core.rules.nucleus import Nucleus
from trimtab.core.rules.product import Product

__all__ = [
    "RULES",
    "Candidates",
    "Context",
    "Geometric",
    "KLGate",
    "Nucleus",
    "Product",
    "Rule",
    "check_rule",
    "log_power",
    "parse_rule",
    "register",
    "weighted_sum",
]

for _rule in (Product, Geometric, Nucleus, KLGate, Candidates):
    register(_rule)
