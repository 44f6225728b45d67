"""Rewriters: a model that turns a prompt and an answer to it into a better answer, whoever answered.

`rewriter.py` has what rewrites, `options.py` the flags that name one and how it is loaded.
"""
