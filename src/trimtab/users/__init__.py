"""Users' own weights of a bank of aligners, from a few preferences."""
