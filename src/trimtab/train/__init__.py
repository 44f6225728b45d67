"""Train an aligner against a frozen proposal: records, proposal samples, cached log-probabilities, the trainer."""
