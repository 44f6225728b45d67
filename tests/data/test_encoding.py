"""Texts to ids, for tokenizers of every kind: training, scoring, decoding and the harness must read the same ids.

The reference is the tokenizer itself on prompt and answer as one text. Where that text is split is checked by what the parts
decode to.
"""

import datetime
import json
import logging

import pytest
import torch
from tokenizers import processors

from kinds import BOS, ENDING, EOS, KINDS, TEMPLATE, UNK, byte_level, llama, metaspace
from trimtab import AlignedModel
from trimtab.data.encoding import Encoder
from trimtab.data.examples import encode_records
from trimtab.data.prompts import Chat
from trimtab.data.records import Record
from trimtab.data.template import read_chat_template
from trimtab.errors import DataError, InvalidOption, InvalidRequest
from trimtab.evaluate.harness import TrimtabLM
from trimtab.models.table import TableLM

PAIRS = [
    ("The capital of France is", " Paris"),
    ("Assistant:", " it is the word 42"),
    ("what is it?\n", "the word"),
    ("the", "re"),
    ("in 北京", " café"),
]
QUESTION = {"role": "user", "content": "what is it?"}


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def make(tokenizer, **settings) -> Encoder:
    return Encoder(tokenizer, len(tokenizer), [EOS], **settings)


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def aligned(tokenizer) -> AlignedModel:
    return AlignedModel(TableLM(torch.zeros(len(tokenizer))), (), tokenizer, [EOS])


@pytest.mark.parametrize(("prompt", "answer"), PAIRS)
def test_prompt_and_answer_are_one_text_split_at_the_border(tokenizer, prompt, answer):
    encoder = make(tokenizer)
    ids, answer_ids = encoder.pair(prompt, answer)
    assert ids + answer_ids == tokenizer(prompt + answer)["input_ids"] + [EOS]
    assert ids == encoder.prompt(prompt) == tokenizer(prompt)["input_ids"]


def test_a_chat_is_split_where_the_template_says(tokenizer):
    """`[/INST]Paris`, without a space: an answer that is encoded alone would get one from SentencePiece."""
    encoder, ask = make(tokenizer), "<s>[INST] what is it? [/INST]"
    ids, answer_ids = encoder.pair([QUESTION], "Paris")
    assert ids == encoder.prompt([QUESTION]) == plain(tokenizer, ask)
    assert ids + answer_ids == plain(tokenizer, ask + "Paris</s>")
    assert answer_ids[-1] == EOS
    assert answer_ids.count(EOS) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_training_scoring_and_the_harness_read_the_same_ids(kind):
    tokenizer = KINDS[kind]()
    encoder, model = make(tokenizer), aligned(tokenizer)
    harness = TrimtabLM(model)
    for prompt, answer in [*PAIRS, ("is ", "Paris"), ([QUESTION], "Paris")]:
        (example,) = encode_records([Record(prompt, answer, None, "here")], encoder, 100)
        ((scored, scored_answer, _),) = model.encode_pairs([prompt], [answer])
        assert (example.prompt.tolist(), example.chosen.tolist()) == (scored, scored_answer)
        text = prompt if isinstance(prompt, str) else harness.apply_chat_template(prompt)
        if text == text.rstrip():  # the harness counts spaces between them as the answer's, and we follow it there
            assert harness._encode_pair(text, answer) == (scored, scored_answer[:-1])
        assert harness.tok_encode(text) == encoder.prompt(prompt)


def test_a_rendered_chat_that_comes_as_a_text_has_one_bos(tokenizer):
    encoder, text = make(tokenizer), "<s>[INST] what is it? [/INST]"
    assert encoder.prompt(text) == encoder.prompt([QUESTION])
    assert encoder.prompt(text).count(BOS) == 1
    assert encoder.pair(text, "Paris") == encoder.pair([QUESTION], "Paris")
    assert TrimtabLM(aligned(tokenizer)).tok_encode(text) == encoder.prompt(text)


@pytest.mark.parametrize("kind", ["byte level", "metaspace first", "prepend normaliser"])
def test_a_template_without_a_bos_gets_none_in_the_harness_either(kind):
    """Zephyr's: its tokenizer puts a BOS before texts, and chats go without."""
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    model = aligned(tokenizer)
    harness, chat = TrimtabLM(model), [QUESTION]
    text = harness.apply_chat_template(chat)
    assert harness.tok_encode(text) == model.encoder.prompt(chat)
    assert BOS not in harness.tok_encode(text)
    assert harness._encode_pair(text, "Paris")[0] == model.encoder.prompt(chat)
    assert harness.tok_encode("what is it?")[0] == BOS


@pytest.mark.parametrize("kind", ENDING)
def test_what_a_tokenizer_appends_is_no_part_of_a_prompt(kind):
    tokenizer = ENDING[kind]()
    encoder, whole = make(tokenizer), tokenizer("Assistant: it")["input_ids"]
    assert whole[-1] == EOS
    assert encoder.prompt("Assistant: it") == whole[:-1]
    assert encoder.pair("Assistant:", " it") == (tokenizer("Assistant:")["input_ids"][:-1], [*whole[len(whole) - 2 :]])
    assert TrimtabLM(aligned(tokenizer)).tok_encode("Assistant: it") == whole[:-1]


def test_an_answer_behind_ids_is_encoded_as_it_stands_behind_their_text(tokenizer):
    encoder = make(tokenizer)
    for prompt, answer in PAIRS[:4]:
        ids, answer_ids = encoder.pair(prompt, answer)
        assert encoder.pair(ids, answer) == (ids, answer_ids)


# ---- where both share a token


def test_a_token_that_begins_in_the_prompt_is_the_answers():
    tokenizer = byte_level()
    encoder = make(tokenizer)
    ids, answer_ids = encoder.pair("The capital is ", "Paris")
    assert tokenizer.convert_ids_to_tokens(ids + answer_ids)[-4:] == ["Ġis", "ĠPa", "ris", "</s>"]
    assert [*ids, *plain(tokenizer, " ")] == encoder.prompt("The capital is ")
    assert encoder.answers("The capital is ", ["Paris"], "p", ["a"], [True]).shares_token
    assert not encoder.answers("The capital is", [" Paris"], "p", ["a"], [True]).shares_token


def test_both_answers_of_a_pair_are_behind_the_same_prompt():
    encoder = make(byte_level())
    ids, (chosen, rejected), _ = encoder.answers("The capital is ", ["Paris", "\n"], "p", ["a", "b"], [True, True])
    assert ids + chosen == [*encoder.text("The capital is Paris", "t"), EOS]
    assert ids + rejected == [*encoder.text("The capital is \n", "t"), EOS]


def test_training_warns_of_prompts_that_end_inside_a_token(caplog):
    records = [Record(prompt, "Paris", None, "x") for prompt in ("it is ", "it is\n", "is ")]
    with caplog.at_level(logging.WARNING):
        encode_records(records, make(byte_level()), 100)
    assert "of 3 records, 2 have a prompt whose end and whose answer's beginning are one token" in caplog.text


@pytest.mark.parametrize("is_legacy", [True, False])
def test_without_anything_shared_the_prompt_is_kept_whole(is_legacy):
    """`t` and `he` are one token, and no BOS stands before it."""
    tokenizer = llama(is_legacy)
    assert plain(tokenizer, "the") == [tokenizer.convert_tokens_to_ids("▁the")]
    ids, answer_ids = make(tokenizer).pair("t", "he")
    assert ids == plain(tokenizer, "t")
    assert tokenizer.convert_ids_to_tokens(answer_ids) == ["he", "</s>"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "word piece"])
@pytest.mark.parametrize(("prompt", "answer"), [("The capital is ", "Paris"), ("北", "京"), ("t", "he"), ("Pa", "ris")])
def test_an_answer_behind_ids_that_would_merge_with_it_has_no_space_of_its_own(kind, prompt, answer):
    tokenizer = KINDS[kind]()
    encoder = make(tokenizer)
    given = encoder.prompt(prompt)
    ids, answer_ids = encoder.pair(given, answer)
    assert ids == given
    assert tokenizer.decode(ids + answer_ids, skip_special_tokens=True) == prompt + answer


# ---- the end of sequence


@pytest.mark.parametrize("prompt", ["Assistant:", [QUESTION]], ids=["text", "chat"])
def test_an_end_that_is_written_in_the_answer_counts_once(tokenizer, prompt):
    encoder = make(tokenizer)
    assert encoder.pair(prompt, " Paris</s>") == encoder.pair(prompt, " Paris")
    assert encoder.pair(prompt, " Paris</s>\n") == encoder.pair(prompt, " Paris")
    assert encoder.pair(prompt, " Paris</s>", ended=False)[1] == encoder.pair(prompt, " Paris")[1][:-1]


@pytest.mark.parametrize("prompt", ["Assistant:", [QUESTION]], ids=["text", "chat"])
def test_an_answer_that_goes_on_behind_its_end_is_refused(tokenizer, prompt):
    with pytest.raises(
        InvalidRequest, match=r"^completion goes on behind an end of sequence, '</s>', with 'and Rome': end it there"
    ):
        make(tokenizer).pair(prompt, " Paris</s> and Rome")


def test_an_end_in_parts_of_a_message_or_without_a_name_is_seen_too():
    """Judged by ids: what follows the first end may only be what the template writes there."""
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]\n{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}"
        "{% endif %}{{ eos_token }} and so on\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    encoder = make(tokenizer)
    answer_ids = encoder.pair([QUESTION], "Paris")[1]
    assert tokenizer.decode(answer_ids) == "Paris</s>", "the template's own tail is left out"
    for content in ("Paris</s>", "Paris</s></s>"):
        assert encoder.pair([QUESTION], content)[1] == answer_ids
    for content in ("Paris</s> and Rome", [{"type": "text", "text": "Paris</s> and Rome"}]):
        with pytest.raises(InvalidRequest, match=r"goes on behind an end of sequence, '</s>', with .*and Rome"):
            encoder.pair([QUESTION], {"role": "assistant", "content": content})
    newline = Encoder(tokenizer, len(tokenizer), [EOS, plain(tokenizer, "\n")[0]])
    with pytest.raises(InvalidRequest, match="with 'is the': end it there"):
        newline.pair("Q:", " it\nis the")


def test_a_template_that_ends_the_prompt_first_loses_no_answer():
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if not loop.first %}{{ eos_token }}{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(InvalidRequest, match="goes on behind an end of sequence, '</s>', with 'Paris'"):
        make(tokenizer).pair([QUESTION], "Paris")


@pytest.mark.parametrize("tail", ["<|im_end|>\n", " END", "</s>\n"])
def test_an_answer_that_was_cut_does_not_learn_what_the_template_writes_behind(tail):
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}" + f"[{{{{ m.role }}}}]\n{{{{ m.content }}}}{tail}" + "{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    encoder = make(tokenizer)
    cut, whole = (encoder.pair([QUESTION], "Paris is", ended=ended)[1] for ended in (False, True))
    assert tokenizer.decode(cut) == "Paris is"
    assert tokenizer.decode(whole) == "Paris is" + (tail + "</s>" if "</s>" not in tail else "</s>")


def test_two_start_tokens_come_once_each():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <unk> $A", special_tokens=[("<s>", BOS), ("<unk>", UNK)]
    )
    for text in ("it", "<s>it", "<s><unk>it"):
        assert make(tokenizer).prompt(text) == [BOS, UNK, *plain(tokenizer, "it")]


# ---- the date


CLOCK = "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.content }} {% endfor %}"


def test_a_template_that_writes_the_date_writes_the_one_that_is_given():
    tokenizer = metaspace("first")
    tokenizer.chat_template = CLOCK
    given = make(tokenizer, date="2024-02-29")
    assert given.prompt([QUESTION]) == plain(tokenizer, "29 Feb 2024 what is it? ")
    assert given.chat_settings["date"] == "2024-02-29"
    assert make(tokenizer, date="2024-03-01").prompt([QUESTION]) != given.prompt([QUESTION])
    tokenizer.chat_template = "{% set day = strftime_now('%-d.%m.%y %A %%d') %}\n  {% if day %}{{ day }}{% endif %}"
    assert given.render(Chat([QUESTION], [], {}), "p", answer=True) == "29.02.24 Thursday %d"
    for directives in ("%e %F %D %T %C %g", "%_d %^a %#d %0y %-e", "%Ey %Od %R %h %k"):
        tokenizer.chat_template = "{{ strftime_now('" + directives + "') }}"
        assert given.render(Chat([QUESTION], [], {}), "p", answer=True) == datetime.datetime(2024, 2, 29).strftime(directives)
    assert make(metaspace("first"), date="2024-02-29").chat_settings["date"] is None, "this one writes none"


@pytest.mark.parametrize("date", ["today", "2024-02-30", "", 20240229, "20240229", "2024-W09-4"])
def test_what_is_no_date_is_refused(date):
    with pytest.raises(InvalidOption, match="date must be YYYY-MM-DD"):
        make(byte_level(), date=date)


# ---- tools, and what else a template is told


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
TOOLED = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if thinking %}think {% endif %}{% for m in messages %}{{ m.role }}:"
    "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %} {% endfor %}"
)


def tooled() -> Encoder:
    tokenizer = byte_level()
    tokenizer.chat_template = TOOLED
    return make(tokenizer)


def test_tools_and_settings_reach_the_template():
    encoder = tooled()
    text = json.dumps(TOOLS) + "think user:what is it? "
    prompt = {"messages": [QUESTION], "tools": TOOLS, "chat_template_kwargs": {"thinking": True}}
    assert encoder.prompt(prompt) == plain(encoder.tokenizer, text)
    ids, answer_ids = encoder.pair(prompt, "Paris")
    assert ids + answer_ids == [*plain(encoder.tokenizer, text + "assistant:Paris "), EOS]
    assert encoder.prompt({"messages": [QUESTION]}) == encoder.prompt([QUESTION])


@pytest.mark.parametrize("arguments", ['{"at": "sea"}', {"at": "sea"}], ids=["text", "object"])
def test_a_call_in_the_history_needs_no_content_and_its_arguments_are_an_object(arguments):
    encoder = tooled()
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": arguments}}]}
    messages = [QUESTION, call, {"role": "tool", "content": "a ship"}]
    assert encoder.prompt(messages) == plain(encoder.tokenizer, 'user:what is it? assistant:{"at": "sea"} tool:a ship ')


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"messages": [QUESTION], "tool": []}, "unknown field 'tool': a chat has messages, tools and chat_template_kwargs"),
        ({"messages": "hello"}, "prompt: messages must be a list, not 'hello'"),
        ({"messages": [{"role": "user"}]}, r"prompt: messages\[0\] must be a message"),
        ({"messages": [QUESTION], "tools": {"a": 1}}, "tools must be a list of JSON schemas"),
        ({"messages": [QUESTION], "tools": ["look"]}, "tools must be a list of JSON schemas"),
        ({"messages": [QUESTION], "chat_template_kwargs": ["a"]}, "chat_template_kwargs must map names to values"),
        ({"messages": [QUESTION], "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs cannot set 'tokenize'"),
    ],
)
def test_a_malformed_chat_is_refused(prompt, message):
    with pytest.raises(InvalidRequest, match=message):
        tooled().prompt(prompt)


def test_a_template_that_rewrites_history_is_refused_with_the_way_out():
    tokenizer = byte_level()
    tokenizer.chat_template = "{% if messages | length > 1 %}short{% else %}{{ messages[0].content }}{% endif %}"
    with pytest.raises(InvalidRequest, match=r"does not continue the prompt.*--chat_template_path"):
        make(tokenizer).pair([QUESTION], "Paris")
    with pytest.raises(DataError, match=r"^here: .*--chat_template_path"):
        encode_records([Record([QUESTION], "Paris", None, "here")], make(tokenizer), 100)


LLAMA3 = (
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}{%- if messages[0].role == 'system' %}"
    "{%- set messages = messages[1:] %}{%- endif %}{%- if tools is not none %}{{ tools | tojson }}{%- endif %}"
    "{% for m in messages %}{{ m.content }}{% if 'tool_calls' in m %}called{% endif %}{% endfor %}"
)


def test_what_a_template_does_not_know_is_refused_and_not_what_it_only_mentions():
    """By its variables: comments, loop variables and fields of messages are none."""
    call = {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    tokenizer = byte_level()
    tokenizer.chat_template = "{# tools are not supported #}{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    encoder = make(tokenizer)
    for field in ("role", "content", "m", "e", "loop"):
        with pytest.raises(InvalidRequest, match=f"chat_template_kwargs: '{field}' would change nothing"):
            encoder.prompt({"messages": [QUESTION], "chat_template_kwargs": {field: "x"}})
    with pytest.raises(InvalidRequest, match=r"^tools would change nothing: the chat template of prompt does not know it"):
        encoder.prompt({"messages": [QUESTION], "tools": TOOLS})
    with pytest.raises(InvalidRequest, match=r"^messages: 'tool_calls' would change nothing"):
        encoder.prompt([QUESTION, call])
    tokenizer.chat_template = LLAMA3
    assert encoder.prompt({"messages": [QUESTION], "tools": TOOLS}) == plain(tokenizer, json.dumps(TOOLS) + "what is it?")
    assert encoder.prompt([QUESTION, call]) == plain(tokenizer, "what is it?xcalled")
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools | tojson }}"}
    assert encoder.prompt({"messages": [QUESTION], "tools": TOOLS}) == plain(tokenizer, json.dumps(TOOLS))


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", LLAMA3]
)
def test_a_file_with_a_template_is_read(tmp_path, template):
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
    assert read_chat_template(str(tmp_path / "t.jinja")) == template


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% if x", "t.jinja:1: "),
        ('{"prompt": "a"}', "is no chat template: it does not read 'messages'"),
        (None, "No such file"),
    ],
)
def test_a_file_without_one_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "t.jinja").write_text(text, encoding="utf-8")
    with pytest.raises(InvalidOption, match=f"^chat_template_path: .*{message}"):
        read_chat_template(str(tmp_path / "t.jinja"))
