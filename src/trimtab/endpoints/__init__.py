"""OpenAI-compatible servers that do a part of the work: a pool of them, shared out, retried, and asked in order."""
