"""Training from rewards whose samples come from servers: they are those that this process would have drawn."""

import json
from contextlib import ExitStack

import pytest

from scripted import Reply, scripted
from serving import folder_service, running
from tiny_task import asked, make_task, task_rows, write_rows
from trimtab.errors import EndpointError, InvalidOption, ModelError
from trimtab.train.run import run_training as train

TRAINING = {
    "max_steps": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "eval_steps": 1,
    "save_steps": 1, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip


def vowels(completions, **_):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_task(tmp_path_factory.mktemp("served"))
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in task_rows(12)])
    return folder


def run(folder, name, *urls, **settings):
    said = {
        "proposal": str(folder / "proposal"), "aligner": "", "objective": "tb", "beta": 0.5, "reward": (vowels,),
        "dataset": str(folder / "prompts.jsonl"), "output_dir": str(folder / name), "max_tokens": 4, "num_generations": 4,
        "dev_prompts": 2, "dev_fraction": 0.25, "train_draft": False, "sampling_endpoint": urls,
    }  # fmt: skip
    return train(asked(**(said | settings), training=TRAINING))


def server(folder, root):
    return running(folder_service(folder / "proposal", {}, allow_loading=True, registry_root=root))


def rounds_of(folder):
    found = sorted((folder / "rounds").glob("*.jsonl"))
    keys = ("tokens", "completion", "score", "finish_reason", "temperature")
    return {path.name: [[json.loads(line)[key] for key in keys] for line in path.read_text().splitlines()] for path in found}


@pytest.mark.parametrize("kind", ["head", "residual"])
def test_samples_of_servers_are_those_of_this_process(folder, kind):
    """From two servers, whose roots are the output folder and one above it; nothing is left behind, there or here."""
    how = {} if kind == "head" else {"aligner": str(folder / "start"), "rule": "product"}
    here = run(folder, f"{kind}-here", **how)
    (folder / f"{kind}-there").mkdir()
    with ExitStack() as stack:
        servers = [stack.enter_context(server(folder, root)) for root in (folder, folder / f"{kind}-there")]
        there = run(folder, f"{kind}-there", *(one.url for one in servers), **how)
        assert sum("trimtab:generation_tokens_total" in one.client.get("/metrics").text for one in servers) > 0
        for one in servers:
            assert [card["id"] for card in one.client.get("/v1/models").json()["data"]] == ["base"]
    assert rounds_of(folder / f"{kind}-there") == rounds_of(folder / f"{kind}-here")
    assert there["metrics"] == pytest.approx(here["metrics"], rel=1e-4)
    assert not list((folder / f"{kind}-there").glob("policy-*"))
    again = run(folder, f"{kind}-there", "http://127.0.0.1:9", **how)
    assert again["metrics"] == there["metrics"], "a finished run asks nobody"


def test_a_server_that_is_away_ends_the_run_which_goes_on_from_there(folder):
    (folder / "away").mkdir()
    count = iter(range(100))

    def dies(completions, **_):
        if next(count) == 3:
            raise KeyboardInterrupt
        return vowels(completions)

    with server(folder, folder) as one, pytest.raises(KeyboardInterrupt):
        run(folder, "away", one.url, reward=(dies,))
    with pytest.raises((ModelError, EndpointError, InvalidOption), match="127"):
        run(folder, "away", "http://127.0.0.1:9", max_retries=0, reward=(dies,))
    with server(folder, folder) as one:
        report = run(folder, "away", one.url, reward=(dies,))
    assert report["rounds"] == 3


def test_a_server_that_does_not_see_the_folder_is_named_before_anything_is_drawn(folder, tmp_path):
    with (
        server(folder, tmp_path) as one,
        pytest.raises(InvalidOption, match=r"loads nothing from .*start trimtab serve with --aligner_root"),
    ):
        run(folder, "unseen", one.url)
    with running(folder_service(folder / "proposal", {})) as one, pytest.raises(InvalidOption, match="--aligner_root"):
        run(folder, "unseen", one.url)
    assert not (folder / "unseen" / "rounds").exists()
    assert not list((folder / "unseen").glob("policy-*"))


def test_servers_that_call_the_proposal_otherwise_are_named(folder):
    with (
        scripted(lambda asked, number: Reply({}), models=[{"id": "base"}]) as one,
        scripted(lambda asked, number: Reply({}), models=[{"id": "tuned", "parent": "it"}, {"id": "it"}]) as other,
        pytest.raises(InvalidOption, match=r"servers call the proposal by several names, base, it: .* --served_model_name"),
    ):
        run(folder, "names", one.url, other.url)


def test_a_server_of_another_kind_is_named(folder):
    def other(asked, number):
        if asked.path == "/v1/load_aligner":
            return Reply({"detail": "no"}, status=400)
        return Reply({"choices": [{"index": i, "text": "a", "finish_reason": "stop"} for i in range(4)]})

    with (
        scripted(other, models=[{"id": "base"}]) as one,
        pytest.raises(ModelError, match="choices with token_ids: it must be trimtab serve"),
    ):
        run(folder, "other", one.url, max_retries=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": None, "max_kl": 1.0}, "max_kl: β is found by what samples here tell"),
        ({"max_num_seqs": 4}, "--max_num_seqs is for a model that runs here, not for --sampling_endpoint"),
    ],
)
def test_what_cannot_be_is_refused(folder, settings, said):
    with pytest.raises(InvalidOption, match=said):
        run(folder, "refused", "http://127.0.0.1:9", **settings)
