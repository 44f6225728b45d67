"""Judging answers by references: ROUGE and chrF, one score from 0 to 1 for each answer.

- `rouge1`, `rouge2`: F-measure of unigrams and bigrams; `rougeL`: of the longest common subsequence; `rougeLsum`: of the union
  of such subsequences over the lines of a summary, one sentence a line (nothing here finds sentences). Lin (2004), "ROUGE: A
  Package for Automatic Evaluation of Summaries", as computed by Google's `rouge-score` with the Porter stemmer on.
- `chrf`: F₂ of character n-grams up to 6, without white space. Popović (2015), "chrF: character n-gram F-score for automatic
  MT evaluation", as computed by `sacrebleu` for one sentence, divided by 100.
"""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

from trimtab.errors import DataError, InvalidOption
from trimtab.extras import need
from trimtab.journal import Journal
from trimtab.judges.base import Asked, Judge, JudgeKind, Judgement, Pair
from trimtab.judges.scoring import judge_by_scores

__all__ = ["METRICS", "REFERENCE", "TOKENIZERS", "ReferenceJudge", "ReferenceMetric", "preference", "unicode_words"]

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum", "chrf")
"""The names that `ReferenceMetric` knows."""
TOKENIZERS = ("ascii", "unicode")
"""How ROUGE splits a text into words: `ascii` as published, `unicode` by `unicode_words`."""
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
"""How the Unicode names of letters begin in scripts that put no space between words."""


class ReferenceMetric:
    """A metric that compares answers with references.

    Args:
        name: one of `METRICS`.
        tokenizer: of `TOKENIZERS`, for ROUGE. `"ascii"`, the default, is what published figures are computed with: it lowers
            case and splits at everything but a–z and 0–9, so all other letters vanish ("naïve" becomes "na" and "ve").
            `"unicode"` gives the same on ASCII texts, and is meant for all others; no two tools split those alike, so name it
            with the figures.

    Raises:
        InvalidOption: an unknown name, a tokenizer for chrF, or the extra `eval` is not installed.
    """

    def __init__(self, name: str, *, tokenizer: str | None = None) -> None:
        if name not in METRICS:
            raise InvalidOption(f"there is no metric '{name}'; there are {', '.join(METRICS)}")
        if tokenizer is not None and name == "chrf":
            raise InvalidOption("chrf compares characters: it takes no tokenizer")
        if tokenizer is not None and tokenizer not in TOKENIZERS:
            raise InvalidOption(f"there is no tokenizer '{tokenizer}'; there are {', '.join(TOKENIZERS)}")
        self.name = name
        self.tokenizer = None if name == "chrf" else tokenizer or "ascii"
        need("eval", f"the metric '{name}'", "sacrebleu.metrics" if name == "chrf" else "rouge_score.rouge_scorer")
        self._best = _chrf() if name == "chrf" else _rouge(name, self.tokenizer == "unicode")

    def score(self, answers: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[float]:
        """One score from 0 to 1 for each answer.

        Args:
            answers: texts; an empty one scores 0.
            references: for each answer a text, or several of which the best counts.

        Raises:
            DataError: not as many references as answers, or one that is no text, or empty.
            InvalidOption: the tokenizer `ascii` on a reference most of whose letters it would drop. (Answers are not looked
                at: one in another script than its reference rightly scores 0.)
        """
        if isinstance(answers, str) or isinstance(references, str):
            raise DataError("answers and references must be lists")
        if len(answers) != len(references):
            raise DataError(f"there are {len(answers)} answers, but {len(references)} references")
        scores = []
        for i, (answer, reference) in enumerate(zip(answers, references, strict=True)):
            if not isinstance(answer, str):
                raise DataError(f"answers[{i}] must be a text, not {answer!r}")
            several = [reference] if isinstance(reference, str) else reference
            if not isinstance(several, Sequence) or not several or not all(isinstance(text, str) for text in several):
                raise DataError(f"references[{i}] must be a text or a list of texts, not {reference!r}")
            for text in several:
                if not text.strip():
                    raise DataError(f"references[{i}] is empty: nothing can be compared with it")
                if self.tokenizer == "ascii" and _is_foreign(text):
                    raise InvalidOption(
                        f"references[{i}] is not in the Latin alphabet, and {self.name} would drop most of it: "
                        "use the tokenizer 'unicode', or chrf"
                    )
            scores.append(self._best(answer, list(several)))
        return scores


class ReferenceJudge(Judge):
    """Prefers the answer that is closer to the reference; pairs without one have no preference.

    Args:
        metric: how close.
    """

    kind = "reference"
    by_reference = True

    def __init__(self, metric: ReferenceMetric) -> None:
        self.metric, self.name = metric, metric.name

    def check(self, asked: Asked, where: str) -> None:
        """Refuse data without references, and references that the metric cannot read."""
        known = [one for one in zip(asked.references, asked.sources, strict=True) if (one[0] or "").strip()]
        if not known:
            raise DataError(f"{where}: has no wanted answers, which {self.called or self.name} compares with")
        for text, source in known if self.metric.tokenizer == "ascii" else ():
            try:
                self.metric.score([""], [text or ""])
            except InvalidOption as error:
                raise InvalidOption(f"{source}: {error}: --rouge_tokenizer") from error

    def describe(self) -> dict[str, Any]:
        """What it is, for the record."""
        package = "sacrebleu" if self.name == "chrf" else "rouge_score"
        version = f"{package} {metadata.version(package)}"
        return {"metric": self.metric.name, "tokenizer": self.metric.tokenizer, "package": version}

    def judge(self, pairs: Sequence[Pair], journal: Journal) -> list[Judgement]:
        """An opinion of each pair."""
        known = {"metric": self.metric.name, "tokenizer": self.metric.tokenizer}

        def score(asked: list[tuple[Pair, str]]) -> list[float]:
            return self.metric.score([answer for _, answer in asked], [pair.reference or "" for pair, _ in asked])

        whole = [(pair.reference or "").strip() != "" for pair in pairs]
        known_pairs = [pair for pair, has_one in zip(pairs, whole, strict=True) if has_one]
        judged = judge_by_scores(
            self.name, known_pairs, journal, lambda pair: {**known, "to": pair.reference}, score, preference
        )
        found = iter(judged)
        return [next(found) if has_one else Judgement(None, why_missing="no reference") for has_one in whole]


def preference(score_1: float, score_2: float) -> float:
    """2 if the second score is higher, 1 if the first is, 1.5 if they are equal."""
    return 1.5 if score_1 == score_2 else 2.0 if score_2 > score_1 else 1.0


def unicode_words(text: str) -> list[str]:
    """Lower-case words of letters, marks and digits in any script.

    A letter of a script without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) is a word by itself, with its marks, as
    in the character ROUGE of Hu, Chen and Zhu (2015), "LCSTS". Text is brought to NFKC first, so that full-width and
    composed letters are one with the others. On ASCII text this is what `rouge-score` does before it stems.
    """
    words: list[str] = []
    inside = single = False  # a word is open; it is one of a single letter, open only for marks
    for letter in unicodedata.normalize("NFKC", text.lower()):
        kind = unicodedata.category(letter)[0]
        if kind == "M" and inside:
            words[-1] += letter
        elif kind in "LN":
            alone = not letter.isascii() and unicodedata.name(letter, "").startswith(_UNSPACED)
            if inside and not single and not alone:
                words[-1] += letter
            else:
                words.append(letter)
            inside, single = True, alone
        else:
            inside = single = False
    return words


def _is_foreign(text: str) -> bool:
    """Whether most letters are not ASCII, accents set aside."""
    letters = [letter for letter in unicodedata.normalize("NFKD", text) if letter.isalpha()]
    return 2 * sum(letter.isascii() for letter in letters) < len(letters)


def _rouge(name: str, unicode: bool) -> Callable[[str, list[str]], float]:
    from nltk.stem.porter import PorterStemmer
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    stem = PorterStemmer().stem

    class Words(Tokenizer):  # type: ignore[misc]  # untyped library
        def tokenize(self, text: str) -> list[str]:
            return [stem(word) if len(word) > 3 and word.isascii() else word for word in unicode_words(text)]

    # split_summaries stays off: it would need a sentence splitter that nltk downloads.
    scorer: Any = RougeScorer([name], use_stemmer=True, tokenizer=Words() if unicode else None)
    return lambda answer, references: float(scorer.score_multi(references, answer)[name].fmeasure)


def _chrf() -> Callable[[str, list[str]], float]:
    from sacrebleu.metrics import CHRF

    metric: Any = CHRF()
    return lambda answer, references: float(metric.sentence_score(answer, references).score) / 100


def _make(argument: str, options: Mapping[str, Any]) -> ReferenceJudge:
    return ReferenceJudge(ReferenceMetric(argument, tokenizer=options.get("rouge_tokenizer")))


REFERENCE = JudgeKind(
    "reference",
    f"the answer closer to the data's own wins, by {', '.join(METRICS)}; also without the kind",
    _make,
    lambda argument: ("rouge_tokenizer",) if argument.startswith("rouge") else (),
    lambda text: text if text in METRICS else None,
)
