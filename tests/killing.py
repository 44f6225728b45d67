"""A training run that ends in the middle, as a kill would end it."""

from typing import Any

__all__ = ["kill_in_step"]


def kill_in_step(monkeypatch: Any, trainer: type, step: int = 7) -> None:
    """Let a trainer raise `RuntimeError("killed")` in the loss of its training step of that number; looks do not count."""
    compute, calls = trainer.compute_loss, 0

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += self.model.training
        if calls == step:
            raise RuntimeError("killed")
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", failing)
