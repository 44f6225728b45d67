"""Several decoders of the same text, a token of each in turn: whatever else the machine does slows all of them alike."""

import time
from collections.abc import Iterator, Mapping

from trimtab import TokenEvent

__all__ = ["Run", "in_lockstep"]


class Run:
    """What one of them did."""

    def __init__(self) -> None:
        self.tokens: list[int | None] = []
        self.seconds: list[float] = []
        """Of processor time that each token took; the last one is for the end."""


def in_lockstep(streams: Mapping[str, Iterator[TokenEvent]]) -> dict[str, Run]:
    """Run them to their ends."""
    runs, going = {name: Run() for name in streams}, dict(streams)
    while going:
        for name, stream in list(going.items()):
            started = time.process_time()
            event = next(stream, None)
            runs[name].seconds.append(time.process_time() - started)
            if event is None:
                del going[name]
            else:
                runs[name].tokens.append(event.token)
    return runs
