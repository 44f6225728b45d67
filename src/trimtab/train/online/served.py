"""Samples from `trimtab serve`: it has the same proposal, and loads the aligner anew for every round.

The aligner goes there as a folder that both see: `policy` and a few letters, in the run's output folder, which lies in what the
server calls `--aligner_root`. Clients name such folders by their path from there, and it does not say where that is; so the
path that leads somewhere is found by asking.
"""

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.decode.request import SamplingParams
from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.settings import Limits
from trimtab.errors import EndpointError, InvalidOption, ModelError
from trimtab.train.online.policy import Policies

__all__ = ["ServedPolicies", "ServedPolicy"]

LOAD, UNLOAD = "/v1/load_aligner", "/v1/unload_aligner"
NOT_FOUND, REFUSED = 404, 400

logger = logging.getLogger(__name__)


class Drawn(NamedTuple):
    """As much of a `trimtab.decode.request.Completion` as there is of a served one."""

    text: str
    tokens: list[int]
    finish_reason: str
    error: str | None
    logprobs: None = None


class ServedPolicy:
    """A model of servers.

    Args:
        endpoints: where it is; entered.
        name: its name there.
    """

    def __init__(self, endpoints: Endpoints, name: str) -> None:
        self._endpoints, self._name = endpoints, name

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Drawn]:
        """The completions of each prompt, in order, with the seeds that stand there.

        Raises:
            ModelError: a server refuses, or none answers.
        """

        def make(one: tuple[Sequence[int], SamplingParams]) -> tuple[str, dict[str, Any]]:
            ids, how = one
            body = {"model": self._name, "prompt": list(ids), "n": how.n, "seed": how.seed, "max_tokens": how.max_tokens}
            return "/v1/completions", body | {"temperature": how.temperature, "return_token_ids": True}

        def read(one: tuple[Sequence[int], SamplingParams], answer: Any) -> list[Drawn]:
            return _drawn(answer, one[1].n)

        try:
            some = self._endpoints.map(zip(prompts, params, strict=True), make, read)
            return [drawn for answers in some for each in answers for drawn in each]
        except EndpointError as error:
            raise ModelError(f"sampling_endpoint: {error}; the same run goes on from here") from error


class ServedPolicies(Policies):
    """As `Policies`, with samples from servers.

    Args:
        urls: of the servers.
        limits: how much to ask of them.
        output: the run's output folder.
        how: what `Policies` takes.

    Raises:
        InvalidOption: a server cannot be told to load anything from there, or they call the proposal by several names.
        EndpointError: one does not answer.
    """

    def __init__(self, urls: Sequence[str], limits: Limits, output: Path, *how: Any) -> None:
        super().__init__(*how)
        self._base = _base_of(urls, limits)
        digest = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:8]
        self._name, self._folder = f"policy-{digest}", output.resolve() / f"policy-{digest}"
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._places = {url: _locate(url, limits, self._name, self._folder) for url in urls}
        except BaseException:
            self._forget()
            raise
        self._endpoints, self._limits = Endpoints(urls, limits).__enter__(), limits

    @property
    def bare(self) -> ServedPolicy:
        """The proposal alone."""
        return ServedPolicy(self._endpoints, self._base)

    def of(self, model: Any, weight: float) -> ServedPolicy:
        """The aligned model of a trained one as it is now, at a weight of the rule.

        Raises:
            ModelError: a server cannot load it.
        """
        model.eval()
        self.save(model, weight, self._folder)
        for url, place in self._places.items():
            with Endpoints([url], self._limits) as endpoint:
                try:
                    endpoint.post(LOAD, {"name": self._name, "path": place}, _ignored)
                except EndpointError as error:
                    raise ModelError(f"sampling_endpoint: {url} cannot load what is trained: {error}") from error
        return ServedPolicy(self._endpoints, self._name)

    def close(self) -> None:
        """Have the servers forget it, as far as they answer."""
        once = dataclasses.replace(self._limits, max_retries=0)  # one that is down has been waited for before
        for url in self._places:
            with Endpoints([url], once) as endpoint:
                try:
                    endpoint.post(UNLOAD, {"name": self._name}, _ignored)
                except EndpointError as error:
                    if error.status == NOT_FOUND:  # somebody else had it forget
                        continue
                    logger.warning("sampling_endpoint: %s goes on knowing %s: %s", url, self._name, error)
        self._endpoints.__exit__(None, None, None)
        self._forget()

    def _forget(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _base_of(urls: Sequence[str], limits: Limits) -> str:
    """What the servers call the proposal."""
    found: dict[str, str] = {}
    for url in urls:
        with Endpoints([url], limits) as endpoint:
            bare = [card["id"] for card in endpoint.models() if card.get("parent") is None]
        if not bare:
            raise InvalidOption(f"sampling_endpoint: {url} lists no model that is nobody's aligner: is it trimtab serve?")
        found[url] = bare[0]
    if len(names := sorted(set(found.values()))) > 1:
        raise InvalidOption(
            f"sampling_endpoint: servers call the proposal by several names, {', '.join(names)}: start them with one"
            " --served_model_name"
        )
    return names[0]


def _locate(url: str, limits: Limits, name: str, folder: Path) -> str:
    """How a server calls the folder, which is empty: one that is there cannot be loaded, and one that is not is not found."""
    parts = folder.parts[1:]
    with Endpoints([url], limits) as endpoint:
        for count in range(1, len(parts) + 1):
            place = "/".join(parts[-count:])
            try:
                endpoint.post(LOAD, {"name": name, "path": place}, _ignored)
            except EndpointError as error:
                if error.status == NOT_FOUND:
                    continue
                if error.status == REFUSED:
                    return place
                raise
            return place  # a run that was killed has left it
    root = folder.parent
    raise InvalidOption(f"sampling_endpoint: {url} loads nothing from {root}: start trimtab serve with --aligner_root {root}")


def _drawn(answer: Any, count: int) -> list[Drawn]:
    """The choices of an answer.

    Raises:
        ValueError: it has not as many, or they have no ids.
    """
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != count or any(not choice.get("token_ids") and choice["finish_reason"] != "error" for choice in choices):
        raise ValueError(f"not {count} choices with token_ids: it must be trimtab serve, and of this version")
    return [
        Drawn(choice["text"], choice["token_ids"], choice["finish_reason"], (choice.get("error") or {}).get("message"))
        for choice in choices
    ]


def _ignored(answer: Any) -> None:
    """What is of no interest."""
