"""Whatever turns prefixes into next-token log-probabilities, and the folders it comes from."""
