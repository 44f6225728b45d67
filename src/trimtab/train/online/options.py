"""What training from rewards can be told, beside the options of its objective."""

from dataclasses import dataclass

from trimtab.judges.rewards.options import RewardOptions
from trimtab.options import option

__all__ = ["OnlineOptions"]


@dataclass(frozen=True)
class OnlineOptions(RewardOptions):
    """How samples are drawn and scored while an aligner trains."""

    rewards: str | None = option(
        None,
        "a file of scored answers to learn from: rows with prompt, completion and score. With --reward they are the first"
        " earlier answers (--replay_share); without it nothing is drawn to learn from",
        metavar="FILE",
    )
    max_tokens: int | None = option(None, "most tokens of an answer that is drawn for rewards [default: 256]", low=1)
    num_generations: int | None = option(
        None, "answers to a prompt that are compared with each other in an update of rewards [default: 8]", low=2
    )
    dev_prompts: int | None = option(
        None, "development prompts that a look draws --num_generations answers to, for rewards [default: 32]", low=1
    )
    sampling_endpoint: tuple[str, ...] = option(
        (),
        "a `trimtab serve` of the same proposal that draws the samples, with --aligner_root OUTPUT_DIR or a folder above; may"
        " repeat [default: this process]",
        metavar="URL",
    )
    max_num_seqs: int | None = option(None, "most answers drawn at once for rewards [default: 32]", low=1)
