"""Draw completions y' from a proposal behind OpenAI-compatible endpoints, many at a time.

What is written does not depend on which endpoint answers, or when, as far as the servers keep to the seed.
"""

from collections.abc import Generator, Sequence
from pathlib import Path

from trimtab.data.records import Record
from trimtab.decode.request import SamplingParams
from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.completions import RemoteModel, Sample
from trimtab.endpoints.sendable import check_sendable
from trimtab.propose.ranking import Ranking
from trimtab.propose.writing import Written, write_samples

__all__ = ["propose_remotely"]


def propose_remotely(
    endpoints: Endpoints,
    model: str | None,
    records: Sequence[Record],
    out: str | Path,
    params: SamplingParams,
    ranking: Ranking | None = None,
) -> Written:
    """Write `params.n` samples for each record to `out`, or pairs of them, in the order of the records.

    Args:
        endpoints: where the proposal is; entered.
        model: its name there; None takes the first that is listed.
        records: what to sample for.
        out: a `.jsonl` file.
        params: how to sample; each record adds to the seed, so that all completions differ in it.
        ranking: how samples become pairs; None writes each sample.

    Raises:
        EndpointError: a request is refused, or no endpoint answers; the same call goes on where this one stopped.
        InvalidOption: `out` holds part of a run with other settings.
        DataError: a prompt that cannot be sent.
    """
    prompts = [record.prompt for record in records]
    check_sendable(prompts, [record.source for record in records])
    remote = RemoteModel(endpoints, model)

    def draw(start: int) -> Generator[list[list[Sample]], None, None]:
        yield from remote.complete(prompts, params, start)

    return write_samples(remote.name, draw, records, out, params, ranking)
