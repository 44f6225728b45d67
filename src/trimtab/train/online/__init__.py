"""Training from rewards: rounds of sampling what is decoded, scoring it, and an update."""
