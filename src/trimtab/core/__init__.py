"""The mathematics: pure functions on tensors. No models, no files, no random numbers but those of `noise`."""
