"""What is accepted means what it says; what is not is refused in one sentence that names it, whatever the body."""

import json
from itertools import chain
from typing import Required, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params as text_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionMessage,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError

from trimtab.decode.request import SamplingParams
from trimtab.errors import InvalidRequest
from trimtab.serve.bodies import LoadAligner, UnloadAligner
from trimtab.serve.explain import explain
from trimtab.serve.schema import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ResponseFormat,
    StreamOptions,
    TextPart,
)

COMPLETION = {"model": "m", "prompt": "x"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
LOAD = {"name": "polite", "path": "polite"}
BASES = {CompletionRequest: COMPLETION, ChatRequest: CHAT, LoadAligner: LOAD, UnloadAligner: {"name": "polite"}}


def parse(model, **fields):
    return model.model_validate_json(json.dumps(BASES[model] | fields))


def refusal(model, body):
    with pytest.raises(ValidationError) as info:
        model.model_validate_json(body if isinstance(body, str | bytes) else json.dumps(body))
    return explain(info.value)


def said_of(model, body):
    """The refusal, or nothing where there is none."""
    try:
        model.model_validate_json(json.dumps(body))
    except ValidationError as error:
        return explain(error)[0]
    return ""


def sampling(request):
    given = {name: value for name, value in request.sampling(5, True, 0).items() if value != []}
    del given["top_logprobs"]
    return SamplingParams(**given)


def refused(model, **fields):
    return refusal(model, BASES[model] | fields)


def test_the_least_body_has_the_defaults_of_sampling():
    request = parse(CompletionRequest)
    assert (request.max_tokens, request.completions, request.prompts, request.include_usage) == (None, 1, ["x"], False)
    given = request.sampling(16, False, 0)
    assert {name: given.pop(name) for name in ("max_tokens", "logprobs", "top_logprobs")} == {
        "max_tokens": 16,
        "logprobs": False,
        "top_logprobs": 0,
    }
    assert SamplingParams(**given) == SamplingParams()


def test_null_is_the_default_in_every_field_that_has_one():
    for model, base in ((CompletionRequest, COMPLETION), (ChatRequest, CHAT)):
        nulls = {name: None for name, field in model.model_fields.items() if not field.is_required()}
        request = model.model_validate_json(json.dumps(base | nulls))
        assert request.sampling(5, False, 0) == {"max_tokens": 5, "logprobs": False, "top_logprobs": 0}
        assert model is CompletionRequest or request.limit is None


def test_every_sampling_field_arrives_under_its_name():
    fields = {
        "n": 3,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "seed": -(2**63),
        "rule": "product",
        "weight": [1, 2.5],
        "proposal_temperature": 0.7,
        "proposal_top_k": 5,
        "proposal_top_p": 0.9,
        "aligner_temperature": 2,
    }
    given = parse(CompletionRequest, **fields, logit_bias={"7": -100, "0": 1.5}).sampling(9, True, 2)
    assert given == fields | {"logit_bias": {7: -100, 0: 1.5}, "max_tokens": 9, "logprobs": True, "top_logprobs": 2}
    del given["top_logprobs"]
    assert SamplingParams(**given).n == 3


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", [""]),
        ("ab", ["ab"]),
        (["a", ""], ["a", ""]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_a_prompt_is_one_or_several(prompt, prompts):
    assert parse(CompletionRequest, prompt=prompt).prompts == prompts


def nullable(params):
    """The fields of one of OpenAI's typed parameters that need not be given."""
    hints = get_type_hints(params, include_extras=True)
    return [name for name, hint in hints.items() if get_origin(hint) is not Required]


@pytest.mark.parametrize(
    ("model", "params", "body"),
    [
        (ChatRequest, chat_params.CompletionCreateParamsBase, lambda nulls: CHAT | nulls),
        (ChatRequest, chat_params.CompletionCreateParamsStreaming, lambda nulls: CHAT | nulls),
        (CompletionRequest, text_params.CompletionCreateParamsBase, lambda nulls: COMPLETION | nulls),
        (CompletionRequest, text_params.CompletionCreateParamsStreaming, lambda nulls: COMPLETION | nulls),
        (ChatRequest, ChatCompletionStreamOptionsParam, lambda nulls: CHAT | {"stream": True, "stream_options": nulls}),
        *(
            (ChatRequest, params, lambda nulls, role=role: CHAT | {"messages": [{"content": "x"} | nulls | {"role": role}]})
            for role, params in (
                ("assistant", ChatCompletionAssistantMessageParam),
                ("user", ChatCompletionUserMessageParam),
                ("system", ChatCompletionSystemMessageParam),
                ("developer", ChatCompletionDeveloperMessageParam),
            )
        ),
    ],
)
def test_null_is_not_given_wherever_openais_schema_has_a_field(model, params, body):
    """Alone and all together, and it changes nothing."""
    names = [name for name in nullable(params) if name not in BASES[model]]
    plain = model.model_validate_json(json.dumps(body({})))
    assert names
    for chosen in (*([name] for name in names), names):
        asked = model.model_validate_json(json.dumps(body(dict.fromkeys(chosen))))
        assert sampling(asked) == sampling(plain)
        assert model is CompletionRequest or asked.limit is None


NEUTRAL = {
    "tools": [],
    "functions": [],
    "tool_choice": "auto",
    "function_call": "none",
    "parallel_tool_calls": True,
    "modalities": ["text"],
    "service_tier": "auto",
    "verbosity": "medium",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "store": False,
    "user": "",
    "metadata": {},
    "logit_bias": {},
    "stop": [],
    "stop_token_ids": [],
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
}
LACKED = {
    "functions": [{"name": "f"}],
    "tool_choice": "required",
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "service_tier": "flex",
    "verbosity": "low",
    "reasoning_effort": "low",
    "audio": {"voice": "v", "format": "wav"},
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "prompt_cache_retention": "24h",
    "store": True,
    "frequency_penalty": 1,
}


@pytest.mark.parametrize("model", [CompletionRequest, ChatRequest])
def test_what_asks_for_nothing_is_taken_and_what_asks_for_more_is_refused_by_name(model):
    for name, value in NEUTRAL.items():
        assert sampling(parse(model, **{name: value})) == sampling(parse(model))
    for name, value in LACKED.items():
        message, param = refused(model, **{name: value})
        assert message.startswith(f"{name} must be ")
        assert "null" in message
        assert param == name


def test_tools_belong_to_chats():
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
    assert parse(ChatRequest, tools=tools).chat == {"messages": CHAT["messages"], "tools": tools}
    message, param = refused(CompletionRequest, tools=tools)
    assert (message.partition(",")[0], param) == ("tools must be a list of functions", "tools")
    for wrong, said in (
        ({"type": "function", "name": "f", "function": {"name": "f"}}, "unknown field 'tools[0].name'"),
        ({"name": "f"}, "tools[0].type is missing: it must be 'function'"),
        ({"type": "function", "function": {}}, "tools[0].function.name is missing: it must be a text"),
        ({"type": "function", "function": {"name": "f", "strict": True}}, "tools[0].function.strict must be false or null"),
        ({"type": "web_search", "function": {"name": "f"}}, "tools[0].type must be 'function': there are no other kinds"),
    ):
        assert refused(ChatRequest, tools=[wrong])[0].startswith(said)


def test_no_top_logprobs_need_no_logprobs():
    assert parse(ChatRequest, top_logprobs=0).top_logprobs == 0


def test_an_assistant_may_have_said_nothing():
    asked = parse(ChatRequest, messages=[*CHAT["messages"], {"role": "assistant", "content": None}, {"role": "assistant"}])
    assert asked.chat[1:] == 2 * [{"role": "assistant", "content": ""}]


def test_what_clients_send_unasked_is_ignored():
    parse(CompletionRequest, user="u", store=False, metadata={"a": "b"}, presence_penalty=0, frequency_penalty=0.0, suffix="")
    parse(ChatRequest, user="u", store=None, metadata={}, response_format={"type": "text"})


def test_an_answer_of_ours_can_be_sent_back():
    """OpenAI's client sends what it was given: `message.model_dump()` has all these nulls."""
    nulls = dict.fromkeys(["refusal", "annotations", "audio", "function_call", "tool_calls", "name", "reasoning_content"])
    answer = {"role": "assistant", "content": "hi"} | nulls
    assert set(ChatCompletionMessage.model_fields) <= set(nulls | answer)
    parse(ChatRequest, messages=[answer | {"tool_calls": [], "annotations": []}])
    request = parse(ChatRequest, messages=[{"role": "user", "content": "x"}, answer])
    assert request.chat == [{"role": "user", "content": "x"}, {"role": "assistant", "content": "hi"}]


def test_parts_are_joined_by_newlines_and_a_developer_is_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse(ChatRequest, messages=[{"role": "developer", "content": parts, "name": "n"}])
    assert request.chat == [{"role": "system", "content": "a\nb", "name": "n"}]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 4, "max_completion_tokens": 4}, 4),
    ],
)
def test_the_limit_of_a_chat_has_two_names(fields, limit):
    assert parse(ChatRequest, **fields).limit == limit


def test_an_aligner_is_named_in_a_field_of_its_own_too():
    assert parse(ChatRequest, aligner="a").aligner == "a"
    assert parse(ChatRequest, aligner=["a", "b"]).aligner == ["a", "b"]


def test_aligners_are_loaded_by_either_spelling():
    assert parse(LoadAligner) == LoadAligner.model_validate_json('{"aligner_name": "polite", "aligner_path": "polite"}')
    assert UnloadAligner.model_validate_json('{"aligner_name": "a"}').name == "a"
    assert parse(LoadAligner, pin=True).pin


# ---- refusals


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"temperature": "hot"}, "temperature must be a number at least 0, not 'hot'", "temperature"),
        ({"temperature": True}, "temperature must be a number at least 0, not true", "temperature"),
        ({"n": 0}, "n must be an integer at least 1 and at most 128, not 0", "n"),
        ({"n": True}, "n must be an integer at least 1 and at most 128, not true", "n"),
        ({"n": "1"}, "n must be an integer at least 1 and at most 128, not '1'", "n"),
        ({"stream": 1}, "stream must be true or false, not 1", "stream"),
        ({"temprature": 1}, "unknown field 'temprature': did you mean 'temperature'?", "temprature"),
        ({"guided_json": {}}, "unknown field 'guided_json': this server does not have it; leave it out", "guided_json"),
        ({"messages": []}, "unknown field 'messages': it belongs to /v1/chat/completions", "messages"),
        ({"pin": True}, "unknown field 'pin': it belongs to /v1/load_aligner", "pin"),
        (
            {"presence_penalty": 0.5},
            "presence_penalty must be 0 or null: it is not supported, use repetition_penalty, not 0.5",
            "presence_penalty",
        ),
        ({"stop": ["a", ""]}, "stop must be a text or a list of at most 16 texts, none of them empty; stop[1] is ''", "stop"),
        (
            {"stop": ["a"] * 17},
            "stop must be a text or a list of at most 16 texts, none of them empty, not a list of 17",
            "stop",
        ),
        (
            {"weight": [1, "x"]},
            "weight must be a number from -1e+06 to 1e+06, or a list with one for each aligner; weight[1] is 'x'",
            "weight",
        ),
        (
            {"prompt": [[1], ["a"]]},
            "prompt must be a text, a list of texts, a list of token ids, or a list of lists of token ids; prompt[1][0] is 'a'",
            "prompt",
        ),
        (
            {"logit_bias": {"a": 1}},
            "logit_bias must be an object from token ids to numbers from -1e+06 to 1e+06, not 'a'",
            "logit_bias",
        ),
        ({"best_of": 2}, "best_of must be 1 or null: choosing among completions is not supported, not 2", "best_of"),
        ({"max_tokens": 0}, "max_tokens may be 0 only with echo; otherwise it must be at least 1", "max_tokens"),
        ({"store": True}, "store must be false or null: nothing is stored, not true", "store"),
        ({"suffix": "b"}, "suffix must be empty or null: it is not supported, not 'b'", "suffix"),
        ({"stream_options": {}}, "stream_options is allowed only when stream is true", "stream_options"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage must be true or false, not 1",
            "stream_options",
        ),
    ],
)
def test_a_refusal_of_a_completion_is_one_sentence(fields, message, param):
    assert refused(CompletionRequest, **fields) == (message, param)


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages[0].role must be 'system', 'developer', 'user', 'assistant' or 'tool', not 'robot'",
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type must be 'text': parts of other types are not supported, not 'image_url'",
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            'messages[0].content must be a text or a list of parts {"type": "text", "text": …}, not null',
            "messages",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing: it must be a text or a list of parts", "messages"),
        ({"messages": [{"role": "user", "content": "x", "foo": 1}]}, "unknown field 'messages[0].foo'", "messages"),
        (
            {"messages": [{"role": "user", "content": "x", "seed": 1}]},
            "unknown field 'messages[0].seed': it belongs to the request itself",
            "messages",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0].type is missing: it must be 'function': there are no other kinds",
            "messages",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "y"}]},
            "messages[0].reasoning_content must be null: it is not supported, not 'y'",
            "messages",
        ),
        ({"include_usage": True}, "unknown field 'include_usage': it belongs to 'stream_options'", "include_usage"),
        ({"content": "x"}, "unknown field 'content': it belongs to 'messages'", "content"),
        ({"prompt": "x"}, "unknown field 'prompt': it belongs to /v1/completions", "prompt"),
        ({"refusal": "x"}, "unknown field 'refusal': this server does not have it; leave it out", "refusal"),
        (
            {"messages": []},
            "messages must be a list of at least one message with 'role' and 'content', not a list of 0",
            "messages",
        ),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens and max_completion_tokens differ", "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs to be true", "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type must be 'text'", "response_format"),
    ],
)
def test_a_refusal_of_a_chat_is_one_sentence(fields, message, param):
    said, about = refused(ChatRequest, **fields)
    assert said.startswith(message)
    assert about == param


def test_no_name_is_suggested_for_itself():
    """Any name that is known somewhere, at any level where it is not."""
    levels = [
        (ChatRequest, lambda extra: CHAT | extra),
        (CompletionRequest, lambda extra: COMPLETION | extra),
        (ChatRequest, lambda extra: CHAT | {"messages": [{"role": "user", "content": "x"} | extra]}),
        (
            ChatRequest,
            lambda extra: CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"} | extra]}]},
        ),
        (ChatRequest, lambda extra: CHAT | {"stream": True, "stream_options": extra}),
        (ChatRequest, lambda extra: CHAT | {"response_format": {"type": "text"} | extra}),
        (UnloadAligner, lambda extra: {"name": "a"} | extra),
    ]
    inner = (ChatMessage, TextPart, StreamOptions, ResponseFormat)
    for name in sorted({*chain.from_iterable(model.model_fields for model in (*BASES, *inner))}):
        for model, body in levels:
            assert f"did you mean {name!r}?" not in said_of(model, body({name: "x"}))


def test_a_missing_field_is_named():
    assert refusal(ChatRequest, {"model": "m"}) == (
        "messages is missing: it must be a list of at least one message with 'role' and 'content'",
        "messages",
    )


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "é", "a\n", "x" * 129, None, 3])
def test_the_name_of_an_aligner_is_plain(name):
    assert refused(LoadAligner, name=name)[1] == "name"


@pytest.mark.parametrize("body", ["", "{", b"\xff", "[" * 10_000, '{"a":' * 500, '{"model": "\\ud800"}', "{} {}", "NaN,"])
def test_what_is_not_json_is_said_to_be_none(body):
    message, param = refusal(CompletionRequest, body)
    assert message.startswith("the body is not JSON: ")
    assert param is None


@pytest.mark.parametrize(("body", "shown"), [("[1]", "a list of 1"), ("3", "3"), ('"x"', "'x'"), ("null", "null")])
def test_a_body_is_an_object(body, shown):
    assert refusal(ChatRequest, body) == (f"the body must be a JSON object, not {shown}", None)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400])
@pytest.mark.parametrize("name", ["temperature", "weight", "aligner_temperature", "proposal_temperature"])
def test_numbers_are_finite(name, number):
    assert refusal(CompletionRequest, f'{{"model": "m", "prompt": "x", "{name}": {number}}}')[1] == name


@pytest.mark.parametrize("number", [2**31, 2**63, -(2**31), 10**300])
@pytest.mark.parametrize("name", ["max_tokens", "top_k", "proposal_top_k", "n"])
def test_counts_fit_into_tensors(name, number):
    assert refused(CompletionRequest, **{name: number})[1] == name


@pytest.mark.parametrize("text", ["x" * 100_000, "\N{PILE OF POO}" * 1000, "\n" * 1000])
@pytest.mark.parametrize("name", ["temperature", "seed", "store", "logit_bias", None])
def test_little_of_the_input_is_repeated(name, text):
    message, param = refused(CompletionRequest, **({text: 1} if name is None else {name: text}))
    assert len(message) < 200
    assert len(param or "") <= 80


def test_a_hostile_list_is_refused_at_its_first_wrong_item():
    body = json.dumps(COMPLETION | {"prompt": [True] * 100_000})
    with pytest.raises(ValidationError) as info:
        CompletionRequest.model_validate_json(body)
    assert info.value.error_count() <= 8


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "role", "name", "1"]), inner),
    max_leaves=5,
)
FIELDS = sorted({*chain.from_iterable(model.model_fields for model in BASES), "foo"})


@given(st.sampled_from(sorted(BASES, key=lambda m: m.__name__)), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_any_body_is_accepted_or_explained(model, fields):
    """And what is accepted passes `SamplingParams`: the two have the same bounds."""
    try:
        request = model.model_validate_json(json.dumps(BASES[model] | fields))
    except ValidationError as error:
        message, param = explain(error)
        assert param in {*BASES[model], *fields}
        assert param in message or "unknown" in message
        assert "\n" not in message
        return
    if isinstance(request, CompletionRequest | ChatRequest):
        given = request.sampling(1, False, 0) | {"rule": None}
        del given["top_logprobs"]
        SamplingParams(**given)


@pytest.mark.parametrize("model", [CompletionRequest, ChatRequest])
def test_the_schema_has_the_bounds_of_sampling(model):
    """At each bound of the JSON schema `SamplingParams` agrees, and, where it has one, refuses the next number."""
    wider = {"n", "seed", "top_k", "proposal_top_k", "max_tokens", "max_completion_tokens"}  # what does not fit into tensors
    wider |= {"presence_penalty", "frequency_penalty", "logprobs", "top_logprobs", "best_of"}
    for name, schema in model.model_json_schema()["properties"].items():
        for kind in schema.get("anyOf", [schema]):
            for key, step in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0)):
                if key not in kind or name in wider:
                    continue
                bound = kind[key]
                if step:
                    SamplingParams(**{name: bound})
                with pytest.raises(InvalidRequest):
                    SamplingParams(**{name: bound + step})


@pytest.mark.parametrize("model", BASES)
def test_the_schema_refuses_unknown_fields(model):
    schema = model.model_json_schema()
    objects = [schema, *schema.get("$defs", {}).values()]
    assert all(item["additionalProperties"] is False for item in objects)
