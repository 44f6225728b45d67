"""Progress for people: one bar, and one short line for each look at the development prompts."""

import sys
from typing import Any, Self

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer

__all__ = ["CompactProgress"]

SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "eval_loss": "dev loss",
    "eval_reward": "dev reward",
    "eval_kl": "KL from proposal",
    "eval_distinct": "distinct",
    "eval_nll_aligned": "aligned",
    "eval_nll_proposal": "proposal",
    "eval_nll_aligner": "aligner",
    "eval_kl_teacher_aligned": "KL from teacher",
    "eval_kl_aligned_proposal": "KL from proposal",
    "eval_weight": "at weight",
    "eval_nll_start": "start",
    "eval_kl_proposal_start": "KL",
    "eval_log_z_mean": "log Z",
    "eval_acceptance_on_answers": "drafts accepted",
    "eval_rewards/accuracies": "reward accuracy",
    "grad_norm": "gradient",
}


class CompactProgress(ProgressCallback):  # type: ignore[misc]  # transformers is untyped here
    """transformers' bar, with a readable line in place of the raw dictionary it prints."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    @classmethod
    def install(cls, trainer: Trainer, name: str) -> Self:
        """Take the place of the callbacks that print."""
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        made = cls(name)
        trainer.add_callback(made)
        return made

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the bar, named; with `disable_tqdm` the lines stay."""
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, desc=self._name, dynamic_ncols=True, disable=args.disable_tqdm)
        self.current_step = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the figures that matter; all of them are in the log history."""
        shown = [f"{label} {float(logs[key]):.4g}" for key, label in SHOWN.items() if key in (logs or {})] if logs else []
        if state.is_world_process_zero and shown and self.training_bar is not None:
            line = f"{self._name} {state.global_step}/{state.max_steps}: {', '.join(shown)}"
            self.training_bar.write(line, file=sys.stderr)
