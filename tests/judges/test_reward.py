"""Reward models: every score equals a plain forward pass of transformers over one row without padding."""

import json
import logging
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tiny import CHAT_TEMPLATE, EOS, SHAPES, Trap, save_tiny, tiny_model, tiny_tokenizer
from trimtab.errors import CheckpointError, InvalidOption, InvalidRequest, ModelError, UnsupportedModel
from trimtab.judges.rewards.classifier import RewardModel
from trimtab.judges.scoring import bradley_terry as preference

LETTERS = "abcdefghijklmnopqrstuvwxyz "
V = 32
BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
PROMPTS = ["how are you", "hi", "what is the time", "no", "who goes there", "a", "so"]
ANSWERS = ["well", "hello to you too", "noon", "", "a friend", "b", "it goes"]


def classifier(kind: str = "llama", labels: int = 1, *, seed: int = 0, **settings: Any) -> Any:
    """A random classifier of an architecture; decoders have no padding token unless one is set."""
    shape = SHAPES.get(kind, BERT)
    ids = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": None}
    config = CONFIG_MAPPING[kind](**{"vocab_size": V, "num_labels": labels, **ids, **shape, **settings})
    model = AutoModelForSequenceClassification.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
"""`model_input_names` of a BERT tokenizer."""


def marked_tokenizer(start: str, end: str | None = None, **settings: Any) -> PreTrainedTokenizerFast:
    """A token for each letter; special tokens put `start` first and, for an encoder, `end` after each sequence."""
    specials = {"<eos>": EOS, "<pad>": 1, start: 2} | ({end: 3} if end else {})
    vocab = specials | {letter: i + 4 for i, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}" if end else f"{start} $A",
        pair=f"{start} $A {end} $B:1 {end}:1" if end else f"{start} $A $B",
        special_tokens=[(token, i) for token, i in specials.items()],
    )
    role = {"cls_token": start, "sep_token": end, "pad_token": "<pad>"} if end else {"bos_token": start}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **role, **settings)


def letters(text: str, first: int = 1) -> list[int]:
    return [LETTERS.index(letter) + first for letter in text]


def alone(model: Any, ids: list[int], **inputs: list[int]) -> torch.Tensor:
    """Logits of one row, as transformers computes them by itself."""
    with torch.no_grad():
        return model(torch.tensor([ids]), **{name: torch.tensor([value]) for name, value in inputs.items()}).logits[0]


def close(values: Any) -> Any:
    return pytest.approx(values, abs=1e-5, rel=0)


# ---- what is fed, and that a batch gives what a row gives alone


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("padding", [None, EOS, 30, -1])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_decoder_reads_prompt_and_answer_as_one_text(kind, padding, batch_size):
    """The configuration's padding may be missing, the end of sequence, an id of its own, or LLaMA's −1."""
    model = classifier(kind, pad_token_id=padding)
    scores = RewardModel(model, tiny_tokenizer(), batch_size=batch_size).score(PROMPTS, ANSWERS)
    assert scores == close([alone(model, letters(p + a)).item() for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    assert model.config.pad_token_id == padding


@pytest.mark.parametrize("padding", [None, EOS, 30])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_chat_template_is_used_where_there_is_one(padding, side):
    """With `<eos>` as padding, transformers reads the score at the token before the template's last `<eos>`; so do we."""
    model = classifier("qwen2", pad_token_id=padding)
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE, padding_side=side, pad_token="<eos>")
    judge = RewardModel(model, tokenizer, batch_size=4)
    expected = [
        alone(model, [*letters(f"u {p}"), EOS, *letters(f"a {a}"), EOS]).item() for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    assert judge.score(PROMPTS, ANSWERS) == close(expected)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert judge.score(chats, ANSWERS) == close(expected)


def test_a_conversation_keeps_all_its_messages():
    model = classifier()
    chat = [
        {"role": role, "content": text}
        for role, text in [("system", "be"), ("user", "hi"), ("assistant", "yo"), ("user", "ok")]
    ]
    ids = [*letters("s be"), EOS, *letters("u hi"), EOS, *letters("a yo"), EOS, *letters("u ok"), EOS, *letters("a no"), EOS]
    judge = RewardModel(model, tiny_tokenizer(chat_template=CHAT_TEMPLATE))
    assert judge.score([chat], ["no"]) == close([alone(model, ids).item()])
    assert judge.score(chat, "no") == close([alone(model, ids).item()])


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, "<bos>" + CHAT_TEMPLATE])
def test_a_template_alone_decides_on_the_start_token(template):
    """The tokenizer would put `<bos>` first by itself: twice, where the template has it, and wrongly, where it has not."""
    model = classifier()
    tokenizer = marked_tokenizer("<bos>", chat_template=template)
    ids = [*letters("u hi", 4), EOS, *letters("a yo", 4), EOS]
    ids = [2, *ids] if template.startswith("<bos>") else ids
    assert RewardModel(model, tokenizer).score(["hi"], ["yo"]) == close([alone(model, ids).item()])


def test_without_a_template_the_tokenizer_puts_its_start_token():
    model = classifier()
    judge = RewardModel(model, marked_tokenizer("<bos>"))
    assert judge.score(["hi"], ["yo"]) == close([alone(model, [2, *letters("hiyo", 4)]).item()])


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize(
    ("kind", "settings", "typed"),
    [
        ("bert", {}, True),
        ("bert", {"type_vocab_size": 1}, False),
        ("roberta", {"type_vocab_size": 1}, False),
        ("distilbert", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}, False),
    ],
)
def test_an_encoder_reads_a_pair(kind, settings, typed, batch_size):
    """Segment ids are for models that have several segments. An empty answer is a second sequence too."""
    model = classifier(kind, **settings)
    judge = RewardModel(model, marked_tokenizer("[CLS]", "[SEP]", model_input_names=INPUTS), batch_size=batch_size)
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        first, second = [2, *letters(prompt, 4), 3], [*letters(answer, 4), 3]
        types = {"token_type_ids": [0] * len(first) + [1] * len(second)} if typed else {}
        expected.append(alone(model, first + second, **types).item())
    assert judge.score(PROMPTS, ANSWERS) == close(expected)
    assert judge.score([[{"role": "user", "content": PROMPTS[0]}]], ANSWERS[:1]) == close(expected[:1])


def test_a_tokenizer_that_gives_no_segments_is_taken_at_its_word():
    model = classifier("bert")
    judge = RewardModel(model, marked_tokenizer("[CLS]", "[SEP]"))
    assert judge.score("hi", "yo") == close([alone(model, [2, *letters("hi", 4), 3, *letters("yo", 4), 3]).item()])


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, "[CLS]" + CHAT_TEMPLATE + "[SEP]"])
def test_an_encoder_with_a_template_still_starts_with_the_token_that_it_reads(template):
    model = classifier("bert")
    ids = [2, *letters("u hi", 4), EOS, *letters("a yo", 4), EOS, 3]
    judge = RewardModel(model, marked_tokenizer("[CLS]", "[SEP]", chat_template=template))
    assert judge.score(["hi"], ["yo"]) == close([alone(model, ids).item()])


def test_as_many_rows_as_the_model_has_tokens_leave_one_to_pad_with():
    """Every id but one ends a row."""
    model = classifier(vocab_size=28)
    endings = list(LETTERS)
    starts = ["x" * (1 + i % 5) for i in range(27)]
    tokenizer = tiny_tokenizer()
    many = RewardModel(model, tokenizer, batch_size=100).score(starts, endings)
    assert many == close(RewardModel(model, tokenizer, batch_size=1).score(starts, endings))


DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("deberta-v2", DEBERTA | {"position_buckets": 8, "pooler_hidden_size": 32}),
        (
            "bart",
            {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "eos_token_id": 3, "forced_eos_token_id": None} | HEADS,
        ),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
        ("bloom", {"n_layer": 2, "n_head": 4, "pad_token_id": None}),
        ("gemma", {}),
        ("gpt_neox", {}),
    ],
)
def test_a_batch_gives_what_each_row_gives_alone(kind, settings):
    model, tokenizer = classifier(kind, **settings), marked_tokenizer("[CLS]", "[SEP]")
    scores = RewardModel(model, tokenizer, batch_size=16).score(PROMPTS, ANSWERS)
    assert scores == close(RewardModel(model, tokenizer, batch_size=1).score(PROMPTS, ANSWERS))
    assert len({round(score, 4) for score in scores}) == len(PROMPTS)


def test_two_labels_give_log_odds():
    model = classifier(labels=2)
    expected = [alone(model, letters(p + a)) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    odds = [torch.log(row.softmax(0)[1] / row.softmax(0)[0]).item() for row in expected]
    assert RewardModel(model, tiny_tokenizer()).score(PROMPTS, ANSWERS) == close(odds)


@pytest.mark.parametrize("labels", [3, 5])
def test_more_labels_are_refused_by_name(labels, tmp_path):
    save_tiny(tmp_path, classifier(labels=labels), tiny_tokenizer())
    with pytest.raises(ModelError, match=rf"has {labels} labels \(LABEL_0, LABEL_1, LABEL_2"):
        RewardModel.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"has {labels} labels"):
        RewardModel(classifier(labels=labels), tiny_tokenizer())


def test_nothing_is_scored_of_nothing():
    assert RewardModel(classifier(), tiny_tokenizer()).score([], []) == []


def test_no_gradient_is_kept_and_the_model_is_in_evaluation_mode():
    model = classifier(attention_dropout=0.9).train()
    judge = RewardModel(model, tiny_tokenizer())
    assert judge.score(["hi"], ["yo"]) == judge.score(["hi"], ["yo"])
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- truncation


def test_the_beginning_of_a_prompt_is_cut_and_counted(caplog):
    model = classifier()
    judge = RewardModel(model, tiny_tokenizer(), max_length=8)
    with caplog.at_level(logging.WARNING, logger="trimtab"):
        scores = judge.score(["abcdefgh", "ab", "abcd"], ["xyz", "xyz", "xyzxyzxyz"])
    assert scores == close([alone(model, letters(text)).item() for text in ("defghxyz", "abxyz", "yzxyzxyz")])
    assert judge.truncated == 2
    assert caplog.messages == ["2 of 3 prompts with their answers lost their beginning to fit 8 tokens"]
    judge.score(["abcdefgh"], ["xyz"])
    assert judge.truncated == 3


def test_start_tokens_and_separators_are_never_cut():
    decoder, encoder = classifier(), classifier("bert")
    judge = RewardModel(decoder, marked_tokenizer("<bos>", chat_template="<bos>" + CHAT_TEMPLATE), max_length=8)
    assert judge.score(["hello"], ["yo"]) == close(
        [alone(decoder, [2, *letters("o", 4), EOS, *letters("a yo", 4), EOS]).item()]
    )
    judge = RewardModel(encoder, marked_tokenizer("[CLS]", "[SEP]", model_input_names=INPUTS), max_length=7)
    ids, types = [2, *letters("lo", 4), 3, *letters("yo", 4), 3], [0, 0, 0, 0, 1, 1, 1]
    assert judge.score(["hello"], ["yo"]) == close([alone(encoder, ids, token_type_ids=types).item()])
    ids, types = [2, 3, *letters("lcom", 4), 3], [0, 0, 1, 1, 1, 1, 1]
    assert judge.score(["hi"], ["welcom"]) == close([alone(encoder, ids, token_type_ids=types).item()])
    with pytest.raises(InvalidOption, match="max_length is 3: that is no room for anything but special tokens"):
        RewardModel(encoder, marked_tokenizer("[CLS]", "[SEP]"), max_length=3).score(["hi"], ["yo"])


@pytest.mark.parametrize(
    ("kind", "stated", "limit"),
    [("llama", None, 64), ("llama", 10, 10), ("llama", 100, 64), ("bert", None, 64), ("roberta", None, 62)],
)
def test_the_limit_is_the_least_that_is_stated(kind, stated, limit):
    """A RoBERTa counts positions from its padding id, 1 here, plus 1."""
    model = classifier(kind)
    tokenizer = marked_tokenizer("[CLS]", "[SEP]", **({"model_max_length": stated} if stated else {}))
    judge = RewardModel(model, tokenizer)
    assert judge.max_length == limit
    assert math.isfinite(judge.score(["x" * 200], ["y"])[0])
    assert judge.truncated == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 65}, "max_length is 65, but the reward model has 64 positions"),
        ({"max_length": 0}, "max_length must be a positive number, not 0"),
        ({"batch_size": 0}, "batch_size must be a positive number, not 0"),
        ({"batch_size": 1.5}, "batch_size must be a positive number, not 1.5"),
    ],
)
def test_wrong_numbers_are_refused(settings, message):
    with pytest.raises(InvalidOption, match=message):
        RewardModel(classifier(), tiny_tokenizer(), **settings)


# ---- what is refused


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [
        (["a", "b"], ["c"], "there are 2 prompts, but 1 answers"),
        (["a"], [None], r"answers\[0\] must be a text, not None"),
        (["a", ""], ["b", "c"], r"prompts\[1\] must be a text that is not empty, or messages, not ''"),
        ([[1, 2]], ["c"], r"prompts\[0\] must be a text that is not empty, or messages, not \[1, 2\]"),
        ([[{"role": "user", "content": "a"}]], ["b"], r"prompts\[0\] is a chat, but the reward model's tokenizer has no chat"),
        ([["a", {"role": "user", "content": "a"}]], ["b"], r"prompts\[0\] is a chat, but the reward model's tokenizer has no"),
        (["a\ud800"], ["b"], r"prompts\[0\] with its answer is no valid Unicode"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_malformed_pairs_are_named(kind, prompts, answers, message):
    if kind == "bert" and "no chat" in message:  # it takes a single message
        prompts = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]]
    judge = RewardModel(classifier(kind), marked_tokenizer("[CLS]", "[SEP]"))
    with pytest.raises(InvalidRequest, match=message):
        judge.score(prompts, answers)


def test_a_score_that_is_no_number_is_named_by_its_pair():
    model = classifier()
    with torch.no_grad():
        model.get_input_embeddings().weight[letters("z")[0]] = math.nan
    with pytest.raises(ModelError, match=r"the reward of prompts\[1\] and answers\[1\] is nan"):
        RewardModel(model, tiny_tokenizer()).score(["abc", "a", "ab"], ["b", "z", "c"])
    assert model.config.pad_token_id is None


def test_a_tokenizer_of_another_model_is_noticed():
    judge = RewardModel(classifier(vocab_size=20), tiny_tokenizer())
    with pytest.raises(ModelError, match=r"prompts\[0\] with its answer has token 26, but the reward model knows 20"):
        judge.score(["z"], ["a"])


def test_a_language_model_is_no_classifier():
    with pytest.raises(ModelError, match="LlamaForCausalLM is no sequence classifier"):
        RewardModel(tiny_model("llama", V), tiny_tokenizer()).score(["a"], ["b"])


@pytest.mark.parametrize("kind", ["xlnet", "canine"])
def test_architectures_that_would_be_misread_are_refused(kind, tmp_path):
    CONFIG_MAPPING[kind](num_labels=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UnsupportedModel, match=r"is no reward model we can use: (XLNet|CANINE)"):
        RewardModel.from_pretrained(tmp_path)


# ---- folders


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "sound"
    return save_tiny(folder, classifier(pad_token_id=EOS), tiny_tokenizer(chat_template=CHAT_TEMPLATE))


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "bert", "qwen2"])
def test_a_folder_gives_what_its_module_gives(kind, labels, tmp_path):
    model, tokenizer = classifier(kind, labels), marked_tokenizer("[CLS]", "[SEP]")
    folder = save_tiny(tmp_path / "reward", model, tokenizer)
    expected = RewardModel(model, tokenizer).score(PROMPTS, ANSWERS)
    loaded = RewardModel.from_pretrained(folder, device="cpu", batch_size=2, max_length=50)
    assert loaded.score(PROMPTS, ANSWERS) == close(expected)
    assert (loaded.batch_size, loaded.max_length) == (2, 50)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is missing"):
        RewardModel.from_pretrained(folder)
    assert RewardModel.from_pretrained(folder, tokenizer=tokenizer).score(PROMPTS, ANSWERS) == close(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_a_dtype_is_what_is_asked_for(dtype, sound):
    judge = RewardModel.from_pretrained(sound, dtype=dtype)
    assert judge.model.dtype == (torch.bfloat16 if dtype == "bfloat16" else dtype)
    assert judge.score(["hi"], ["yo"]) == pytest.approx(RewardModel.from_pretrained(sound).score(["hi"], ["yo"]), abs=0.2)


def test_unknown_dtypes_and_devices_are_refused(sound):
    with pytest.raises(InvalidOption, match="dtype: 'int8' is none"):
        RewardModel.from_pretrained(sound, dtype="int8")
    with pytest.raises(InvalidOption, match="device: "):
        RewardModel.from_pretrained(sound, device="abacus")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_language_model_s_folder_has_no_head(kind, tmp_path):
    """transformers would put a random one there, and go on with a warning."""
    model = classifier(kind)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(f"{model.base_model_prefix}.")}
    model.save_pretrained(tmp_path, state_dict=tensors)
    marked_tokenizer("[CLS]", "[SEP]").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"is no sequence classifier: its head is missing \((score|classifier)\.\w+"):
        RewardModel.from_pretrained(tmp_path)


def test_a_causal_language_model_s_folder_is_refused(tmp_path):
    save_tiny(tmp_path, tiny_model("llama", V), tiny_tokenizer())
    with pytest.raises(CheckpointError, match=r"its head is missing \(score\.weight\)"):
        RewardModel.from_pretrained(tmp_path)


def test_a_body_that_is_missing_is_named(tmp_path):
    model = classifier()
    name = "model.layers.1.mlp.up_proj.weight"
    model.save_pretrained(tmp_path, state_dict={key: value for key, value in model.state_dict().items() if key != name})
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"does not fill the model: 1 missing_keys, such as {name}"):
        RewardModel.from_pretrained(tmp_path)


def test_a_head_of_another_shape_is_named(sound, tmp_path):
    """A configuration that forgets its labels has two of them."""
    folder = Path(shutil.copytree(sound, tmp_path / "reward"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("id2label", "label2id", "num_labels")})
    )
    with pytest.raises(CheckpointError, match=r"1 mismatched_keys, such as .*score\.weight"):
        RewardModel.from_pretrained(folder)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = classifier()
    with torch.no_grad():
        model.score.weight[0, 0] = math.inf
    save_tiny(tmp_path, model, tiny_tokenizer())
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in score\.weight"):
        RewardModel.from_pretrained(tmp_path)


def test_pickled_weights_are_refused_and_not_opened(sound, tmp_path):
    folder = Path(shutil.copytree(sound, tmp_path / "reward"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"score.weight": Trap(tmp_path / "unpickled")}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled, which is never loaded"):
        RewardModel.from_pretrained(folder)
    assert not (tmp_path / "unpickled").exists()


def test_folders_that_are_none_are_named(sound, tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        RewardModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="is a file"):
        RewardModel.from_pretrained(sound / "config.json")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        RewardModel.from_pretrained(tmp_path)


def test_an_unknown_hub_id_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelError, match="is no folder here, and the hub gave no model of that name"):
        RewardModel.from_pretrained("nobody/nothing")


# ---- preferences


def test_a_preference_is_the_logistic_of_the_gap():
    """σ(0) = 1/2; σ(log 3) = 3/4: odds of three to one; and huge gaps saturate without overflow."""
    assert preference(0.7, 0.7) == 1.5
    assert preference(1.0, 1.0 + math.log(3)) == pytest.approx(1.75)
    assert preference(1.0 + math.log(3), 1.0) == pytest.approx(1.25)
    assert preference(-1e4, 1e4) == 2.0
    assert preference(1e4, -1e4) == 1.0
    assert preference(0.3, 2.0) + preference(2.0, 0.3) == pytest.approx(3.0)
