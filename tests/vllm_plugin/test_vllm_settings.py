"""What the operator configures and what requests ask for: every error names the field and what would do."""

import json
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_tokenizer
from trimtab.core.logprobs import Warp
from trimtab.core.rules import Geometric, KLGate, Nucleus, Product
from trimtab.decode.request import SamplingParams
from trimtab.decode.shaping import Shaping
from trimtab.errors import InvalidOption, InvalidRequest, ManifestError, ModelError, VocabularyMismatch
from trimtab.models.aligner import MANIFEST_NAME, Manifest
from trimtab.models.vocabulary import fingerprint_vocabulary
from trimtab.vllm.settings import Arguments, Catalog, Settings, read_settings

LETTERS = "abcdef"
EOS = [0, 5]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aligners")


def folder(root: Path, name: str, letters: str = LETTERS, **manifest: Any) -> str:
    """An aligner as far as a catalog looks at it: no weights."""
    tokenizer = tiny_tokenizer(letters)
    tokenizer.save_pretrained(root / name)
    if manifest:
        values = Manifest(**{"vocabulary": fingerprint_vocabulary(tokenizer), **manifest}).to_dict()
        (root / name / MANIFEST_NAME).write_text(json.dumps(values))
    return str(root / name)


@pytest.fixture(scope="module")
def paths(root: Path) -> dict[str, str]:
    return {
        "plain": folder(root, "plain"),
        "other": folder(root, "other"),
        "half": folder(root, "half", weight=0.5, proposal_top_p=0.9, aligner_temperature=1.5),
        "mild": folder(root, "mild", rule="geometric", weight=0.3),
    }


def configured(**given: Any) -> Settings:
    settings = read_settings({"trimtab": given})
    assert settings is not None
    return settings


def catalog(aligners: dict[str, Any], **given: Any) -> Catalog:
    return Catalog(configured(aligners=aligners, **given), tiny_tokenizer(LETTERS), EOS)


# ---- the operator's


@pytest.mark.parametrize("config", [None, {}, {"other": {"aligners": {}}}, "trimtab", object(), []])
def test_without_our_key_there_are_no_settings(config):
    assert read_settings(config) is None


def test_the_least_and_the_most_that_may_be_said():
    assert configured(aligners={"docs": "path"}) == Settings({"docs": "path"})
    given = {
        "aligners": {"docs": "a", "terse": {"path": "b", "weight": -0.5}, "loud": {"path": "c", "weight": None}},
        "aligner": "docs",
        "weight": 0.5,
        "rule": "kl_gate(tau=0.3)",
        "proposal_temperature": 0.7,
        "proposal_top_k": 5,
        "proposal_top_p": 0.9,
        "aligner_temperature": 1.5,
        "dtype": "bfloat16",
        "max_aligners": 3,
        "memory_gib": 1.5,
        "ignore": ["theirs"],
    }
    defaults = SamplingParams(
        weight=0.5,
        rule=KLGate(0.3),
        proposal_temperature=0.7,
        proposal_top_k=5,
        proposal_top_p=0.9,
        aligner_temperature=1.5,
    )
    assert configured(**given) == Settings(
        aligners={"docs": "a", "terse": "b", "loud": "c"},
        weights={"terse": -0.5},
        aligner=("docs",),
        defaults=defaults,
        dtype="bfloat16",
        max_aligners=3,
        memory=3 * 2**29,
        ignore=("theirs",),
    )
    assert configured(**json.loads(json.dumps(given))) == configured(**given)


def test_null_is_as_if_a_field_were_not_there():
    names = ("aligner", "weight", "rule", "proposal_temperature", "proposal_top_k", "proposal_top_p", "aligner_temperature")
    assert configured(aligners={"q": "p"}, memory_gib=None, **dict.fromkeys(names)) == Settings({"q": "p"})


def test_several_default_aligners_and_none():
    assert configured(aligners={"a": "x", "b": "y"}, aligner=["b", "a"]).aligner == ("b", "a")
    assert configured(aligners={"a": "x"}, aligner=[]).aligner == ()


ALIGNERS = {"a": "x", "b": "y", "c": "z"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("path", r"additional_config: 'trimtab' must hold an object, not 'path'"),
        (None, r"'trimtab' must hold an object, not None"),
        ({}, r"trimtab.aligners must map names to folders or hub ids, like \{'docs': 'path'\}, not None"),
        ({"aligners": {}}, r"trimtab.aligners must map names .*, not \{\}"),
        ({"aligners": ["x"]}, r"trimtab.aligners must map names .*, not \['x'\]"),
        ({"aligners": {"a": 1}}, r"or to \{'path': …, 'weight': …\}, not 'a' to 1"),
        ({"aligners": {"a": None}}, r"not 'a' to None"),
        ({"aligners": {"a": ""}}, r"not 'a' to ''"),
        ({"aligners": {"": "x"}}, r"not '' to 'x'"),
        ({"aligners": {1: "x"}}, r"not 1 to 'x'"),
        ({"aligners": {"a": {}}}, r"not 'a' to \{\}"),
        ({"aligners": {"a": {"weight": 1}}}, r"not 'a' to \{'weight': 1\}"),
        ({"aligners": {"a": {"path": "x", "rule": "product"}}}, r"not 'a' to \{'path': 'x', 'rule': 'product'\}"),
        ({"aligners": {"a": {"path": "x", "weight": "1"}}}, r"trimtab.aligners.a: weight must be a number .*, not '1'"),
        ({"aligners": {"a": {"path": "x", "weight": 1e7}}}, r"trimtab.aligners.a: weight must .* at most 1e\+06"),
        (
            {"aligners": ALIGNERS, "wieght": 1},
            r"'trimtab' has no key 'wieght'; it has aligners, aligner, rule, handover, weight, .*ignore",
        ),
        ({"aligners": ALIGNERS, "weight": True}, r"trimtab.weight must be a number"),
        ({"aligners": ALIGNERS, "weight": [1, "2"]}, r"trimtab.weight\[1\] must be a number"),
        ({"aligners": ALIGNERS, "rule": "magic"}, r"trimtab.rule: there is no rule 'magic'; choose one of .*product"),
        ({"aligners": ALIGNERS, "rule": 3}, r"trimtab.rule must be the name of a rule"),
        ({"aligners": ALIGNERS, "proposal_temperature": 0}, r"trimtab.proposal_temperature must be a number above 0"),
        ({"aligners": ALIGNERS, "proposal_top_k": 1.5}, r"trimtab.proposal_top_k must be an integer"),
        ({"aligners": ALIGNERS, "proposal_top_p": 2}, r"trimtab.proposal_top_p must be a number above 0 and at most 1"),
        ({"aligners": ALIGNERS, "aligner_temperature": "hot"}, r"trimtab.aligner_temperature must be a number above 0"),
        ({"aligners": ALIGNERS, "aligner": "d"}, r"trimtab.aligner: there is no aligner 'd'; there are a, b, c"),
        (
            {"aligners": ALIGNERS, "aligner": ["a", "a"]},
            r"trimtab.aligner: 'a' is named twice; give it twice the weight instead",
        ),
        ({"aligners": ALIGNERS, "aligner": ["a", "b", "c"]}, r"trimtab.aligner: 3 aligners, but at most 2 are allowed"),
        ({"aligners": ALIGNERS, "aligner": {"a": 1}}, r"trimtab.aligner must be a name or a list of names"),
        ({"aligners": ALIGNERS, "dtype": "float8"}, r"trimtab.dtype must be auto, float32, bfloat16 or float16, not 'float8'"),
        ({"aligners": ALIGNERS, "dtype": ["auto"]}, r"trimtab.dtype must be auto"),
        ({"aligners": ALIGNERS, "max_aligners": 0}, r"trimtab.max_aligners must be an integer of at least 1, not 0"),
        ({"aligners": ALIGNERS, "max_aligners": True}, r"trimtab.max_aligners must be an integer of at least 1, not True"),
        ({"aligners": ALIGNERS, "max_aligners": None}, r"trimtab.max_aligners must be an integer of at least 1, not None"),
        ({"aligners": ALIGNERS, "memory_gib": 0}, r"trimtab.memory_gib must be a number above 0, not 0"),
        ({"aligners": ALIGNERS, "memory_gib": "8"}, r"trimtab.memory_gib must be a number above 0, not '8'"),
        ({"aligners": ALIGNERS, "memory_gib": float("inf")}, r"trimtab.memory_gib must be a number above 0, not inf"),
        ({"aligners": ALIGNERS, "ignore": "theirs"}, r"trimtab.ignore must be a list of names, not 'theirs'"),
        ({"aligners": ALIGNERS, "ignore": [1]}, r"trimtab.ignore must be a list of names, not \[1\]"),
        ({"aligners": ALIGNERS, "ignore": None}, r"trimtab.ignore must be a list of names, not None"),
    ],
)
def test_a_wrong_setting_is_named(given, says):
    with pytest.raises(InvalidOption, match=says):
        read_settings({"trimtab": given})


# ---- the catalog


def test_an_aligner_of_another_vocabulary_is_refused(root):
    with pytest.raises(VocabularyMismatch, match=r"the aligner 'odd' does not share the proposal's vocabulary: token 'f'"):
        catalog({"odd": folder(root, "odd", "abcdex")})


def test_an_aligner_that_cannot_be_read_is_refused(root):
    with pytest.raises(ModelError, match="nowhere"):
        catalog({"q": str(root / "nowhere")})
    path = folder(root, "bad")
    Path(path, MANIFEST_NAME).write_text('{"format_version": 1}')
    with pytest.raises(ManifestError, match="key 'vocabulary' is missing"):
        catalog({"q": path})


def test_defaults_that_contradict_an_aligner_are_refused(root, paths):
    drawn = folder(root, "drawn", rule="candidates(n=4)")
    with pytest.raises(InvalidOption, match=r"trimtab: aligner 'drawn': rule: 'candidates\(n=4\)' has no row in closed form"):
        catalog({"plain": paths["plain"], "drawn": drawn})
    assert catalog({"drawn": drawn}, rule="product").read({"aligner": "drawn"}) is not None
    with pytest.raises(InvalidOption, match=r"trimtab: aligner 'plain': rule: 'candidates' has no row.* use product"):
        catalog({"plain": paths["plain"]}, rule="candidates")
    weighted = {"plain": {"path": str(paths["plain"]), "weight": 1.5}}
    with pytest.raises(InvalidOption, match=r"trimtab.aligners.plain: weight: under mixture the aligner's share is 1.5"):
        catalog(weighted, rule="mixture")
    with pytest.raises(InvalidOption, match=r"trimtab: aligner 'plain': weight has 2 numbers, but there are 1 aligners"):
        catalog({"plain": paths["plain"], "other": paths["other"]}, weight=[1, 2])


def test_default_aligners_that_no_request_could_use_together_are_refused(paths):
    """Each is right alone, but requests that say nothing would all fail."""
    with pytest.raises(
        InvalidOption, match=r"trimtab.aligner: the aligners' manifests disagree on rule: geometric and product"
    ):
        catalog({name: paths[name] for name in ("half", "mild")}, aligner=["half", "mild"])
    with pytest.raises(InvalidOption, match=r"trimtab.aligner: weight has 1 numbers, but there are 2 aligners"):
        catalog({name: paths[name] for name in ("plain", "other")}, aligner=["plain", "other"], weight=0.5)
    both = catalog({name: paths[name] for name in ("half", "mild")}, aligner=["half", "mild"], rule="product", proposal_top_p=1)
    assert both.read(None).names == ("half", "mild")


# ---- a request's


def shaping(rule: Any, weights: tuple[float, ...], proposal: Warp = Warp(1.0, 0, 1.0), *temperatures: float) -> Shaping:  # noqa: B008
    return Shaping(rule, weights, proposal, tuple(map(Warp, temperatures or (1.0,) * len(weights))))


def test_who_names_no_aligner_gets_none(paths):
    without = catalog(paths)
    others = {"kv_transfer_params": {}, "anything": 1}
    for nothing in (None, {}, {"aligner": None}, {"aligner": []}, others, {"weight": None, "rule": None}):
        assert without.read(nothing) is None


def test_or_the_operators(paths):
    with_default = catalog(paths, aligner="half")
    assert with_default.read(None) == with_default.read({"aligner": "half"})
    assert with_default.read({"weight": 2.0}).shaping.weights == (2.0,)
    assert with_default.read({"aligner": "mild"}).names == ("mild",)
    for unaligned in ({"aligner": None}, {"aligner": []}, {"aligner": (), "weight": None}):
        assert with_default.read(unaligned) is None


def test_manifests_and_rules_give_the_defaults(paths):
    read = catalog(paths).read
    assert read({"aligner": "plain"}) == Arguments(("plain",), shaping(Product(), (1.0,)))
    assert read({"aligner": "half"}) == Arguments(("half",), shaping(Product(), (0.5,), Warp(1.0, 0, 0.9), 1.5))
    assert read({"aligner": "mild"}) == Arguments(("mild",), shaping(Geometric(), (0.3,)))
    assert read({"aligner": ["plain", "other"], "rule": "geometric"}).shaping.weights == (1 / 3, 1 / 3)
    assert read({"aligner": ("other", "half")}).shaping.weights == (1.0, 0.5)
    assert read({"aligner": ["other", "half"], "proposal_top_p": 1}).shaping.aligners == (Warp(1.0), Warp(1.5))


def test_a_manifests_weight_belongs_to_its_rule(paths):
    read = catalog(paths).read
    assert read({"aligner": "half", "rule": "product"}).shaping.weights == (0.5,)
    assert read({"aligner": "half", "rule": "geometric"}).shaping.weights == (0.5,), "half of two is the default, too"
    assert read({"aligner": "half", "rule": "nucleus"}).shaping.weights == (1.0,)
    assert read({"aligner": "mild", "rule": "product"}).shaping.weights == (1.0,)


def test_the_operators_weight_of_an_aligner_replaces_its_manifests(paths):
    weighted = {name: {"path": path, "weight": 0.25} for name, path in paths.items()}
    read = catalog(weighted).read
    assert read({"aligner": "plain"}).shaping.weights == (0.25,)
    assert read({"aligner": "half"}).shaping == shaping(Product(), (0.25,), Warp(1.0, 0, 0.9), 1.5)
    assert read({"aligner": "mild"}).shaping == shaping(Geometric(), (0.25,))
    assert read({"aligner": "half", "rule": "nucleus"}).shaping.weights == (1.0,), "it belongs to the manifest's rule"
    assert read({"aligner": ["plain", "half"], "weight": [2, 3], "proposal_top_p": 1}).shaping.weights == (2.0, 3.0)
    read = catalog(weighted, rule="nucleus").read
    assert read({"aligner": "mild"}).shaping.weights == (0.25,), "it belongs to the operator's rule"
    assert read({"aligner": "mild", "rule": "geometric"}).shaping.weights == (0.5,)


def test_the_operators_defaults_stand_between_manifest_and_request(paths):
    read = catalog(paths, rule="nucleus", weight=2, proposal_temperature=0.7, proposal_top_k=3, aligner_temperature=1.2).read
    assert read({"aligner": "half"}).shaping == shaping(Nucleus(), (2.0,), Warp(0.7, 3, 0.9), 1.2)
    asked = {"aligner": "half", "rule": "kl_gate(tau=1.0)", "weight": -1, "proposal_temperature": 2.0}
    more = {"proposal_top_k": -1, "proposal_top_p": 1.0, "aligner_temperature": 3}
    assert read(asked | more).shaping == shaping(KLGate(1.0), (-1.0,), Warp(2.0, 0, 1.0), 3)
    assert read({"aligner": "half", "weight": None, "rule": None}) == read({"aligner": "half"})


def test_rules_that_look_for_the_end_know_it(paths):
    rule = catalog(paths).read({"aligner": "plain", "rule": "nucleus(force_eos=True)"}).shaping.rule
    assert rule == Nucleus(force_eos=True, eos_token_ids=(0, 5))


def test_fields_of_others(paths):
    allowed = {"kv_transfer_params": {"x": 1}, "ec_transfer_params": {}, "kv_cache_report_mode": "y", "session_id": "z"}
    assert catalog(paths).read({"aligner": "plain", **allowed}) is not None
    with pytest.raises(
        InvalidRequest, match=r"theirs: an aligned request has no such field; .*aligner, rule, handover, weight.*trimtab.ignore"
    ):
        catalog(paths).read({"aligner": "plain", "theirs": 1})
    lenient = catalog(paths, ignore=["theirs", "ours"])
    assert lenient.read({"aligner": "plain", "theirs": 1}) == lenient.read({"aligner": "plain"})
    with pytest.raises(InvalidRequest, match="yours: an aligned request has no such field"):
        lenient.read({"aligner": "plain", "theirs": 1, "yours": 2})


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"aligner": "none"}, r"^aligner: there is no aligner 'none'; there are plain, other, half, mild"),
        ({"aligner": ""}, r"^aligner: there is no aligner ''"),
        ({"aligner": 3}, r"^aligner must be a name or a list of names, not 3"),
        ({"aligner": [["plain"]]}, r"^aligner must be a name or a list of names"),
        ({"aligner": ["plain", "plain"]}, r"^aligner: 'plain' is named twice"),
        ({"aligner": ["plain", "other", "half"]}, r"^aligner: 3 aligners, but at most 2 are allowed"),
        ({"weight": 1}, r"^weight needs an aligner: name one of plain, other, half, mild"),
        ({"aligner": [], "rule": "product", "aligner_temperature": 2}, r"^aligner_temperature needs an aligner"),
        ({"aligner": "plain", "weight": [1, 2]}, r"^weight has 2 numbers, but there are 1 aligners: give one for each"),
        ({"aligner": "plain", "weight": []}, r"^weight has 0 numbers, but there are 1 aligners"),
        ({"aligner": ["plain", "other"], "weight": 1}, r"^weight has 1 numbers, but there are 2 aligners"),
        ({"aligner": "plain", "weight": "1"}, r"^weight must be a number"),
        ({"aligner": "plain", "weight": float("nan")}, r"^weight must be a number"),
        ({"aligner": "plain", "rule": "mixture", "weight": 1.5}, r"^weight: under mixture the aligner's share is 1\.5"),
        ({"aligner": ["plain", "other"], "rule": "mixture", "weight": [0.7, 0.7]}, r"^weight: under mixture .* sum to 1\.4"),
        ({"aligner": "plain", "rule": "gate(rule=mixture)", "weight": -1}, r"^weight must be at least 0 under mixture"),
        ({"aligner": "plain", "rule": "gate(rule=candidates)"}, r"^rule: gate: rule 'candidates' has no row in closed form"),
        ({"aligner": "plain", "rule": "magic"}, r"^rule: there is no rule 'magic'"),
        ({"aligner": "plain", "rule": 1}, r"^rule must be the name of a rule"),
        (
            {"aligner": "plain", "rule": "candidates(n=8)"},
            r"^rule: 'candidates\(n=8\)' has no row in closed form.* use product",
        ),
        ({"aligner": "plain", "proposal_temperature": 0}, r"^proposal_temperature must be a number above 0"),
        ({"aligner": "plain", "proposal_top_k": "3"}, r"^proposal_top_k must be an integer"),
        ({"aligner": "plain", "proposal_top_p": 0}, r"^proposal_top_p must be a number above 0 and at most 1"),
        ({"aligner": "plain", "aligner_temperature": -1}, r"^aligner_temperature must be a number above 0"),
        (
            {"aligner": ["half", "mild"]},
            r"^the aligners' manifests disagree on rule: geometric and product; say which with rule=",
        ),
    ],
)
def test_a_wrong_request_is_told_which_field(asked, says, paths):
    with pytest.raises(InvalidRequest, match=says):
        catalog(paths).read(asked)
