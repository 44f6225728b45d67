"""Make a table to draft from (`trimtab.decode.drafters.table`) out of a data set."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.data.options import DataOptions, TemplateOptions, check_chats
from trimtab.errors import DataError, InvalidRequest
from trimtab.files import refuse_overwriting
from trimtab.options import option

__all__ = ["TableOptions", "make_table"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableOptions(DataOptions, TemplateOptions):
    """What a table is made of."""

    proposal: str = option(
        "", "the model that it is for, whose tokenizer is read: a folder or a hub id", required=True, metavar="P"
    )
    dataset: str = option(
        "", "data in a TRL layout, as like what will be decoded as can be; 'completion' or 'chosen' counts", required=True,
        metavar="D",
    )  # fmt: skip
    out: str = option("", "the table's file", required=True, metavar="FILE")
    max_examples: int | None = option(None, "take only the first so many records [default: all]", low=1)


def make_table(options: TableOptions) -> dict[str, Any]:
    """Tokenise answers behind their prompts, count what followed what in them, and write the table.

    Returns:
        `out`; `records`; `tokens`, of the answers; `runs`, how many runs of one, two and three tokens are known; `bytes`.

    Raises:
        DataError: a record cannot be read; the message says where it is, and nothing is written then.
        ModelError: there is no such tokenizer.
    """
    from trimtab.data.encoding import Encoder
    from trimtab.data.records import read_records
    from trimtab.data.template import read_chat_template, refuse_idle_date
    from trimtab.decode.drafters.table import count_runs, write_table
    from trimtab.models.loading import load_tokenizer_alone, quiet_loading
    from trimtab.models.vocabulary import find_eos_token_ids, fingerprint_vocabulary, vocabulary_size

    refuse_overwriting(options.out, options.dataset)
    template = read_chat_template(options.chat_template_path)
    records = read_records(options.dataset, how=options, limit=options.max_examples)
    check_chats(options, [record.prompt for record in records])
    quiet_loading()
    tokenizer = load_tokenizer_alone(options.proposal)
    if template is not None:
        tokenizer.chat_template = template
    refuse_idle_date(options.date, tokenizer)
    encoder = Encoder(tokenizer, vocabulary_size(tokenizer), find_eos_token_ids(None, tokenizer), options.date)
    tokens = 0

    def texts() -> Iterator[tuple[Sequence[int], int]]:
        nonlocal tokens
        for done, record in enumerate(records, 1):
            try:
                prompt, answer = encoder.pair(record.prompt, record.chosen, ended="chosen" not in record.unfinished)
            except InvalidRequest as error:
                raise DataError(f"{record.source}: {error}") from error
            tokens += len(answer)
            if done % 10_000 == 0:
                logger.info("read %d of %d records", done, len(records))
            yield [*prompt, *answer], len(prompt)

    counted = count_runs(texts())
    facts = {"vocabulary": fingerprint_vocabulary(tokenizer), "records": str(len(records)), "tokens": str(tokens)}
    size = write_table(options.out, counted, facts)
    runs = [len(one.runs) for one in counted]
    return {"out": options.out, "records": len(records), "tokens": tokens, "runs": runs, "bytes": size}
