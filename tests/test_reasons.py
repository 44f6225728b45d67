"""Libraries' errors in one line: each as the library raises it, and the words that a reader needs."""

from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from torch._utils import ExceptionWrapper

from trimtab.reasons import LONGEST, reason_of


def raised(action) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever the library raises
        action()
    return caught.value


def test_of_weights_that_do_not_fit_the_tensor_and_both_sizes_are_named():
    error = raised(lambda: torch.nn.Linear(2, 3).load_state_dict({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}))
    assert str(error).splitlines()[0] == "Error(s) in loading state_dict for Linear:"
    assert reason_of(error) == (
        "Error(s) in loading state_dict for Linear: size mismatch for weight: copying a param with shape "
        "torch.Size([3, 5]) from checkpoint, the shape in current model is torch.Size([3, 2])."
    )


def test_a_check_of_pydantic_names_its_field():
    class Shape(BaseModel):
        width: int

    assert reason_of(raised(lambda: Shape(width="wide"))) == (
        "1 validation error for Shape width Input should be a valid integer, unable to parse string as an integer "
        "[type=int_parsing, input_value='wide', input_type=str]"
    )


def test_pickled_weights_that_torch_does_not_read_are_named_behind_its_advice(tmp_path):
    torch.save(Path("here"), tmp_path / "x.pt")
    text = reason_of(raised(lambda: torch.load(tmp_path / "x.pt", weights_only=True)))
    assert text.startswith("Weights only load failed. WeightsUnpickler error: ")
    assert "pathlib" in text


def test_of_a_group_the_first_error_is_told():
    error = ExceptionGroup("several tasks failed", [ValueError("the reason\nadvice"), TypeError("another")])
    assert reason_of(error) == "several tasks failed (2 sub-exceptions) the reason"


def test_of_a_worker_its_own_error_is_told():
    try:
        raise RuntimeError("the reason")
    except RuntimeError:
        caught = ExceptionWrapper(where="in replica 0")
    assert reason_of(raised(caught.reraise)) == "Caught RuntimeError in replica 0. RuntimeError: the reason"


def test_a_configuration_that_transformers_refuses_names_the_value():
    from transformers import LlamaConfig

    text = reason_of(raised(lambda: LlamaConfig(hidden_size="wide")))
    assert "hidden_size" in text
    assert "wide" in text


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("one line", "one line"),
        ("\n\n  the reason \nadvice", "the reason"),
        ("A heading:\n\nAnother:\n\tthe reason.\nadvice", "A heading: Another: the reason."),
        (
            "404 Client Error. (Request ID: Root=1-6)\n\nRepository Not Found for url: https://hub/x.\nPlease make sure",
            "404 Client Error. (Request ID: Root=1-6) Repository Not Found for url: https://hub/x.",
        ),
        ("A heading that nothing follows:", "A heading that nothing follows"),
        ("Multiple errors occurred\n- a\n- b", "Multiple errors occurred - a"),
        ("Several things are wrong\n1. a\n2. b", "Several things are wrong 1. a"),
        ("This cannot be read\n    the reason\nadvice", "This cannot be read the reason"),
        ("====\nthe reason\n====", "the reason"),
        (
            'Traceback (most recent call last):\n  File "x", line 1\n    f()\n    ^^^\nOSError: the reason',
            "OSError: the reason",
        ),
        ("", "ValueError"),
        ("x" * 9999, "x" * LONGEST + "…"),
    ],
)
def test_headings_are_not_reasons(message, reason):
    assert reason_of(ValueError(message)) == reason


def test_a_heading_without_a_reason_is_followed_by_the_cause():
    error = RuntimeError("An error occurred while generating the dataset")
    error.__cause__ = ValueError("JSON parse error: Missing a name\nadvice")
    assert reason_of(error) == "An error occurred while generating the dataset JSON parse error: Missing a name"
    error = RuntimeError()
    error.__cause__ = ValueError("the reason")
    assert reason_of(error) == "the reason"


def test_a_missing_key_is_called_one():
    assert reason_of(raised(lambda: {}["hidden_size"])) == "KeyError: 'hidden_size'"
