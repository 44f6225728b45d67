r"""Statistics of answers as texts: length, diversity, repetition. No tokenizer, so any two systems can be compared.

Words and n-grams are those of `trimtab.words`.

distinct_n  different n-grams / all n-grams of a corpus (Li et al., "A Diversity-Promoting Objective Function for Neural
            Conversation Models", NAACL 2016). It falls as a corpus grows, whatever the system: compare two systems by
            `distinct_at_equal_length`.
repetition  of an answer: 1 − different / all of its 4-grams (seq-rep-4 of Welleck et al., "Neural Text Generation with
            Unlikelihood Training", ICLR 2020; rep-4 of Su et al., "A Contrastive Framework for Neural Text Generation",
            NeurIPS 2022).
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.words import distinct, repetition, split_words

__all__ = ["describe_handovers", "describe_texts", "distinct_at_equal_length"]

_SIZES = (1, 2, 3)
"""The n of distinct_n."""


def describe_texts(answers: Sequence[str], finish_reasons: Sequence[str | None] | None = None) -> dict[str, Any]:
    """Statistics of one system's answers.

    Args:
        answers: their texts.
        finish_reasons: why each ended, `"length"` where a limit cut it; None for one, or for all, where nobody knows.

    Returns:
        `answers`; `empty`, the share without any word; `mean_characters` (Unicode code points) and `mean_words`; `distinct_1`,
        `distinct_2` and `distinct_3` of the whole corpus; `repetition_4`, the mean over the answers of at least four words, for
        others have nothing to repeat; `truncated`, the share cut by a limit among those whose reason is known. None stands for
        what cannot be had, such as a mean over nothing.

    Raises:
        ValueError: there are not as many finish reasons as answers.
    """
    if finish_reasons is not None and len(finish_reasons) != len(answers):
        raise ValueError(f"there are {len(answers)} answers, but {len(finish_reasons)} finish reasons")
    corpus = [split_words(answer) for answer in answers]
    known = [reason for reason in finish_reasons or () if reason is not None]
    return {
        "answers": len(answers),
        "empty": _mean([not words for words in corpus]),
        "mean_characters": _mean([len(answer) for answer in answers]),
        "mean_words": _mean([len(words) for words in corpus]),
        **_all_distinct(corpus),
        "repetition_4": repetition(corpus),
        "truncated": _mean([reason == "length" for reason in known]),
    }


def describe_handovers(handovers: Sequence[int | None] | None) -> dict[str, Any]:
    """Of answers under a rule that hands over: `handed_over`, the share that was, and the mean of `tokens_before_handover`.

    Args:
        handovers: `Completion.handover_at` of each answer; None under other rules, of which there is nothing to say.
    """
    if handovers is None:
        return {}
    known = [at for at in handovers if at is not None]
    return {"handed_over": _mean([at is not None for at in handovers]), "tokens_before_handover": _mean(known)}


def distinct_at_equal_length(systems: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float | None]]:
    """distinct_1, distinct_2 and distinct_3 of several systems on equally much text.

    Every answer is cut to as many words as the shortest answer of any system to the same prompt has. So all systems are
    measured on as many n-grams, of the same prompts; a prompt that one of them leaves unanswered counts for none.

    Args:
        systems: by name, answers to the same prompts in the same order.

    Raises:
        ValueError: the systems do not have equally many answers.
    """
    if len(counts := {len(answers) for answers in systems.values()}) > 1:
        raise ValueError(f"the systems must answer the same prompts, but have from {min(counts)} to {max(counts)} answers")
    corpora = {name: [split_words(answer) for answer in answers] for name, answers in systems.items()}
    shortest = [min(map(len, same)) for same in zip(*corpora.values(), strict=True)]
    return {
        name: _all_distinct([words[:size] for words, size in zip(corpus, shortest, strict=True)])
        for name, corpus in corpora.items()
    }


def _all_distinct(corpus: Sequence[Sequence[str]]) -> dict[str, float | None]:
    return {f"distinct_{n}": distinct(corpus, n) for n in _SIZES}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
