"""Systems: each kind answers as it should, answers fit their prompts, and nothing is computed or asked for twice."""

import dataclasses
import json

import pytest

from eval_task import QUICK, make_eval_task
from scripted import Reply, scripted
from serving import folder_service, running
from trimtab import AlignedModel, SamplingParams
from trimtab.data.prompts import show_prompt
from trimtab.endpoints.completions import RemoteModel
from trimtab.errors import DataError, EndpointError, InvalidOption
from trimtab.evaluate import systems
from trimtab.evaluate.run import Bench
from trimtab.evaluate.systems import (
    Prompts,
    System,
    answer_from_file,
    answer_here,
    answer_remotely,
    parse_system,
)
from trimtab.evaluate.texts import describe_handovers
from trimtab.journal import Journal

PARAMS = SamplingParams(max_tokens=6, seed=7)
TEXTS = ["def", "ghij", "kl", "def", "mnop"]
CHAT = [{"role": "user", "content": "def"}]


def prompts_of(texts):
    return Prompts(list(texts), [None] * len(texts), [f"d:{i}" for i in range(1, len(texts) + 1)])


PROMPTS = prompts_of(TEXTS)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_eval_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def model(task):
    return AlignedModel.from_pretrained(task / "proposal", [task / "start"], max_num_seqs=2)


@pytest.fixture
def computed(monkeypatch):
    """The prompts that models were asked to complete."""
    asked, stream = [], AlignedModel.stream

    def counted(self, prompts, params):
        asked.extend(prompts)
        return stream(self, prompts, params)

    monkeypatch.setattr(AlignedModel, "stream", counted)
    return asked


def seeded(count, seed=7, **settings):
    return [dataclasses.replace(PARAMS, seed=seed + i, **settings) for i in range(count)]


# ---- models in this process


def test_the_aligned_model_answers_as_generate_does_and_prompt_i_has_the_seed_plus_i(model, tmp_path):
    prompts = prompts_of([*TEXTS, CHAT, [{"role": "system", "content": "be"}, *CHAT]])
    with Journal(tmp_path / "a.jsonl") as journal:
        answers = answer_here(model, prompts, PARAMS, journal, "aligned")
    expected = model.generate(prompts.prompts, seeded(len(prompts)))
    assert answers.texts == [c.text for c in expected]
    assert answers.tokens == [c.tokens for c in expected]
    assert answers.finish_reasons == [c.finish_reason for c in expected]
    assert answers.texts[0] != answers.texts[3]  # the same prompt again, with a seed of its own
    assert answers.speed.keys() == {"tokens_per_second", "acceptance", "tokens_per_proposal_call"}


def test_who_drafts_is_part_of_what_a_seed_means(task, tmp_path):
    """A drafter with rows of its own gives other tokens, so its answers are others; how far it drafts changes nothing, and
    neither does what is looked up, whose answers are those of nobody's drafts."""
    settings = ({}, {"draft": "none"}, {"draft_temperature": 0.5}, {"draft": str(task / "proposal")})
    prompts = prompts_of([letter * 4 for letter in "defghijk"])
    with Journal(tmp_path / "a.jsonl") as journal:
        found = []
        for more in settings:
            model = AlignedModel.from_pretrained(task / "proposal", [task / "start"], **more)
            found.append(answer_here(model, prompts, PARAMS, journal, "aligned").texts)
            assert found[-1] == [c.text for c in model.generate(prompts.prompts, seeded(8))], more
        before = len(journal)
        again = AlignedModel.from_pretrained(task / "proposal", [task / "start"], num_speculative_tokens=0)
        assert answer_here(again, prompts, PARAMS, journal, "aligned").texts == found[0]
        looked_up = AlignedModel.from_pretrained(task / "proposal", [task / "start"], draft="ngram")
        assert answer_here(looked_up, prompts, PARAMS, journal, "aligned").texts == found[1]
        assert len(journal) == before
    assert len({tuple(texts) for texts in found}) == len(settings)


def test_where_answers_were_handed_over_is_kept_and_told(task, tmp_path):
    """In the journal, so that a resumed run knows it, too; and as a share and a mean in the report."""
    over = "confidence(window=2, threshold=0.02)"
    model = AlignedModel.from_pretrained(task / "proposal", [task / "start"], handover=over)
    prompts = prompts_of([letter * 4 for letter in "defghijk"])
    expected = [c.handover_at for c in model.generate(prompts.prompts, seeded(8))]
    assert any(at is not None for at in expected)
    with Journal(tmp_path / "a.jsonl") as journal:
        for _ in range(2):
            assert answer_here(model, prompts, PARAMS, journal, "aligned").handovers == expected
        plain = AlignedModel.from_pretrained(task / "proposal", [task / "start"])
        assert answer_here(plain, prompts, PARAMS, journal, "aligned").handovers is None
    assert describe_handovers([3, None, 5, None]) == {"handed_over": 0.5, "tokens_before_handover": 4}
    assert describe_handovers([None]) == {"handed_over": 0.0, "tokens_before_handover": None}
    assert describe_handovers(None) == {}


def test_the_proposal_answers_without_aligners_and_without_their_settings(task, tmp_path):
    """As a model that was loaded alone: rule, weight and the warps of its row are for aligners."""
    shaped = AlignedModel.from_pretrained(task / "proposal", [task / "start"], weight=2.0, proposal_top_k=2)
    with Bench(tmp_path, shaped, QUICK) as bench:
        found, _, name = bench.answer(System("proposal", "proposal"), PROMPTS, dataclasses.replace(PARAMS, weight=0.5))
    alone = AlignedModel.from_pretrained(task / "proposal")
    assert name == "proposal"
    assert found.texts == [c.text for c in alone.generate(TEXTS, seeded(5))]


def test_answers_are_computed_once_and_anew_where_anything_differs(model, computed, tmp_path):
    def run(prompts=TEXTS, params=PARAMS):
        computed.clear()
        with Journal(tmp_path / "a.jsonl") as journal:
            return answer_here(model, prompts_of(prompts), params, journal, "aligned")

    first = run()
    assert computed == TEXTS
    again = run()
    assert computed == []
    assert again == first
    run([*TEXTS[:2], "other", *TEXTS[3:]])
    assert computed == ["other"]
    for changed in ({"weight": 0.5}, {"temperature": 0.5}, {"rule": "geometric"}, {"seed": 99}, {"max_tokens": 5}):
        run(params=dataclasses.replace(PARAMS, **changed))
        assert computed == TEXTS, changed
    run()
    assert computed == []


@pytest.mark.parametrize("write_every", [0.0, 60.0])
def test_what_was_answered_before_a_failure_is_kept(model, computed, monkeypatch, tmp_path, write_every):
    """The work fails after some answers: the others alone are computed in the next run."""
    prompts = prompts_of([letter * 3 for letter in "defghijklmno"])
    whole = model.generate(prompts.prompts, seeded(12))
    computed.clear()
    counted, finished = AlignedModel.stream, []

    def failing(self, asked, params):
        for event in counted(self, asked, params):
            yield event
            finished.extend([event.prompt_index] if event.completion is not None else [])
            if len(finished) >= 5:
                raise RuntimeError("no more")

    monkeypatch.setattr(systems, "WRITE_EVERY", write_every)
    with Journal(tmp_path / "a.jsonl") as journal, monkeypatch.context() as patch:
        patch.setattr(AlignedModel, "stream", failing)
        with pytest.raises(RuntimeError):
            answer_here(model, prompts, PARAMS, journal, "aligned")
    assert computed == prompts.prompts
    computed.clear()
    with Journal(tmp_path / "a.jsonl") as journal:
        answers = answer_here(model, prompts, PARAMS, journal, "aligned")
    assert computed == [prompt for i, prompt in enumerate(prompts.prompts) if i not in finished]
    assert answers.texts == [c.text for c in whole]


def test_a_prompt_that_cannot_be_decoded_is_named_before_anything_is(model, computed, tmp_path):
    with Journal(tmp_path / "a.jsonl") as journal, pytest.raises(DataError, match=r"d:6: prompts\[0\] has 70 tokens"):
        answer_here(model, prompts_of([*TEXTS, "a" * 70]), PARAMS, journal, "aligned")
    assert computed == []


# ---- endpoints


def test_our_own_server_answers_what_the_model_here_does(task, model, monkeypatch, tmp_path):
    """Texts and chats, each with the seed that it has here; the second time it is not asked."""
    prompts = prompts_of([*TEXTS, CHAT])
    with running(folder_service(task / "proposal", {"q": task / "start"})) as server, Journal(tmp_path / "a.jsonl") as journal:
        answers, name = answer_remotely(parse_system(f"{server.url}#q"), prompts, PARAMS, journal, QUICK)
        first, listed = answer_remotely(parse_system(server.url), prompts, PARAMS, journal, QUICK)
        monkeypatch.setattr(RemoteModel, "_request", None)
        again, _ = answer_remotely(parse_system(f"{server.url}/v1#q"), prompts, PARAMS, journal, QUICK)
    assert (name, listed) == ("q", "base")
    assert answers.texts == again.texts == [c.text for c in model.generate(prompts.prompts, seeded(6))]
    alone = AlignedModel.from_pretrained(task / "proposal")
    assert first.texts == [c.text for c in alone.generate(prompts.prompts, seeded(6))]


def echo(asked, number):
    return Reply({"choices": [{"index": 0, "text": f"{asked.body['prompt']} {asked.body['seed']}"}]})


def test_an_endpoint_is_asked_for_what_is_missing_alone(tmp_path):
    """Each prompt keeps its seed, whatever else is missing."""
    expected = [f"{text} {7 + i}" for i, text in enumerate(TEXTS)]

    def stops(asked, number):
        return echo(asked, number) if asked.body["prompt"] != "kl" else Reply({"error": {"message": "no kl"}}, status=400)

    with scripted(stops, models=[{"id": "m"}]) as server:
        port = int(server.url.rpartition(":")[2])
        with Journal(tmp_path / "a.jsonl") as journal, pytest.raises(EndpointError, match="no kl"):
            answer_remotely(parse_system(server.url), PROMPTS, PARAMS, journal, dataclasses.replace(QUICK, concurrency=1))
    with scripted(echo, models=[{"id": "m"}], port=port) as server, Journal(tmp_path / "a.jsonl") as journal:
        answers, _ = answer_remotely(parse_system(server.url), PROMPTS, PARAMS, journal, QUICK)
        assert answers.texts == expected
        assert {body["prompt"] for body in server.posts()} == {"kl", "def", "mnop"}
        assert len(server.asked) == 3
        changed = prompts_of([TEXTS[0], "x", TEXTS[2], "y", TEXTS[4]])
        answers, _ = answer_remotely(parse_system(server.url), changed, PARAMS, journal, QUICK)
        assert [(body["prompt"], body["seed"]) for body in server.posts()[3:]] == [("x", 8), ("y", 10)]
        assert answers.texts == [expected[0], "x 8", expected[2], "y 10", expected[4]]


def test_rule_and_weight_are_not_an_endpoints(tmp_path):
    """So an endpoint is not asked again where a sweep has picked another weight."""
    with scripted(echo, models=[{"id": "m"}]) as server, Bench(tmp_path, None, QUICK) as bench:
        system = parse_system(server.url)
        first = bench.answer(system, PROMPTS, PARAMS)
        again = bench.answer(system, PROMPTS, dataclasses.replace(PARAMS, rule="geometric", weight=0.3))
        assert again == first
        assert len(server.asked) == len(PROMPTS)


# ---- files


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return parse_system(str(path))


def test_a_file_is_matched_by_prompt_in_any_order(tmp_path):
    """A prompt that is asked twice has its two answers in their order; one answer to it serves both."""
    rows = [{"instruction": text, "output": f"{text}!{i}", "generator": "g"} for i, text in enumerate(TEXTS)]
    answers, prompts, name = answer_from_file(write(tmp_path / "o.json", rows[::-1]), PROMPTS)
    assert answers.texts == ["def!3", "ghij!1", "kl!2", "def!0", "mnop!4"]
    assert prompts is PROMPTS
    assert name == "g"
    answers, _, _ = answer_from_file(write(tmp_path / "o.json", rows[1:]), PROMPTS)
    assert answers.texts[0] == answers.texts[3] == "def!3"


def test_rows_of_generate_are_outputs_too_and_chats_match_their_text(tmp_path):
    rows = [{"prompt": CHAT, "completion": "a", "index": 0}, {"prompt": [*CHAT, *CHAT], "completion": "b", "index": 0}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    system = parse_system(str(tmp_path / "mine.jsonl"))
    answers, _, name = answer_from_file(system, prompts_of([[*CHAT, *CHAT], CHAT, "def"]))
    assert (answers.texts, name) == (["b", "a", "a"], "mine")
    _, prompts, _ = answer_from_file(system, None)
    assert [show_prompt(prompt) for prompt in prompts.prompts] == ["def", "User: def\n\nUser: def"]


def test_a_missing_output_is_named(tmp_path):
    system = write(tmp_path / "o.json", [{"instruction": text, "output": "x"} for text in TEXTS if text != "kl"])
    with pytest.raises(DataError, match=r"o.json: has no output for the prompt of d:3: 'kl'"):
        answer_from_file(system, PROMPTS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a"}, "'output' must be a text"),
        ({"instruction": "a", "output": "\ud83d"}, "'output' is no valid Unicode"),
        ({"instruction": "\ud83d", "output": "a"}, "'instruction' is no valid Unicode"),
    ],
)
def test_a_row_that_is_no_output_is_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=f"o.json entry 1: {message}"):
        answer_from_file(write(tmp_path / "o.json", [row]), None)


def test_systems_are_told_by_their_names(tmp_path):
    (tmp_path / "outputs.json").write_text("[]", encoding="utf-8")
    assert parse_system("aligned") == System("aligned", "aligned")
    assert parse_system("http://h:1/v1#m/x") == System("endpoint", "m/x", "http://h:1/v1", "m/x")
    assert parse_system("http://h:1") == System("endpoint", "http://h:1", "http://h:1")
    assert parse_system(str(tmp_path / "outputs.json")).name == "outputs"
    for wrong in ("alligned", "http://", str(tmp_path)):
        with pytest.raises(InvalidOption, match=r"is no system: give proposal, aligned|is no endpoint"):
            parse_system(wrong)
