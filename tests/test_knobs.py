"""One schema of decoding knobs: every surface has what it says, and a knob that is added there arrives everywhere."""

import dataclasses
import inspect
import re
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import pytest

from trimtab import AlignedModel, SamplingParams, knobs
from trimtab.core.rules import Product
from trimtab.decode.aligned import ModelSettings
from trimtab.decode.options import ModelOptions, RowOptions, SamplingOptions, settings_of
from trimtab.endpoints.completions import NEUTRAL, OPENAI
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.evaluate.harness import LOADING, SAMPLING
from trimtab.knobs import KNOBS, SHAPING, DrawingKnobs, ShapingKnobs, WarpSettings, shaping_of
from trimtab.models.aligner import Manifest
from trimtab.models.table import TableLM
from trimtab.serve.schema import ChatRequest, CompletionRequest
from trimtab.vllm.settings import FIELDS


def names_of(kind):
    return [field.name for field in dataclasses.fields(kind)]


def metadata_of(kind):
    return {field.name: field.metadata for field in dataclasses.fields(kind)}


def test_sampling_parameters_are_the_schema_and_say_what_each_is():
    assert names_of(SamplingParams) == list(KNOBS)
    assert {name: getattr(SamplingParams(), name) for name in KNOBS} == {name: knob.default for name, knob in KNOBS.items()}
    said = re.findall(r"^        (\w+(?:, \w+)*): ", SamplingParams.__doc__, re.MULTILINE)
    assert {name for names in said for name in names.split(", ")} == set(KNOBS)


def test_the_representation_that_resumed_files_compare_is_as_it_was():
    """`propose` and `eval` keep it: a file of an earlier version goes on only if it is the same, in the same order."""
    assert repr(SamplingParams(stop="x", rule="candidates(n=8)")) == (
        "SamplingParams(max_tokens=128, n=1, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0,"
        " logit_bias={}, stop=('x',), stop_token_ids=(), ignore_eos=False, seed=None, logprobs=False, top_logprobs=0,"
        " rule=Candidates(n=8), weight=None, proposal_temperature=None, proposal_top_k=None, proposal_top_p=None,"
        " aligner_temperature=None)"
    )


def test_keyword_arguments_that_type_checkers_see_are_the_schema():
    """`rule`, `handover` and `weight` are spelt out in signatures, for their types are wider than one number."""
    hints = {
        name: hint for name, hint in typing.get_type_hints(ShapingKnobs).items() if name not in ("rule", "handover", "weight")
    }
    assert typing.get_type_hints(WarpSettings) == hints
    for takes in (AlignedModel.__init__, AlignedModel.from_pretrained):
        assert {"rule", "weight"} <= inspect.signature(takes).parameters.keys()
    arguments = inspect.signature(AlignedModel.__init__).parameters
    own = set(ModelSettings.__annotations__) - set(WarpSettings.__annotations__)
    assert {name: arguments[name].default is not inspect.Parameter.empty for name in own} == dict.fromkeys(own, True)


def test_flags_are_the_schemas_with_its_ranges():
    assert [name for name in names_of(RowOptions) if name in KNOBS] == list(SHAPING)
    assert names_of(SamplingOptions) == [name for name in KNOBS if name in (*names_of(DrawingKnobs), "stop", "seed")]
    for name, said in (metadata_of(RowOptions) | metadata_of(SamplingOptions)).items():
        if name in KNOBS:
            assert {**said, "help": ""} == {**KNOBS[name].said, "help": ""}


@pytest.mark.parametrize("model", [CompletionRequest, ChatRequest])
def test_bodies_have_the_knobs_with_their_bounds(model):
    found = model.model_json_schema()["properties"]
    for name, knob in KNOBS.items():
        assert name in found or name == "top_logprobs"
        if knob.kind not in (int, float) or not knob.said.get("http", True):
            continue
        number = next(one for one in found[name]["anyOf"] if one["type"] in ("integer", "number"))
        assert number["type"] == {int: "integer", float: "number"}[knob.kind]
        low, above, high, _ = knob.range
        assert number.get("exclusiveMinimum") == above
        assert number.get("minimum") == (low if low is not None or knob.kind is float else -(2**63))
        assert number.get("maximum") == high or (high is None and knob.kind is int)
        assert found[name]["default"] == knob.default
        assert found[name]["description"].endswith(".")


def test_the_other_surfaces_are_the_schemas_too():
    assert list(FIELDS) == ["aligner", *SHAPING]
    assert set(SHAPING) <= LOADING
    assert set(SHAPING) <= SAMPLING <= set(KNOBS)
    assert {*OPENAI, *NEUTRAL} >= set(names_of(DrawingKnobs))
    assert NEUTRAL == {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert {*OPENAI} == {"max_tokens", "n", "temperature", "top_p", "seed"}


def test_a_manifest_has_what_the_schema_gives_it_at_its_neutral_value():
    fields = {field.name: field.default for field in dataclasses.fields(Manifest) if field.name in KNOBS}
    wanted = {name: knob.said.get("neutral") for name, knob in KNOBS.items() if knob.said.get("manifest")}
    assert fields == wanted | {"rule": Product.name}


def test_what_shapes_rows_of_numbers_is_neutral_somewhere():
    shaped = {name for name, knob in KNOBS.items() if knob.said["acts"] in ("proposal", "aligner")}
    assert {name for name, knob in KNOBS.items() if "neutral" in knob.said} == shaped


def test_unknown_keywords_of_an_aligned_model_are_errors():
    """None of the other knobs slips in among the model's settings."""
    proposal = TableLM.random(5, seed=0)
    for name in ("temperature", "proposal_top_q"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            AlignedModel(proposal, **{name: 1.0})
    with pytest.raises(InvalidRequest, match=r"proposal_top_k must be an integer of at least -1, not 2\.5"):
        AlignedModel(proposal, proposal_top_k=2.5)


def test_flags_that_load_a_model_are_arguments_of_from_pretrained():
    """So a new one passes from its field to where it acts, and no command names it."""
    takes = {*inspect.signature(AlignedModel.from_pretrained).parameters, *ModelSettings.__annotations__}
    for kind in (RowOptions, ModelOptions):
        given = settings_of(kind(proposal="p", aligner=("a", "b"), weight=(1.0, 2.0), dtype="float16", max_num_seqs=3))
        assert given.keys() | {"proposal", "aligner"} == {*names_of(kind), "draft"}
        assert given.keys() <= takes
        assert (given["weight"], given["dtype"], given["max_num_seqs"]) == ([1.0, 2.0], "float16", 3)
    assert settings_of(RowOptions(proposal="p"))["draft"] == "none", "where nothing is drawn"
    assert settings_of(ModelOptions(proposal="p"))["draft"] is None
    assert settings_of(ModelOptions(proposal="p", draft="ngram"))["draft"] == "ngram"
    assert settings_of(ModelOptions(proposal="p"))["weight"] is None


def test_options_that_are_made_by_hand_are_checked_too():
    with pytest.raises(InvalidOption, match="--max_num_seqs must be at least 1, not 0"):
        ModelOptions(proposal="p", max_num_seqs=0)
    with pytest.raises(InvalidOption, match=r"^proposal_temperature must be a number above 0, not 0"):
        ModelOptions(proposal="p", proposal_temperature=0.0)
    with pytest.raises(InvalidOption, match="--num_speculative_tokens must be from 0 to 16, not 17"):
        ModelOptions(proposal="p", num_speculative_tokens=17)


def test_no_weights_among_flags_stand_for_none():
    flags = RowOptions(proposal="p", aligner=("a",), weight=(2.0,), proposal_top_k=3)
    assert shaping_of(flags) == dict.fromkeys(SHAPING) | {"weight": (2.0,), "proposal_top_k": 3}
    assert shaping_of(RowOptions(proposal="p"))["weight"] is None


ADDED = {
    "    proposal_temperature: float | None = _number(": "    tilt: float | None = _number("
    'None, "proposal", "how far rows lean [default: 1]", above=0, high=4, neutral=1.0)\n',
    "    proposal_temperature: float | None\n": "    tilt: float | None\n",
    "    top_k: int = _integer(": '    spice: int = _integer(0, "row", "grains", low=0, high=9)\n',
}
"""A knob of each group and its line for type checkers, before the lines that begin so."""

USED = """
import sys, types
from pathlib import Path
added = types.ModuleType("trimtab.knobs")
source = Path(sys.argv[1]).read_text()
sys.modules["trimtab.knobs"] = added
exec(compile(source, sys.argv[1], "exec"), vars(added))

from trimtab import AlignedModel, SamplingParams
from trimtab.cli import _parser, bench, eval, generate, propose, score, serve
from trimtab.cli.options import read_options
from trimtab.decode.options import make_sampling_params
from trimtab.decode.settings import _shared
from trimtab.endpoints.completions import RemoteModel
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.evaluate.harness import LOADING, SAMPLING
from trimtab.models.table import TableLM
from trimtab.serve.schema import ChatRequest, CompletionRequest
from trimtab.vllm.launch import _additional_config
from trimtab.vllm.settings import read_settings

def refused(call, kind, text):
    try:
        call()
    except kind as error:
        assert str(error).startswith(text), error
    else:
        raise AssertionError(text)

# Python
params = SamplingParams(tilt=2.0, spice=3)
assert (params.tilt, params.spice) == (2.0, 3)
tilted, spiced = "tilt must be a number above 0 and at most 4", "spice must be an integer of at least 0 and at most 9"
refused(lambda: SamplingParams(tilt=5), InvalidRequest, tilted)
refused(lambda: SamplingParams(spice=-1), InvalidRequest, spiced)
refused(lambda: SamplingParams(spice=10), InvalidRequest, spiced)
model = AlignedModel(TableLM.random(5, seed=0), tilt=2.0)
assert model.defaults.tilt == 2.0

# who counts: the request, the model, nobody
plain = SamplingParams()
assert [_shared("tilt", a, b, []) for a, b in ((params, plain), (plain, model.defaults), (plain, plain))] == [2.0, 2.0, 1.0]

# flags and configuration files
for name, command in (("generate", generate), ("score", score), ("bench", bench), ("eval", eval), ("serve", serve)):
    given = _parser(name, command.Options).read(["--tilt", "2"])
    assert given == {"tilt": 2.0}
    helped = " ".join(_parser(name, command.Options).format_help().split())
    assert "how far rows lean (above 0 and at most 4) [default: 1]" in helped
for name, command in (("generate", generate), ("eval", eval), ("propose", propose)):
    assert _parser(name, command.Options).read(["--spice", "3"]) == {"spice": 3}
Path(sys.argv[2]).write_text("{tilt: 2, spice: 3}")
asked = read_options(generate.Options, {"proposal": "p", "config": sys.argv[2]})
assert (asked.tilt, make_sampling_params(asked).spice) == (2.0, 3)
refused(lambda: read_options(generate.Options, {"proposal": "p", "tilt": 5.0}), InvalidOption, tilted)

# HTTP, vLLM, the harness, endpoints
for kind in (CompletionRequest, ChatRequest):
    found = kind.model_json_schema()["properties"]
    assert found["tilt"]["anyOf"][0] == {"exclusiveMinimum": 0, "maximum": 4, "type": "number"}
    assert found["tilt"]["description"] == "How far rows lean."
    assert found["spice"]["anyOf"][0] == {"minimum": 0, "maximum": 9, "type": "integer"}
    assert found["spice"]["default"] == 0
body = CompletionRequest.model_validate_json('{"model": "m", "prompt": "x", "tilt": 2, "spice": 3}')
assert SamplingParams(**body.sampling(5, False, 0)) == SamplingParams(max_tokens=5, tilt=2.0, spice=3)
serving = serve.Options(proposal="p", aligner=("a=q",), tilt=2.0)
assert read_settings(_additional_config(serving, [("a", "q", None)])).defaults.tilt == 2.0
assert {"tilt"} <= LOADING and {"tilt", "spice"} <= SAMPLING
remote = object.__new__(RemoteModel)
remote.name, remote._owner = "m", ""
assert remote._request("x", params)[1]["spice"] == 3
assert "spice" not in remote._request("x", plain)[1]
"""


def test_a_knob_that_is_added_to_the_schema_arrives_everywhere(tmp_path):
    """Two lines in one file, and Python, flags, YAML, HTTP, vLLM, the harness and endpoints have it with its range."""
    source = Path(knobs.__file__).read_text(encoding="utf-8")
    for before, line in ADDED.items():
        assert source.count(before) == 1
        source = source.replace(before, line + before)
    (tmp_path / "knobs.py").write_text(source, encoding="utf-8")
    words = [sys.executable, "-c", textwrap.dedent(USED), str(tmp_path / "knobs.py"), str(tmp_path / "config.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
