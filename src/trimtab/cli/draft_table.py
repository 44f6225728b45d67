"""`trimtab draft-table`: a table of what followed what in a corpus, to draft from."""

from typing import Any

from trimtab.decode.draft_table import TableOptions as Options
from trimtab.decode.draft_table import make_table

__all__ = ["Options", "render", "run"]


def run(options: Options) -> dict[str, Any]:
    """Count, and write."""
    return make_table(options)


def render(report: dict[str, Any]) -> str:
    """Where it is, and how to use it."""
    short, middle, long = report["runs"]
    use = f"--draft corpus:{report['out']}"
    return (
        f"{report['out']}: what followed {short:,} tokens, {middle:,} pairs and {long:,} runs of three, in {report['tokens']:,}"
        f" tokens of {report['records']:,} answers; {report['bytes'] / 2**20:.1f} MiB\ndraft from it with {use}"
    )
