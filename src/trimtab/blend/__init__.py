"""Blends of aligners: arithmetic on their weights, θ = θ_0 + Σ_d λ_d (θ_d − θ_0), as a folder."""

from trimtab.callable import make_callable

make_callable(__name__, "trimtab.blend.call:blend")
