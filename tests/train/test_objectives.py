"""One contract for every objective, ours and those of other packages; and one of another package in the command."""

import dataclasses
import json
import re
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from brought import bring, look_again
from eval_task import called
from tiny_task import V, make_task, task_options, task_rows, write_rows
from trimtab.core.rules import parse_rule
from trimtab.errors import InvalidOption
from trimtab.models.aligner import Description, Manifest
from trimtab.options import Range, option
from trimtab.train.dry_run import Expected, estimate
from trimtab.train.objectives import (
    OBJECTIVES,
    Alone,
    Batch,
    Decoded,
    Ending,
    Gained,
    LanguageModel,
    Likelihood,
    Logits,
    Objective,
    Proposed,
    Rows,
    Setting,
    Valued,
)
from trimtab.train.objectives.base import _check
from trimtab.train.objectives.taught import Taught, TeacherAlone, TeacherToAligned, TeacherToProposal
from trimtab.train.options import objective_flags
from trimtab.train.plan import Facts, resolve
from trimtab.train.rows import CachedRows, TaughtRows
from trimtab.train.run import run_training

RULES = [("product", 1.0), ("product", 0.4), ("product", -0.5), ("geometric", 0.3), ("geometric", 1.0), ("mixture", 0.3)]
ON_EDITS = {f"{name} on edits": name for name in ("likelihood", "preference")}
KINDS = [*sorted(OBJECTIVES), *ON_EDITS, "taught"]


def objective_of(kind: str) -> Callable[[], Objective]:
    if kind in ON_EDITS:
        return partial(OBJECTIVES[ON_EDITS[kind]], contrast_on="edits")
    return Taught if kind == "taught" else OBJECTIVES[kind]


def rows(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, V, generator=generator, dtype=torch.float64).log_softmax(-1)


def whole_teacher(logp: torch.Tensor, logt: torch.Tensor, tokens: torch.Tensor) -> TaughtRows:
    """Every entry, the answer's token first, each of which stands for itself."""
    others = torch.tensor([[v for v in range(V) if v != token] for token in tokens.tolist()])
    ids = torch.cat([tokens[:, None], others], 1)
    return TaughtRows(ids, logp.gather(1, ids), logt.gather(1, ids), torch.zeros_like(logp))


class Examples:
    """Two pairs of answers, of 3 + 2 and of 1 + 4 tokens, with everything that a loss may look at."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.tensors = setting, {}
        for seed, (which, lengths) in enumerate({"chosen": (3, 2), "rejected": (1, 4)}.items()):
            count = sum(lengths)
            owner = torch.arange(2).repeat_interleave(torch.tensor(lengths))
            tokens = torch.arange(count) * 5 % V
            logits = 2 * torch.randn(count + 2, V + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            logp = rows(count, 10 + seed)
            self.tensors[which] = {
                "tokens": tokens, "logits": logits.requires_grad_(), "positions": torch.arange(count) + 1, "logp": logp,
                "teacher": whole_teacher(logp, rows(count, 20 + seed), tokens), "owner": owner,
            }  # fmt: skip

    def inputs(self) -> dict[str, torch.Tensor]:
        found = {"differs": torch.tensor([True, False]), "share": torch.tensor([0.5, 0.5])}
        found |= {"reward": torch.tensor([1.0, -0.5]), "group": torch.tensor([0, 0]), "beta": torch.tensor([0.7, 0.7])}
        found |= {
            "prefix_reward": torch.randn(5, generator=torch.Generator().manual_seed(4)),
            "cut": torch.tensor([True, False]),
        }
        for which, one in self.tensors.items():
            found |= {f"{which}_ids": torch.zeros(2, 1), f"{which}_owner": one["owner"], f"{which}_tokens": one["tokens"]}
            whole = CachedRows.whole(one["logp"], one["tokens"])
            found |= {f"{which}_proposal_{name}": getattr(whole, name) for name in CachedRows._fields}
            found[f"{which}_edited"] = one["tokens"] % 2 == 0
        return found

    def logits(self, which: str) -> Logits:
        one = self.tensors[which]
        whole = CachedRows.whole(one["logp"], one["tokens"])
        return Logits(
            one["logits"], one["positions"], one["tokens"], V, self.setting, lambda: whole, lambda: one["teacher"],
        )  # fmt: skip

    def rows(self, which: str) -> Rows:
        one = self.tensors[which]
        logq = (one["logits"][one["positions"], :V] / self.setting.temperature).log_softmax(-1)
        level = (one["logits"][one["positions"], :V] / self.setting.temperature).logsumexp(-1)
        return Rows(one["tokens"], logq, one["logp"], self.setting, one["teacher"], level)

    def batch(self, *, fused: bool, training: bool = True) -> Batch:
        def tokens(loss, which):
            return loss.of_logits(self.logits(which)) if fused else loss.of_rows(self.rows(which))

        return Batch(self.inputs(), self.setting, 2.5, tokens, training=training)

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor | None]:
        tensors = [one["logits"] for one in self.tensors.values()]
        return list(torch.autograd.grad(loss, tensors, allow_unused=True))


def setting_of(rule: str, weight: float, temperature: float = 1.0, **more) -> Setting:
    return Setting(parse_rule(rule), weight, temperature, records=8, end=1, **more)


@pytest.mark.parametrize(
    "loss",
    [
        Alone(),
        LanguageModel(),
        Decoded(),
        Gained(),
        Ending(),
        Proposed(),
        Valued(),
        TeacherToAligned(),
        TeacherToProposal(),
        TeacherAlone(),
    ],
)
@pytest.mark.parametrize(("rule", "weight"), RULES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_a_loss_of_tokens_is_the_same_from_logits_and_from_rows(loss, rule, weight, temperature):
    """In float64, value and gradient, with logits that are wider than the vocabulary and out of order."""
    setting = setting_of(rule, weight, temperature, taught=True)
    if rule == "mixture" and loss == TeacherToAligned():
        with pytest.raises(InvalidOption, match="no product of powers"):
            loss.of_logits(Examples(setting).logits("chosen"))
        return
    found = []
    for fused in (True, False):
        examples = Examples(setting)
        losses = loss.of_logits(examples.logits("chosen")) if fused else loss.of_rows(examples.rows("chosen"))
        assert losses.shape == (5,)
        found.append((losses.detach(), examples.gradients(losses.sum())[0] if losses.requires_grad else None))
    assert_close(found[0][0], found[1][0], atol=1e-9, rtol=1e-9)
    assert (found[0][1] is None) == (found[1][1] is None)
    if found[0][1] is not None:
        assert_close(found[0][1], found[1][1], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("kind", "head"), [(kind, head) for kind in KINDS for head in (False, True) if (kind, head) != ("soft_q", True)]
)
def test_an_objective_keeps_its_contract(kind, head):
    """A value whose loss is one number for each example, finite, of the answers that it names, and the same on both ways."""
    rule = "geometric" if head else "product"
    setting = setting_of(rule, 1.0, head=head, taught=kind == "taught", tempered=not head)
    objective = objective_of(kind)().settle(setting)
    assert objective == objective.settle(setting), "settling again changes nothing"
    assert dataclasses.replace(objective) == objective
    assert hash(objective) == hash(dataclasses.replace(objective))
    assert set(objective.answers) <= {"chosen", "rejected"}
    assert all(isinstance(name, str) for name in objective.fits(setting))
    for training in (True, False):
        found = []
        for fused in (True, False):
            examples = Examples(setting)
            losses = objective.loss(examples.batch(fused=fused, training=training))
            assert losses.shape == (2,)
            assert losses.isfinite().all()
            gradients = examples.gradients(losses.sum())
            assert [gradient is not None for gradient in gradients] == [
                which in objective.answers for which in examples.tensors
            ]
            found.append([losses.detach(), *(gradient for gradient in gradients if gradient is not None)])
        for one, other in zip(*found, strict=True):
            assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_look_asks_for_no_token_loss_that_is_not_named(kind):
    setting = setting_of("product", 1.0, taught=kind == "taught", tempered=True)
    objective, asked = objective_of(kind)().settle(setting), set()
    examples = Examples(setting)

    def tokens(loss, which):
        asked.add(loss)
        return loss.of_rows(examples.rows(which))

    objective.loss(Batch(examples.inputs(), setting, 2.5, tokens, training=False))
    assert asked <= set(objective.token_losses(setting))
    for loss in (*objective.token_losses(setting), objective.tuned(setting), *objective.figures(setting).values()):
        assert loss.of_rows(examples.rows("chosen")).shape == (5,)


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_every_option_of_an_objective_is_a_flag_with_help_and_a_range_that_is_kept(kind):
    flags = objective_flags()
    for field in dataclasses.fields(OBJECTIVES[kind]):
        names = rf"\b{kind}(, \w+)*: "  # those who share an option say it once
        assert re.search(names + re.escape(field.metadata["help"].partition(" [default")[0]), flags[field.name].text)
        if not Range.of(field.metadata).holds(-1.0):
            with pytest.raises(InvalidOption, match=f"{field.name} must be"):
                OBJECTIVES[kind](**{field.name: -1.0})


def test_a_pair_of_equal_answers_has_no_contrast():
    """The second example's answers are said to be equal: its loss is that of the likelihood alone."""
    setting = setting_of("product", 1.0)
    plain, contrasted = (
        Likelihood(contrast=contrast).settle(setting).loss(Examples(setting).batch(fused=False)) for contrast in (0.0, 2.0)
    )
    assert contrasted[0] > plain[0]
    assert contrasted[1] == plain[1]


# ---- of another package


PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
THEIRS, POINTS = (
    re.findall(rf"^```{language}\n(.*?)^```", PAGE.partition("## An objective")[2], re.MULTILINE | re.DOTALL)[0]
    for language in ("python", "toml")
)
"""The package that the page shows."""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """An installed package with an objective."""
    look_again(OBJECTIVES, monkeypatch)
    bring(tmp_path / "site", monkeypatch, "focal_objective", THEIRS, tomllib.loads(POINTS)["project"]["entry-points"])


@pytest.mark.usefixtures("theirs")
def test_an_objective_of_another_package_is_trained_by_the_command(tmp_path, capsys):
    """With its own flag, in the dry run, in the report, in the manifest; at gamma 0 it learns what `likelihood` learns."""
    task, weights = make_task(tmp_path), {}
    words = [
        "--proposal", task / "proposal", "--aligner", task / "start", "--dataset", task / "train.jsonl", "--max_steps", 3,
        "--per_device_train_batch_size", 8, "--report_to", "none", "--disable_tqdm", "--use_cpu", "--dev_samples", 0,
        "--train_draft", "false", "--learning_rate", 1e-2,
    ]  # fmt: skip
    runs = {
        "focal": ["--objective", "focal", "--gamma", 2.0], "focal0": ["--objective", "focal", "--gamma", 0],
        "likelihood": ["--contrast", 0, "--sft_weight", 0],
    }  # fmt: skip
    status, out, _ = called(capsys, "train", *words, *runs["focal"], "--output_dir", task / "focal", "--dry_run", "--json")
    assert status == 0
    assert json.loads(out)["rejected"] is False
    for name, more in runs.items():
        status, out, errors = called(capsys, "train", *words, *more, "--output_dir", task / name, "--json")
        assert status == 0, errors
        weights[name] = load_file(task / name / "model.safetensors")
    for name, weight in weights["likelihood"].items():  # from whole rows and from logits: rounding apart
        assert_close(weights["focal0"][name], weight, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(weights["focal"]["lm_head.weight"], weights["focal0"]["lm_head.weight"], atol=1e-4)
    report = json.loads((task / "focal" / "training.json").read_text())
    assert report["objective"] == {"name": "focal", "gamma": 2.0}
    assert report["metrics"]["eval_focal"] == pytest.approx(report["metrics"]["eval_loss"], rel=0.2)
    assert json.loads((task / "focal" / "trimtab.json").read_text())["objective"] == "focal"
    status, _, errors = called(capsys, "train", *words, "--gamma", 1, "--output_dir", task / "none")
    assert status == 2
    assert "--gamma is for --objective focal, and 'likelihood' has none: leave it out" in " ".join(errors)
    status, _, errors = called(capsys, "train", *words, *runs["focal"][:3], -1, "--output_dir", task / "none")
    assert status == 2
    assert "gamma must be" in " ".join(errors)
    status, out, _ = called(
        capsys, "score", "--proposal", task / "proposal", "--aligner", task / "focal", "--dataset", task / "held_out.jsonl"
    )
    assert status == 0


@pytest.mark.usefixtures("theirs")
def test_its_flag_is_in_the_help(capsys):
    status, shown, _ = called(capsys, "train", "--help")
    assert status == 0
    assert "{grpo,likelihood,preference,ram,sft,tb,soft_q,subtb,focal}" in shown
    assert "how much less is learnt from what is likely already" in " ".join(shown.split())


@dataclasses.dataclass(frozen=True)
class Whole(Objective):
    name = "whole"

    def token_losses(self, setting):
        return (Alone(),)

    def loss(self, batch):
        return batch.sum(batch.tokens(Alone()))


FROZEN = dataclasses.dataclass(frozen=True)


def of(**body):
    """A dataclass like `Whole`, with this body."""
    annotations = {key: kind for key, (kind, _) in body.items() if isinstance(key, str)} if body else {}
    namespace = {key: value for key, (_, value) in body.items()} | {"__annotations__": annotations, "name": "other"}
    return FROZEN(type("Other", (Whole,), namespace))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (dict, "it is no subclass of trimtab.train.objectives.Objective"),
        (type("Nameless", (Whole,), {"name": None}), "its `name` must be an identifier, for manifests have it"),
        (type("Hyphened", (Whole,), {"name": "my-sft"}), "its `name` must be an identifier"),
        (type("Plain", (Whole,), {"name": "plain"}), "it must be a frozen dataclass"),
        (
            dataclasses.dataclass(frozen=True)(type("Empty", (Objective,), {"name": "empty"})),
            "it lacks `token_losses` or `loss`",
        ),
        (of(gamma=(float, 1.0)), "its field 'gamma' is no trimtab.options.option"),
        (of(gamma=(tuple[float, ...], option((), "of what"))), "its option 'gamma' must be an int, a float, a bool or a str"),
        (of(gamma=("Missing", option(1.0, "of what"))), "its annotations cannot be read: name 'Missing' is not defined"),
    ],
)
def test_what_is_no_objective_is_refused(value, message):
    _check(Whole)
    _check(of(gamma=(float | None, option(None, "of what", low=0))))
    with pytest.raises(InvalidOption, match=message):
        _check(value)


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("objective", ["likelihood", "focal"])
def test_a_later_round_of_any_residual_goes_on_with_its_settings(tmp_path, objective):
    """What a name of ours has, another package's has too."""
    manifest = {"weight": 2.0, "aligner_temperature": 1.6, "objective": objective, "rule": "product"}
    found = Description(tmp_path, False, None, Manifest(vocabulary="sha256:0", **manifest))
    plan = resolve(
        task_options(tmp_path, "again", objective=objective, start="pretrained", aligner=str(tmp_path)), Facts(found)
    )
    assert (plan.asked.weight, plan.asked.aligner_temperature) == (2.0, 1.6)


def test_a_token_loss_that_does_not_say_that_it_reads_the_proposal_is_told():
    rows = Examples(setting_of("product", 1.0)).rows("chosen")._replace(proposal=None)
    with pytest.raises(InvalidOption, match=r"looks at rows\.logp, and does not say reads_proposal = True"):
        _ = rows.logp


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("alpha: int", "alpha"),
        ("config: int", "config"),
        ("json: int", "json"),
        ("max_steps: int", "max_steps"),
        ("rule: str", "rule"),
        ("seed: int", "seed"),
    ],
)
def test_an_option_with_the_name_of_another_one_is_no_flag_and_bars_only_its_objective(
    tmp_path, monkeypatch, caplog, kind, taken
):
    ours = objective_flags()
    look_again(OBJECTIVES, monkeypatch)
    clashing = (
        THEIRS.replace("gamma: float = option(2.0,", f"{kind} = option(0,").replace("self.gamma", "2.0").replace(", low=0", "")
    )
    bring(tmp_path, monkeypatch, "focal_objective", clashing, tomllib.loads(POINTS)["project"]["entry-points"])
    flags = objective_flags()
    assert "focal" not in "".join(flag.text for flag in flags.values())
    assert set(ours) == flags.keys()
    assert f"the option '{taken}' of 'focal' has the name of another one" in caplog.text


@dataclasses.dataclass(frozen=True)
class OfWanted(Whole):
    """Compares the wanted answer alone."""

    name = "of_wanted"

    def compares(self, setting):
        return True

    def loss(self, batch):
        return -batch.gain(batch.tokens(Alone()))


@pytest.mark.parametrize("head", [False, True], ids=["aligner", "head"])
def test_what_compares_wanted_answers_alone_needs_no_others(tmp_path, monkeypatch, head):
    look_again(OBJECTIVES, monkeypatch)
    OBJECTIVES.register(OfWanted)
    task = make_task(tmp_path)
    write_rows(task / "alone.jsonl", [{key: row[key] for key in ("prompt", "chosen")} for row in task_rows(24)])
    said = {"objective": "of_wanted", "dataset": str(task / "alone.jsonl"), "rule": "geometric"} | (
        {"aligner": ""} if head else {}
    )
    report = run_training(task_options(task, "wanted", {"max_steps": 2}, **said))
    assert report["metrics"]["eval_loss"] < 100
    assert estimate(task_options(task, "dry", {"max_steps": 2}, **said), Expected(tflops=1.0))["rejected"] is False
