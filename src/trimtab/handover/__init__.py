"""Hand-over at text level: a model with any tokenizer begins an answer, and a proposal here or behind an endpoint goes on."""
