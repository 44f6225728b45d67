"""Decode two models as one: requests in, text and log-probabilities out."""
