"""Records as judges and rewards look at them before there are answers."""

from collections.abc import Sequence

from trimtab.data.records import Record

__all__ = ["AskedRecords"]


class AskedRecords:
    """`trimtab.judges.base.Asked` of records without wanted answers.

    Args:
        records: what answers will be to.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.prompts = [record.prompt for record in records]
        self.references = [None for _ in records]
        self.columns = [record.columns for record in records]
        self.sources = [record.source for record in records]
