"""Samples of a proposal for every prompt of a data set, or preference pairs of them."""

from trimtab.callable import make_callable

make_callable(__name__, "trimtab.propose.call:propose")
