"""Chats: the template's prompt, OpenAI's shapes, streaming, and log-probabilities."""

import string

import openai
import pytest

from serving import running, table_service
from tiny import CHAT_TEMPLATE, EOS, tiny_tokenizer
from trimtab.core.rules import parse_rule
from trimtab.models.table import TableLM

LETTERS = string.ascii_lowercase + " "
V = len(LETTERS) + 1
TABLES = [TableLM.random(V, order=2, seed=seed) for seed in range(2)]
TOKENIZER = tiny_tokenizer(LETTERS, chat_template=CHAT_TEMPLATE)
MESSAGES = [{"role": "user", "content": "hello"}]
PROMPT = TOKENIZER("u hello<eos>a ")["input_ids"]


@pytest.fixture(scope="module")
def server():
    with running(table_service(TABLES, tokenizer=TOKENIZER)) as running_server:
        yield running_server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def ask(client, **asked):
    settings = {"model": "q0", "messages": MESSAGES, "seed": 3, "max_completion_tokens": 30} | asked
    return client.chat.completions.create(**settings)


def test_an_answer_has_openais_shape_and_the_templates_prompt(server, client):
    answer = ask(client, n=2)
    same = server.complete(model="q0", prompt=PROMPT, seed=3, max_tokens=30, n=2)
    assert answer.object == "chat.completion"
    assert [choice.message.content for choice in answer.choices] == [choice["text"] for choice in same["choices"]]
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == same["usage"]["completion_tokens"]
    assert {choice.finish_reason for choice in answer.choices} <= {"stop", "length"}


def test_a_stream_says_the_same_role_first_and_reason_last(client):
    whole = [choice.message.content for choice in ask(client, n=2).choices]
    chunks = list(ask(client, n=2, stream=True, stream_options={"include_usage": True}))
    for index in range(2):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == whole[index]
        assert [choice.finish_reason is not None for choice in mine] == [False] * (len(mine) - 1) + [True]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_are_those_of_the_aligned_rows(client, stream):
    settings = {"logprobs": True, "top_logprobs": 3, "extra_body": {"ignore_eos": True}, "max_completion_tokens": 8}
    if stream:
        chunks = [choice for chunk in ask(client, stream=True, **settings) for choice in chunk.choices]
        content = [token for choice in chunks if choice.logprobs for token in choice.logprobs.content]
    else:
        content = ask(client, **settings).choices[0].logprobs.content
    assert len(content) == 8
    ids = list(PROMPT)
    for token in content:
        row = parse_rule("product")(TABLES[0].row(ids), [TABLES[1].row(ids)], [1.0])
        best, at = row.topk(3)
        names = ["<eos>", *LETTERS]
        assert [other.token for other in token.top_logprobs] == [names[i] for i in at.tolist()]
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(best.tolist(), abs=1e-9)
        ids.append(names.index(token.token))
        assert token.logprob == pytest.approx(float(row[ids[-1]]), abs=1e-9)
        assert bytes(token.bytes).decode() == token.token


def test_conversations_parts_and_defaults(server, client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert ask(client, messages=parts).choices[0].message == ask(client).choices[0].message
    first = ask(client).choices[0].message
    again = [*MESSAGES, first.model_dump(), {"role": "user", "content": "more"}]
    assert ask(client, messages=again).usage.prompt_tokens > len(PROMPT)
    unsaid = server.post("/v1/chat/completions", model="q0", messages=MESSAGES, logit_bias={str(EOS): 100.0})
    assert unsaid.json()["choices"][0]["finish_reason"] == "stop"


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def test_tools_and_calls_reach_the_template():
    """`tool_choice: "none"` leaves tools out; calls have their arguments as objects, and a tool's answer is a message."""
    template = (
        "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% if loud %}loud {% endif %}{% for m in messages %}"
        "{{ m.role[0] }} {{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.x }}"
        "{% endfor %}<eos>{% endfor %}"
    )
    service = table_service(TABLES[:1], tokenizer=tiny_tokenizer(LETTERS, chat_template=template))
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    talk = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "so"}]
    with running(service) as server:

        def answers(**asked):
            asked = {"model": "base", "max_tokens": 6, "seed": 1, **asked}
            answer = server.post("/v1/chat/completions" if "messages" in asked else "/v1/completions", **asked).json()
            choice = answer["choices"][0]
            return choice["message"]["content"] if "messages" in asked else choice["text"], answer["usage"]["prompt_tokens"]

        text = "u hello<eos>"
        assert answers(messages=MESSAGES, tools=tools) == answers(prompt="look " + text)
        assert answers(messages=MESSAGES, tools=tools, tool_choice="none") == answers(messages=MESSAGES) == answers(prompt=text)
        assert answers(messages=MESSAGES, chat_template_kwargs={"loud": True}) == answers(prompt="loud " + text)
        assert answers(messages=talk) == answers(prompt=text + "a f1<eos>t so<eos>")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),  # this template does not know them
        ({"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "function"}]}]}, "messages"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_is_wrong_is_named(server, fields, param):
    answer = server.post("/v1/chat/completions", **{"model": "q0", "messages": MESSAGES} | fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
