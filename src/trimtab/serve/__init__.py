"""An OpenAI-compatible server: many aligners over one frozen proposal."""
