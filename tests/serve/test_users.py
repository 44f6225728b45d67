"""Users of a server: what they prefer becomes weights, which decode their requests and nobody else's."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from serving import Server, folder_service, running
from tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.cli import main
from trimtab.core.user_weights import fit_user_weights
from trimtab.serve.bank import Bank
from trimtab.users.settings import UserSettings

BANK = ("one", "two")
PAIRS = [("de", "xy", "abc"), ("fgh", "zx", "a"), ("d", "yyx", "cb")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("users"), tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    for seed, name in enumerate(("proposal", *BANK, "other")):
        save_tiny(folder / name, tiny_model("llama", 28, seed=seed, spread=0.4), tokenizer)
    return folder


def service(folder: Path, kept: Path, **settings):
    users = UserSettings(kept, BANK, **{"beta": 1.0, **settings})
    return folder_service(
        folder / "proposal", {name: folder / name for name in (*BANK, "other")}, users=users, api_keys=("key",)
    )


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory):
    with running(service(folder, tmp_path_factory.mktemp("kept"), max_users=5)) as server:
        yield server


def prefer(server: Server, user: str, prompt: str, chosen: str, rejected: str):
    answer = server.post(f"/v1/users/{user}/preferences", prompt=prompt, chosen=chosen, rejected=rejected)
    assert answer.status_code == 200, answer.text
    return answer.json()


def wanted(folder: Path, pairs=PAIRS):
    """The fit by the library's own scores."""
    model = AlignedModel.from_pretrained(folder / "proposal", [folder / name for name in BANK], draft="none")
    prompts = [prompt for prompt, _, _ in pairs for _ in range(2)]
    scores = model.score(prompts, [answer for _, *both in pairs for answer in both])
    sums = torch.tensor([[sum(row) for row in score.inputs[1:]] for score in scores], dtype=torch.float64)
    return fit_user_weights(sums[::2] - sums[1::2], torch.zeros(2), 1.0, 1.0)


def test_preferences_become_weights(server, folder):
    for count, pair in enumerate(PAIRS, 1):
        said = prefer(server, "ada", *pair)
        assert (said["id"], said["object"], said["pairs"]) == ("ada", "user", count)
    fitted = wanted(folder)
    assert list(said["weights"]) == list(BANK)
    assert list(said["weights"].values()) == pytest.approx(fitted.mean.tolist(), abs=1e-4)
    low, high = said["interval"]["one"]
    assert high - low == pytest.approx(2 * 1.96 * float(fitted.deviation[0]), rel=1e-3)
    assert server.client.get("/v1/users/ada").json() == said


def test_requests_of_a_user_are_decoded_with_their_weights_and_others_are_not(server, folder):
    for pair in PAIRS:
        prefer(server, "bob", *pair)
        prefer(server, "cyd", pair[0], pair[2], pair[1])
    weights = {user: server.client.get(f"/v1/users/{user}").json()["weights"] for user in ("bob", "cyd")}
    assert weights["bob"]["one"] * weights["cyd"]["one"] < 0
    how = {"model": "base", "prompt": "def", "max_tokens": 12, "seed": 3, "temperature": 1.0}
    texts = {user: server.complete(user=user, **how) for user in ("bob", "cyd", "nobody")}
    for user in ("bob", "cyd"):
        same = server.complete(aligner=weights[user], **how)
        assert texts[user]["choices"][0]["text"] == same["choices"][0]["text"]
        assert texts[user]["model"] == "one+two"
    plain = server.complete(**how)
    assert texts["nobody"]["choices"][0]["text"] == plain["choices"][0]["text"]
    assert texts["nobody"]["model"] == "base"
    assert len({text["choices"][0]["text"] for text in texts.values()}) == 3
    named = server.complete(user="bob", aligner="other", **how)
    assert named["model"] == "other", "an aligner that is named counts"
    model = AlignedModel.from_pretrained(folder / "proposal", [folder / name for name in BANK])
    params = SamplingParams(max_tokens=12, seed=3, temperature=1.0, weight=list(weights["bob"].values()))
    assert model.generate(["def"], params)[0].text == texts["bob"]["choices"][0]["text"]


def test_chats_are_learnt_from_and_answered(server):
    messages = [{"role": "user", "content": "de"}]
    answer = server.post("/v1/users/dan/preferences", messages=messages, chosen="xyz", rejected="abc")
    assert answer.json()["pairs"] == 1
    how = {"model": "base", "messages": messages, "max_tokens": 8, "seed": 1}
    mine = server.post("/v1/chat/completions", user="dan", **how).json()
    same = server.post("/v1/chat/completions", aligner=answer.json()["weights"], **how).json()
    assert mine["choices"] == same["choices"]
    streamed = server.client.post("/v1/chat/completions", json={"user": "dan", "stream": True, **how}).text
    pieces = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in pieces) == mine["choices"][0]["message"]["content"]


def test_an_answer_that_was_cut_has_no_end(server):
    how = {"prompt": "de", "chosen": "xy", "rejected": "ab"}
    weights = []
    for more in ({}, {"unfinished": ["chosen"]}):
        weights.append(server.post("/v1/users/cut/preferences", **how, **more).json()["weights"])
        server.client.delete("/v1/users/cut")
    assert weights[0] != weights[1]


def test_a_user_is_forgotten_and_makes_room(server):
    prefer(server, "eve", *PAIRS[0])
    refused = server.post("/v1/users/fay/preferences", prompt="de", chosen="x", rejected="y")
    assert refused.status_code == 400
    assert "keeps 5 users" in refused.json()["error"]["message"]
    assert server.client.delete("/v1/users/eve").json() == {"id": "eve", "object": "user", "deleted": True}
    for gone in (server.client.get("/v1/users/eve"), server.client.delete("/v1/users/eve")):
        assert gone.status_code == 404
        assert gone.json()["error"]["code"] == "user_not_found"
    assert prefer(server, "fay", *PAIRS[0])["pairs"] == 1


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"prompt": "de", "chosen": "x"}, "rejected", "rejected"),
        ({"chosen": "x", "rejected": "y"}, "prompt", "either prompt, a text, or messages"),
        ({"prompt": "de", "messages": [{"role": "user", "content": "a"}], "chosen": "x", "rejected": "y"}, "prompt", "either"),
        ({"prompt": "d" * 70, "chosen": "x", "rejected": "y"}, "chosen", "must fit into 64 tokens"),
        ({"prompt": "de", "chosen": "x", "rejected": "y", "weight": 2}, "weight", "weight"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(server, body, param, said):
    answer = server.client.post("/v1/users/gil/preferences", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert said in answer.json()["error"]["message"]
    assert server.client.get("/v1/users/gil").status_code == 404


def test_answers_that_are_the_same_say_nothing(server):
    answer = server.post("/v1/users/gil/preferences", prompt="de", chosen="x", rejected="x")
    assert (answer.status_code, answer.json()["error"]["param"]) == (409, "rejected")
    assert "the same, which says nothing" in answer.json()["error"]["message"]
    assert server.client.get("/v1/users/gil").status_code == 404


def test_what_the_weights_say_is_said_once(server):
    prefer(server, "ada", *PAIRS[0])
    answer = server.post("/v1/completions", model="base", prompt="de", user="ada", weight=[1.0, 2.0])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "weight")
    assert "leave it out, or leave out user" in answer.json()["error"]["message"]


def test_users_need_a_key(server):
    for method, path in (("post", "/v1/users/ada/preferences"), ("get", "/v1/users/ada"), ("delete", "/v1/users/ada")):
        assert server.client.request(method, path, headers={"authorization": "Bearer guess"}).status_code == 401


def test_what_is_learnt_outlives_the_server_and_not_its_aligners(folder, tmp_path):
    with running(service(folder, tmp_path)) as server:
        before = prefer(server, "ada", *PAIRS[0])
    with running(service(folder, tmp_path)) as server:
        assert server.client.get("/v1/users/ada").json() == before
        server.service.registry.load("two", str(folder / "other"), pinned=True)
        assert server.client.get("/v1/users/ada").status_code == 404
        assert prefer(server, "ada", *PAIRS[1])["pairs"] == 1


def test_one_server_has_the_folder(folder, tmp_path):
    """A second one fails as it starts, and says why."""
    with running(service(folder, tmp_path)) as server, running(service(folder, tmp_path)) as second:
        assert second.service.state == "failed"
        assert "another process is writing" in str(second.service.failure)
        prefer(server, "ada", *PAIRS[0])


def test_a_preference_is_kept_under_the_aligners_that_compared_it(folder, tmp_path, monkeypatch):
    """Also if one is replaced between the two."""
    with running(service(folder, tmp_path)) as server:
        registry = server.service.registry
        compare = Bank.compare

        async def replacing(self, model, *args, **how):
            nats = await compare(self, model, *args, **how)
            registry.load("two", str(folder / "other"), pinned=True)
            return nats

        monkeypatch.setattr(Bank, "compare", replacing)
        prefer(server, "ada", *PAIRS[0])
        assert server.client.get("/v1/users/ada").status_code == 404, "the numbers are the former aligner's"


def test_nothing_is_lost_while_aligners_are_replaced(folder, tmp_path):
    with running(service(folder, tmp_path)) as server, ThreadPoolExecutor(8) as pool:

        def replace():
            for _ in range(6):
                server.service.registry.load("two", str(folder / "two"), pinned=True)

        replacing = pool.submit(replace)
        list(pool.map(lambda i: prefer(server, "ada", *PAIRS[i % 3]), range(24)))
        replacing.result()
        assert server.client.get("/v1/users/ada").json()["pairs"] == 24


def test_who_is_not_known_needs_no_aligner_and_everybody_can_be_forgotten(folder, tmp_path):
    with running(service(folder, tmp_path)) as server:
        prefer(server, "ada", *PAIRS[0])
        server.service.registry.unload("two")
        how = {"model": "base", "prompt": "def", "max_tokens": 3, "seed": 1}
        assert server.complete(user="stranger", **how)["choices"] == server.complete(**how)["choices"]
        assert server.complete(user="x" * 300, **how)["choices"] == server.complete(**how)["choices"]
        assert server.post("/v1/completions", user="ada", **how).status_code == 404
        assert server.client.delete("/v1/users/ada").json()["deleted"]


def test_a_name_may_have_any_characters_but_a_slash(folder, tmp_path):
    with running(service(folder, tmp_path)) as server:
        for name in ("a%3Fb", "%C3%A9%20%F0%9F%99%82"):
            answer = server.post(f"/v1/users/{name}/preferences", prompt="de", chosen="x", rejected="y")
            assert answer.status_code == 200
            assert server.client.get(f"/v1/users/{name}").json()["pairs"] == 1
            assert server.client.delete(f"/v1/users/{name}").status_code == 200
        assert server.post("/v1/users/%FF/preferences", prompt="de", chosen="x", rejected="y").status_code == 400
        assert server.post("/v1/users/a%2Fb/preferences", prompt="de", chosen="x", rejected="y").status_code == 404


def test_preferences_wait_their_turn_too(folder, tmp_path):
    users = UserSettings(tmp_path, BANK)
    made = folder_service(
        folder / "proposal", {name: folder / name for name in BANK}, users=users, max_waiting=1, engine={"max_num_seqs": 1}
    )
    with running(made) as server, ThreadPoolExecutor(12) as pool:

        def one(i):
            body = {"prompt": "de" * 8, "chosen": "xyz" * 9, "rejected": "abc" * 9}
            return server.post(f"/v1/users/u{i}/preferences", **body).status_code

        statuses = list(pool.map(one, range(36)))
    assert set(statuses) == {200, 429}


def test_a_folder_that_is_none_is_said_at_the_start(folder, tmp_path):
    (tmp_path / "kept").write_text("a file")
    with running(service(folder, tmp_path / "kept")) as server:
        assert server.service.state == "failed"


def test_without_a_store_the_name_means_nothing(folder):
    with running(folder_service(folder / "proposal", {"one": folder / "one"})) as server:
        assert server.post("/v1/users/ada/preferences", prompt="de", chosen="x", rejected="y").status_code == 404
        how = {"model": "base", "prompt": "def", "max_tokens": 5, "seed": 3}
        assert server.complete(user="ada", **how)["choices"] == server.complete(**how)["choices"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--users", "kept"], "needs an --aligner"),
        (["--users", "kept", "--aligner", "one=A"], "needs an --api_key"),
        (["--max_users", "3"], "belongs to --users"),
        (["--users", "kept", "--api_key", "k", *[f"--aligner=a{i}=A" for i in range(9)]], "a request may have 8 aligners"),
    ],
)
def test_what_cannot_be_served_is_refused(folder, capsys, monkeypatch, flags, said):
    monkeypatch.delenv("TRIMTAB_API_KEY", raising=False)
    assert main(["serve", "--proposal", str(folder / "proposal"), *flags]) == 2
    assert said in capsys.readouterr().err
