"""Prompts and completions in every form that users write them, and `AlignedModel.score` against stock transformers models."""

import math
from typing import Any

import pytest
import torch
from tokenizers import normalizers, processors

from tiny import CHAT_TEMPLATE, EOS, bpe_tokenizer, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.core.rules import Geometric
from trimtab.decode import scoring
from trimtab.errors import DeadRow, InvalidOption, InvalidRequest, TrimtabError
from trimtab.models.table import TableLM

LETTERS = "abcdefghijklmnopqrstuvwxyz "
V = 1 + len(LETTERS)
PARAMS = SamplingParams(seed=0, max_tokens=4, logprobs=True)


def spell(text: str) -> list[int]:
    """The ids of a text in the tiny vocabulary, by its definition; # stands for the end of sequence."""
    return [EOS if letter == "#" else 1 + LETTERS.index(letter) for letter in text]


def table_model(**settings: Any) -> AlignedModel:
    tokenizer = settings.pop("tokenizer", tiny_tokenizer(LETTERS, chat_template=CHAT_TEMPLATE))
    eos = settings.pop("eos_token_ids", [EOS])
    proposal, aligner = TableLM.random(V, order=2, seed=0), TableLM.random(V, order=1, seed=1)
    return AlignedModel(proposal, [aligner], tokenizer, eos, **settings)


class Untouched(TableLM):
    """A model that must not be asked anything."""

    def new_state(self, slots: int, capacity: int):
        raise AssertionError("nothing may be computed before every prompt is checked")


def untouched(**settings: Any) -> AlignedModel:
    tokenizer = settings.pop("tokenizer", tiny_tokenizer(LETTERS, chat_template=CHAT_TEMPLATE))
    return AlignedModel(Untouched(torch.zeros(V)), (), tokenizer, [EOS], **settings)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# ---- the forms of a prompt


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hello there", spell("hello there")),
        ([8, 9], [8, 9]),
        ((8, 9), [8, 9]),
        ([user("hi")], spell("u hi#a ")),
        ((user("hi"),), spell("u hi#a ")),
        ([user("hi"), assistant("yo"), user("ok")], spell("u hi#a yo#u ok#a ")),
        ([{"role": "system", "content": "be nice", "name": "x"}, user("")], spell("s be nice#u #a ")),
    ],
    ids=["text", "ids", "tuple", "chat", "tuple chat", "turns", "system"],
)
def test_every_form_of_a_prompt_is_its_ids(prompt, ids):
    """The tables look two tokens back, so equal log-probabilities mean equal prompts."""
    model = table_model()
    (expected,) = model.generate([ids], PARAMS)
    assert expected.prompt_tokens == len(ids)
    assert model.generate([prompt], PARAMS) == [expected]
    assert model.generate(prompt, PARAMS) == [expected], "one prompt needs no list around it"
    assert model.generate(iter([prompt, prompt]), PARAMS) == [expected, expected]
    assert [event.completion for event in model.stream(prompt, PARAMS)][-1] == expected
    assert model.score([prompt], [[3, 4]]) == model.score([ids], [[3, 4]]) == model.score(prompt, [3, 4])


def test_one_message_is_a_chat():
    assert table_model().generate(user("hi"), PARAMS) == table_model().generate([[user("hi")]], PARAMS)


def test_forms_and_lengths_mix():
    prompts = ["a", [user("hello there")], [5, 6, 7], "the quick brown fox"]
    together = table_model().generate(prompts, PARAMS)
    assert together == [table_model().generate([prompt], PARAMS)[0] for prompt in prompts]
    assert [c.prompt_tokens for c in together] == [1, len("u hello there#a "), 3, 19]


def test_no_prompts_are_no_completions():
    assert table_model().generate([]) == []
    assert list(table_model().stream([])) == []
    assert table_model().score([], []) == []


def test_a_start_token_comes_once_and_only_where_the_tokenizer_puts_it():
    """A template writes its own start token, ids are taken as they are, and a completion does not start anew."""
    tokenizer = tiny_tokenizer(LETTERS, chat_template="z" + CHAT_TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="z $A", special_tokens=[("z", 26)])
    model = table_model(tokenizer=tokenizer)
    for prompt, ids in [("ab", spell("zab")), ([user("ab")], spell("zu ab#a ")), (spell("ab"), spell("ab"))]:
        assert model.generate([prompt], PARAMS) == model.generate([ids], PARAMS)
    assert model.score(["ab"], ["cd"])[0].tokens == spell("cd#")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "is empty"),
        ([], "is empty"),
        ([[]], "must be"),
        ([V], f"ids from 0 to {V - 1}, not {V}"),
        ([1, -1], "not -1"),
        ([1, 2.0], "not 2.0"),
        ([1, True], "not True"),
        ([1, "a"], "not 'a'"),
        ([user("a"), "b"], r"\[1\] must be a message"),
        ([1, user("a")], r"\[0\] must be a message"),
        ([user("a"), {"role": "user"}], r"\[1\] must be a message with 'role' and 'content'"),
        ([{"content": "a"}], r"\[0\] must be a message"),
        ([{"role": None, "content": "a"}], r"\[0\] must be a message"),
        ([{}], r"\[0\] must be a message"),
        (None, "must be"),
        (3.5, "must be"),
        (b"ab", "must be"),
    ],
    ids=lambda x: repr(x)[:30],
)
def test_a_malformed_prompt_is_refused_by_its_place_before_anything_is_computed(prompt, message):
    with pytest.raises(InvalidRequest, match=rf"^prompts\[1\].*{message}"):
        untouched().generate(["fine", prompt])
    with pytest.raises(InvalidRequest, match=rf"^prompts\[1\].*{message}"):
        untouched().score(["fine", prompt], ["a", "b"])


@pytest.mark.parametrize("prompts", [None, 5, 3.5], ids=repr)
def test_what_is_no_prompt_at_all_is_refused(prompts):
    with pytest.raises(InvalidRequest, match="prompts"):
        untouched().generate(prompts)


def test_a_stream_refuses_when_it_is_asked_for_and_not_at_its_first_event():
    with pytest.raises(InvalidRequest, match=r"prompts\[0\] is empty"):
        untouched().stream("")


def test_a_text_without_tokens_is_refused():
    """A tokenizer that normalises everything away."""
    tokenizer = tiny_tokenizer(LETTERS)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(InvalidRequest, match=r"prompts\[0\] has no tokens"):
        untouched(tokenizer=tokenizer).generate("xx")


def test_text_and_chat_need_a_tokenizer_and_a_template():
    bare = AlignedModel(Untouched(torch.zeros(V)))
    with pytest.raises(InvalidRequest, match=r"prompts\[0\] is a text.*without a tokenizer.*token ids"):
        bare.generate("ab")
    with pytest.raises(InvalidRequest, match=r"prompts\[0\] is a chat.*no chat template"):
        bare.generate([[user("ab")]])
    with pytest.raises(InvalidRequest, match=r"prompts\[0\] is a chat.*no chat template"):
        untouched(tokenizer=tiny_tokenizer(LETTERS)).generate([[user("ab")]])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ messages[5].content }}", "has no element 5"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_template_that_fails_is_an_invalid_request(template, message):
    tokenizer = tiny_tokenizer(LETTERS, chat_template=template)
    with pytest.raises(InvalidRequest, match=rf"^prompts\[0\]: the chat template refuses it: .*{message}"):
        untouched(tokenizer=tokenizer).generate([[user("ab")]])


def test_a_template_that_writes_nothing_is_an_invalid_request():
    with pytest.raises(InvalidRequest, match=r"prompts\[0\]"):
        untouched(tokenizer=tiny_tokenizer(LETTERS, chat_template="{{ '' }}")).generate([[user("ab")]])


def test_a_text_with_tokens_that_the_model_lacks_is_refused():
    """The tokenizer knows 28 tokens, the model 5."""
    with pytest.raises(InvalidRequest, match=r"prompts\[0\]"):
        AlignedModel(TableLM.random(5, seed=0), (), tiny_tokenizer(LETTERS)).generate("z")


# ---- the forms of a completion


@pytest.mark.parametrize(
    ("prompt", "completion", "ids"),
    [
        ("ab", "cd", spell("cd#")),
        ("ab", "", [EOS]),
        ([1, 2], "cd", spell("cd#")),
        ("ab", spell("cd"), spell("cd")),
        ("ab", tuple(spell("cd#")), spell("cd#")),
        ([user("ab")], assistant("cd"), spell("cd#")),
        ([user("ab")], [assistant("cd")], spell("cd#")),
        ([user("ab")], "cd", spell("cd#")),
        ([user("ab")], assistant(""), [EOS]),
    ],
    ids=repr,
)
def test_every_form_of_a_completion_is_its_ids(prompt, completion, ids):
    """A text or message has the end of sequence added and counted; ids are scored as they are."""
    model = table_model()
    (score,) = model.score([prompt], [completion])
    assert score.tokens == ids
    assert len(score.proposal) == len(score.aligner) == len(score.aligned) == len(ids)
    (expected,) = model.score([prompt], [ids])
    assert (score.proposal, score.aligner, score.aligned) == (expected.proposal, expected.aligner, expected.aligned)
    assert model.score(prompt, completion) == [score], "one pair needs no lists around it"


def test_the_length_in_bytes_is_that_of_the_text():
    tokenizer = bpe_tokenizer(["the café in 北京 "], chat_template="{% for m in messages %}{{ m.content }}<eos>{% endfor %}")
    model = AlignedModel(TableLM.random(len(tokenizer), seed=0), (), tokenizer, [EOS])
    chat = [user("the")]
    cases = [("the", "café"), (chat, assistant("café")), (chat, [assistant("北京 café")]), ("the", ""), ("the", [5, 6])]
    scores = model.score([prompt for prompt, _ in cases], [completion for _, completion in cases])
    assert [score.num_bytes for score in scores] == [5, 5, 12, 0, None]


def test_the_length_in_bytes_does_not_depend_on_an_end_of_sequence():
    """Without one, the last token of a message is text."""
    template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}{% endfor %}{% if add_generation_prompt %}a {% endif %}"
    model = table_model(tokenizer=tiny_tokenizer(LETTERS, chat_template=template), eos_token_ids=[])
    message, text = model.score([[user("ab")], [user("ab")]], [assistant("yes"), "yes"])
    assert message.tokens == text.tokens == spell("yes")
    assert message.num_bytes == text.num_bytes == 3


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("ab", [], "is empty"),
        ("ab", [V], f"ids from 0 to {V - 1}"),
        ("ab", assistant("cd"), "its prompt is no chat"),
        ([user("ab")], {"role": "assistant"}, "must be a message"),
        ([user("ab")], 5, "must be"),
        ("ab", None, "completions"),
        ("ab", [1, "a"], "completions"),
    ],
    ids=repr,
)
def test_a_malformed_completion_is_refused_by_its_place(prompt, completion, message):
    with pytest.raises(InvalidRequest, match=message) as error:
        untouched().score(["fine", prompt], ["a", completion])
    assert "completions[1]" in str(error.value) or "prompts[1]" in str(error.value)


def test_a_template_that_rewrites_the_past_cannot_be_scored():
    tokenizer = tiny_tokenizer(
        LETTERS, chat_template="{{ 'x' * (messages|length) }}" + CHAT_TEMPLATE.replace("{% if", " {% if")
    )
    with pytest.raises(InvalidRequest, match=r"completions\[0\]: the chat template does not continue the prompt"):
        untouched(tokenizer=tokenizer).score([[user("ab")]], [assistant("cd")])


def test_an_empty_completion_needs_an_end_of_sequence():
    with pytest.raises(InvalidRequest, match=r"completions\[0\] is empty"):
        table_model(eos_token_ids=[]).score(["ab"], [""])
    assert table_model(eos_token_ids=[]).score(["ab"], ["cd"])[0].tokens == spell("cd")


def test_prompts_and_completions_come_in_pairs():
    with pytest.raises(InvalidRequest, match="there are 2 prompts, but 1 completions"):
        untouched().score(["a", "b"], ["c"])
    with pytest.raises(InvalidRequest, match="there are 1 prompts, but 2 completions"):
        untouched().score("a", ["b", "c"])


def test_a_pair_that_exceeds_the_context_is_refused():
    model = AlignedModel.from_pretrained(tiny_model("llama", V, max_position_embeddings=8), tokenizer=tiny_tokenizer(LETTERS))
    assert len(model.score(["abcd"], ["abc"])[0].tokens) == 4, "with its end of sequence the pair has 8 tokens"
    with pytest.raises(InvalidRequest, match=r"prompts\[1\] and completions\[1\] have 4 \+ 5 tokens.*context holds 8"):
        model.score(["a", "abcd"], ["a", "abcd"])


# ---- scores are those of the stock models


def stock_rows(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """The stock model's rows before each token of the completion, from one uncached forward pass, `[T, V]` in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, :, :V].double()
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]


def at(rows: torch.Tensor, tokens: list[int]) -> list[float]:
    return rows[torch.arange(len(tokens)), tokens].tolist()


PAIRS = [("ab", "cdefg"), ("the quick brown fox", "a"), ("z", "jumps over the lazy dog"), ("hello", "")]


@pytest.fixture(scope="module")
def stock() -> list[Any]:
    return [tiny_model("gpt2", V, spread=0.3), *(tiny_model("llama", V, seed=seed, spread=0.3) for seed in (1, 2))]


@pytest.mark.parametrize(
    ("rule", "weight"), [("product", 0.7), ("product", -0.4), (Geometric(), 0.3)], ids=["product", "anti-expert", "geometric"]
)
def test_scores_are_those_of_the_stock_models(stock, rule, weight):
    """product: log p̃ + λ log q − log Z.  geometric: (1 − w) log p̃ + w log q − log Z.  With tempered inputs."""
    model = AlignedModel.from_pretrained(
        stock[0], stock[1], tokenizer=tiny_tokenizer(LETTERS), proposal_temperature=0.8, aligner_temperature=1.6
    )
    scores = model.score(*zip(*PAIRS, strict=True), SamplingParams(rule=rule, weight=weight))
    for (prompt, completion), score in zip(PAIRS, scores, strict=True):
        tokens = spell(completion + "#")
        assert score.tokens == tokens
        p, q = (stock_rows(one, spell(prompt), tokens) for one in stock[:2])
        warm_p, warm_q = torch.log_softmax(p / 0.8, -1), torch.log_softmax(q / 1.6, -1)
        share = 1 - weight if isinstance(rule, Geometric) else 1.0
        target = torch.log_softmax(share * warm_p + weight * warm_q, -1)
        assert score.proposal == pytest.approx(at(p, tokens), abs=1e-4), "the proposal's own, without any warp"
        assert score.aligner == pytest.approx(at(q, tokens), abs=1e-4)
        assert score.aligned == pytest.approx(at(target, tokens), abs=1e-4)


def test_several_aligners_have_a_column_each(stock):
    model = AlignedModel.from_pretrained(stock[0], stock[1:], weight=[0.5, -0.3], tokenizer=tiny_tokenizer(LETTERS))
    for (prompt, completion), score in zip(PAIRS, model.score(*zip(*PAIRS, strict=True)), strict=True):
        tokens = spell(completion + "#")
        p, q, r = (stock_rows(one, spell(prompt), tokens) for one in stock)
        assert [at(q, tokens), at(r, tokens)] == [pytest.approx(column, abs=1e-4) for column in score.aligner]
        assert score.aligned == pytest.approx(at(torch.log_softmax(p + 0.5 * q - 0.3 * r, -1), tokens), abs=1e-4)


def test_the_bare_proposal_is_its_own_aligned_model(stock):
    model = AlignedModel.from_pretrained(stock[0], tokenizer=tiny_tokenizer(LETTERS))
    (score,) = model.score("ab", "cd")
    assert (
        score.aligned
        == score.proposal
        == pytest.approx(at(stock_rows(stock[0], spell("ab"), spell("cd#")), spell("cd#")), abs=1e-4)
    )
    assert score.aligner == []


def test_tokens_outside_the_proposals_nucleus_are_impossible(stock):
    """A token is in the nucleus when what is strictly more probable has less mass than top-p."""
    model = AlignedModel.from_pretrained(stock[0], stock[1], tokenizer=tiny_tokenizer(LETTERS), proposal_top_p=0.5)
    prompt, tokens = "hello", spell("abcdefghijklmnopqrstuvwxyz #")
    (score,) = model.score([prompt], [tokens])
    p, q = (stock_rows(one, spell(prompt), tokens) for one in stock[:2])
    impossible = 0
    for t, token in enumerate(tokens):
        probs = p[t].exp()
        inside = torch.tensor([float(probs[probs > x].sum()) < 0.5 for x in probs])
        if inside[token]:
            expected = torch.log_softmax(torch.where(inside, p[t] + q[t], -math.inf), -1)[token]
            assert score.aligned[t] == pytest.approx(float(expected), abs=1e-4)
        else:
            assert score.aligned[t] == -math.inf
            impossible += 1
    assert 0 < impossible < len(tokens)
    assert all(map(math.isfinite, score.proposal)), "as it is, the proposal excludes nothing"


def test_scores_do_not_depend_on_the_batch(stock, monkeypatch):
    prompts, completions = zip(*PAIRS, strict=True)
    pair = {"tokenizer": tiny_tokenizer(LETTERS)}
    expected = [AlignedModel.from_pretrained(*stock[:2], **pair).score([p], [c])[0] for p, c in PAIRS]
    whole = AlignedModel.from_pretrained(*stock[:2], **pair).score(prompts, completions)
    by_two = AlignedModel.from_pretrained(*stock[:2], **pair, max_num_seqs=2).score(prompts, completions)
    monkeypatch.setattr(scoring, "ROW_BUDGET", 3 * len(PAIRS) * V)  # three tokens a step
    in_steps = AlignedModel.from_pretrained(*stock[:2], **pair).score(prompts, completions)
    for other in (whole, by_two, in_steps):
        assert [(s.tokens, s.num_bytes) for s in other] == [(s.tokens, s.num_bytes) for s in expected]
        for one, same in zip(other, expected, strict=True):
            assert one.proposal == pytest.approx(same.proposal, abs=5e-5)
            assert one.aligned == pytest.approx(same.aligned, abs=5e-5)


@pytest.mark.parametrize(
    "rule", ["product", "geometric", "nucleus", "nucleus(force_eos=True)", "kl_gate(tau=1.0)", "mixture", "nudge"]
)
def test_the_score_of_a_completion_is_what_generate_reported(rule):
    """Bit for bit on tables: the same rows, warps and rule."""
    model = table_model(rule=rule, proposal_top_p=0.9, aligner_temperature=0.7)
    prompts = ["ab", "hello there", [user("hi")]]
    out = model.generate(prompts, SamplingParams(seed=0, max_tokens=12, logprobs=True, temperature=0.6, top_k=9))
    scores = model.score(prompts, [c.tokens for c in out])
    for completion, score in zip(out, scores, strict=True):
        assert score.tokens == completion.tokens
        assert (score.proposal, score.aligner, score.aligned) == (
            completion.logprobs.proposal,
            completion.logprobs.aligner,
            completion.logprobs.aligned,
        )


def test_the_score_of_a_models_completion_is_what_generate_reported(stock):
    model = AlignedModel.from_pretrained(stock[0], stock[1:], tokenizer=tiny_tokenizer(LETTERS), weight=[0.5, 0.5])
    prompts = [prompt for prompt, _ in PAIRS]
    out = model.generate(prompts, SamplingParams(seed=0, max_tokens=15, logprobs=True))
    for completion, score in zip(out, model.score(prompts, [c.tokens for c in out]), strict=True):
        assert score.proposal == pytest.approx(completion.logprobs.proposal, abs=5e-5)
        assert score.aligner == [pytest.approx(column, abs=5e-5) for column in completion.logprobs.aligner]
        assert score.aligned == pytest.approx(completion.logprobs.aligned, abs=5e-5)


def test_scores_of_all_next_tokens_sum_to_one():
    """Σ_v exp log p(v | x) = 1 over all completions of one token."""
    model = table_model()
    first = model.score(["ab"] * V, [[token] for token in range(V)])
    assert math.fsum(math.exp(score.aligned[0]) for score in first) == pytest.approx(1, abs=1e-12)


def test_a_rule_without_a_row_cannot_score():
    with pytest.raises(InvalidOption, match=r"rule 'candidates\(n=4\)' has no next-token row.*can sample, but not score"):
        table_model(rule="candidates(n=4)").score(["ab"], ["cd"])


def test_a_row_without_mass_is_an_error_and_no_number():
    """The supports of proposal and aligner do not meet: there is no distribution to score with."""
    proposal, aligner = (
        TableLM(torch.where(torch.arange(V) == best, 0.0, -math.inf).expand(V + 1, V).double()) for best in (1, 2)
    )
    model = AlignedModel(proposal, [aligner], eos_token_ids=[EOS])
    assert model.generate([[1]])[0].finish_reason == "error"
    with pytest.raises(DeadRow, match=r"'product' leaves no possible token after 0 tokens of completions\[0\]"):
        model.score([[1]], [[1, 1]])


def test_wrong_weights_are_refused_before_anything_is_computed():
    with pytest.raises(InvalidRequest, match="weight has 1 numbers, but there are 0 aligners"):
        untouched().score(["ab"], ["cd"], SamplingParams(weight=[1.0]))


def test_the_end_of_a_chat_answer_is_the_templates_own():
    """A tokenizer whose end of text is not the end of a turn: answers end with the turn's, as decoding draws it."""
    template = "{% for m in messages %}{{ m.content }}z{% endfor %}"
    tokenizer = tiny_tokenizer(chat_template=template)
    turn = tokenizer.convert_tokens_to_ids("z")
    model = AlignedModel.from_pretrained(tiny_model("llama", 28), tokenizer=tokenizer, eos_token_ids=[EOS, turn])
    chat = [{"role": "user", "content": "ab"}]
    answers = [[{"role": "assistant", "content": "cd"}], {"role": "assistant", "content": "cd"}, "cd"]
    for answer in answers:
        assert tokenizer.decode(model.score([chat], [answer])[0].tokens) == "cdz"
    with pytest.raises(InvalidRequest, match="must be one message, not 2"):
        model.score([chat], [[{"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(["a"], {"max_tokens": 2}), "params must be SamplingParams"),
        (lambda m: m.generate(["a"], 3), "params must be SamplingParams"),
        (lambda m: m.generate(["a"], [None]), "params must be SamplingParams"),
        (lambda m: m.generate([b"\x02\x03"]), "must be a text, messages, or token ids"),
        (lambda m: m.generate(["a\ud800"]), "lone surrogate at character 1"),
        (lambda m: m.score("a", 5), "completions must be texts"),
        (lambda m: m.score("a", ["b"], params={}), "params must be SamplingParams"),
        (lambda m: SamplingParams(weight=object()), "weight must be a number"),
        (lambda m: SamplingParams(weight={1.0: 2}), "weight must be a number"),
        (lambda m: SamplingParams(weight=1e300), "weight must be a number"),
        (lambda m: SamplingParams(logit_bias={3: 1e39}), r"logit_bias\[3\] must be a number"),
        (lambda m: SamplingParams(repetition_penalty=1e-50), "repetition_penalty must be a number"),
        (lambda m: AlignedModel(m.proposal, rule=5), "rule must be the name"),
        (lambda m: AlignedModel(m.proposal, max_num_seqs=1.5), "max_num_seqs must be an integer"),
        (lambda m: AlignedModel(m.proposal, eos_token_ids=[99]), "eos_token_ids must be ids from 0 to 27"),
        (lambda m: AlignedModel(m.proposal, draft="par"), "draft must be one of aligner, corpus, ngram, none"),
        (lambda m: AlignedModel(m.proposal, num_speculative_tokens="a"), "num_speculative_tokens must be from 0"),
        (lambda m: AlignedModel.from_pretrained(None), "must be folders, hub ids or models"),
        (lambda m: AlignedModel.from_pretrained(m.proposal, [None]), "must be folders, hub ids or models"),
        (lambda m: AlignedModel.from_pretrained(m.proposal, tokenizer=5), "tokenizer must be a tokenizer"),
        (lambda m: AlignedModel.from_pretrained(m.proposal, eos_token_ids=5), "eos_token_ids must be a list"),
    ],
)
def test_what_is_of_the_wrong_kind_is_named(call, message):
    model = AlignedModel.from_pretrained(tiny_model("llama", 28), tokenizer=tiny_tokenizer())
    with pytest.raises(TrimtabError, match=message):
        call(model)


def test_tensors_of_ids_are_prompts():
    model = AlignedModel.from_pretrained(tiny_model("llama", 28), tokenizer=tiny_tokenizer())
    params = SamplingParams(max_tokens=3, seed=0)
    expected = model.generate([[2, 3]], params)
    assert model.generate(torch.tensor([2, 3]), params) == expected
    assert model.generate(torch.tensor([[2, 3]]), params) == expected


def test_a_huge_top_k_keeps_everything():
    model = AlignedModel.from_pretrained(tiny_model("llama", 28), tokenizer=tiny_tokenizer())
    plain = model.generate("a", SamplingParams(n=20, max_tokens=1, seed=0))
    for huge in (2**63 - 1, 10**400):
        same = model.generate("a", SamplingParams(n=20, max_tokens=1, seed=0, top_k=huge, proposal_top_k=huge))
        assert [c.tokens for c in same] == [c.tokens for c in plain]


def test_a_nan_aligner_is_an_error_under_every_rule():
    broken = tiny_model("llama", 28)
    broken.model.norm.weight.data.fill_(torch.nan)
    model = AlignedModel.from_pretrained(tiny_model("llama", 28), broken, tokenizer=tiny_tokenizer())
    for rule in ("product", "geometric", "nucleus", "kl_gate", "candidates(n=2)", "mixture", "nudge", "gate"):
        (dead,) = model.generate("a", SamplingParams(max_tokens=1, seed=0, rule=rule))
        assert dead.finish_reason == "error"
        assert "aligner 0 gives NaN" in dead.error
