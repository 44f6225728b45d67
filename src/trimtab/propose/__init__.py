"""Samples of a proposal for every prompt of a data set, or preference pairs of them."""
