"""Load models and tokenizers from folders and hub ids, refusing in one clear sentence what cannot be used.

Weights come from safetensors only: nothing is unpickled, and no code of a repository is run. A checkpoint that would leave some
weight at its random initial value, whose weights are codes that nothing decodes, or that contains a NaN, is an error.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from trimtab.errors import CheckpointError, InvalidOption, ModelError, TrimtabError
from trimtab.extras import is_here, need
from trimtab.files import expand_home
from trimtab.models.blocks import FAMILIES
from trimtab.models.composite import KEY_MAPPING, text_config
from trimtab.models.gguf import is_gguf, load_gguf_tokenizer
from trimtab.models.stored import check_filled, stored_tensors
from trimtab.models.supported import check_supported
from trimtab.models.weight_files import expand, folder_of
from trimtab.reasons import reason_of

__all__ = [
    "attention_for",
    "check_dtype",
    "check_finite",
    "check_placeable",
    "expand",
    "load_configs",
    "load_model",
    "load_tokenizer",
    "load_tokenizer_alone",
    "loading_arguments",
    "pick_device",
    "placed",
    "quiet_loading",
    "quietly_reported",
    "readable",
]

logger = logging.getLogger(__name__)


def pick_device(device: str | torch.device | None) -> torch.device:
    """The named device, or the first GPU if there is one, or the CPU."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
        return chosen
    except (RuntimeError, AssertionError) as error:
        raise InvalidOption(f"device: {reason_of(error)}") from None


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> Any:
    """A causal language model in evaluation mode.

    Args:
        source: a folder, or a hub id.
        dtype: `"auto"` takes the checkpoint's own; otherwise a torch dtype or its name.
        device: where to put it; `"auto"` spreads a large model over several GPUs with accelerate. Default: the first GPU, or
            the CPU.
        revision: a hub revision.

    Raises:
        InvalidOption: with `"auto"`, it does not fit into the memory of the GPUs, or of the machine where there is none; or
            accelerate is not installed, which `"auto"` and quantised folders need.
        CheckpointError: missing, pickled, incomplete, corrupt or non-finite weights, or codes, see `trimtab.models.stored`.
        UnsupportedModel: an architecture that ragged slots cannot decode.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    how = loading_arguments(dtype, device, revision)
    source = expand(source)
    with readable(source, "model"):
        whole = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        config = text_config(whole)
        check_supported(config)
        check_placeable(config, source)
        _check_size(config, source)
        if config is not whole:
            logger.info("of '%s', a '%s' model, its text model is used: '%s'", source, whole.model_type, config.model_type)
            how |= {"config": config, "key_mapping": KEY_MAPPING}
        with quietly_reported(parts=config is not whole):
            model, report = AutoModelForCausalLM.from_pretrained(source, attn_implementation=attention_for(config), **how)
    model = placed(model, device)
    _check_spread(model, source)
    if getattr(config, "quantization_config", None) and getattr(model, "hf_quantizer", None) is None:
        wanted = getattr(torch, dtype, model.dtype) if isinstance(dtype, str) else dtype
        model = model.to(wanted)  # weights were made of what no kernel here computes with, in bfloat16 whatever was asked
    check_filled(model, report, source, folder_of(source, revision), getattr(config, "quantization_config", None))
    check_finite(model, source)
    return model.eval()


def _check_spread(model: Any, source: str | Path) -> None:
    """Refuse a model of which `"auto"` left a part out of the memory of the devices that compute: each token would fetch it."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    computing = places - {"cpu", "disk"} or {"cpu"}
    if aside := sorted(places - computing):
        parts = sum(str(place) in aside for place in model.hf_device_map.values())
        named = ", ".join(f"GPU {place}" if place.isdigit() else place for place in sorted(computing))
        raise InvalidOption(
            f"device: '{source}' does not fit into the memory of {named}: {parts} of its"
            f" {len(model.hf_device_map)} parts would lie in that of {' and '.join(aside)}, and every token would fetch them"
            " from there. Choose a smaller dtype, a quantised folder, or a GGUF file with --backend llamacpp"
        )


def attention_for(config: Any) -> str:
    """The attention to load a model with, whatever its files say: SDPA, or the eager one where its class has no other.

    Scores that are capped need the eager one, too: SDPA leaves the cap out without a word, and transformers' classes say so
    since 5.21 only.
    """
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM._model_mapping.get(type(config), None)
    block = FAMILIES.get(config.model_type)
    capped = getattr(config, "attn_logit_softcapping", None) is not None and (block is None or block.caps_scores)
    return "sdpa" if not capped and getattr(found, "_supports_sdpa", True) else "eager"


def check_dtype(dtype: str | torch.dtype, name: str = "dtype") -> None:
    """Refuse what is no dtype of weights.

    Args:
        dtype: `"auto"`, a torch dtype or its name.
        name: what errors call it.
    """
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise InvalidOption(f"{name}: '{dtype}' is none of torch's; say auto, float32, bfloat16 or float16")


def loading_arguments(dtype: str | torch.dtype, device: str | torch.device | None, revision: str | None) -> dict[str, Any]:
    """How every model is loaded: safetensors only, no code from the hub, and with a report of what does not fit.

    Raises:
        InvalidOption: the dtype is none of torch's for weights.
    """
    check_dtype(dtype)
    return {
        "revision": revision,
        "dtype": dtype,
        **_device_map(device),
        "use_safetensors": True,
        "trust_remote_code": False,
        "ignore_mismatched_sizes": True,  # they are reported, and refused by name, see `check_filled`
        "output_loading_info": True,
    }


def _device_map(device: str | torch.device | None) -> dict[str, Any]:
    """Where transformers puts weights while it reads them, which it cannot choose without accelerate: see `placed`."""
    if device == "auto":
        need("train", "device 'auto'", "accelerate")
        return {"device_map": "auto"}
    chosen = pick_device(device)
    return {"device_map": {"": chosen}} if is_here("accelerate") else {}


def check_placeable(config: Any, source: str | Path) -> None:
    """Refuse a quantised folder without accelerate, with which alone transformers reads one."""
    if getattr(config, "quantization_config", None):
        need("train", f"'{source}', a quantised folder,", "accelerate")


def placed(model: Any, device: str | torch.device | None) -> Any:
    """A model as `from_pretrained` gave it, on its device: without accelerate, all are read into the machine's memory first."""
    return model if is_here("accelerate") else model.to(pick_device(device))


@contextlib.contextmanager
def quietly_reported(*, parts: bool = False) -> Iterator[None]:
    """Without transformers' table of the weights that `check_filled` refuses in one sentence.

    Args:
        parts: whether files hold other models, too, whose weights are left over.
    """
    known = ("MISMATCH", "MISSING", *(["UNEXPECTED"] if parts else []))

    def says_something_new(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        refused = "LOAD REPORT" in said and any(word in said for word in known)
        return not refused or "CONVERSION" in said  # of which the error says no more than that it stands in the table

    theirs = logging.getLogger("transformers.modeling_utils")
    theirs.addFilter(says_something_new)
    try:
        yield
    finally:
        theirs.removeFilter(says_something_new)


def load_configs(source: str | Path, *, revision: str | None = None, local_only: bool = False) -> tuple[Any, Any]:
    """The configuration of a model and of its generation (None if there is none), without its weights.

    With `local_only` the hub is not asked, only its cache.
    """
    from transformers import AutoConfig, GenerationConfig

    where = {"revision": revision, "local_files_only": local_only}
    source = expand(source)
    with readable(source, "configuration"):
        config = text_config(AutoConfig.from_pretrained(source, trust_remote_code=False, **where))
        try:
            return config, GenerationConfig.from_pretrained(source, **where)
        except OSError:
            return config, None


def _check_size(config: Any, source: str | Path) -> None:
    """Refuse a folder whose configuration asks for far more weights than its files hold, before memory is taken for them."""
    from transformers import AutoModelForCausalLM

    if not Path(source).is_dir() or getattr(config, "quantization_config", None):
        return
    with torch.device("meta"):
        wanted = sum(
            parameter.numel()
            for parameter in AutoModelForCausalLM.from_config(config, attn_implementation=attention_for(config)).parameters()
        )
    held = sum(tensor.size for tensor in stored_tensors(Path(source)).values())
    if wanted > 2 * held:  # what lacks only some is loaded, and then refused by the name of what is missing
        raise CheckpointError(
            f"'{source}' does not fill the model: config.json asks for {wanted:,} weights, its files hold {held:,}"
        )


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a folder or hub id."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    source = expand(source)
    with readable(source, "tokenizer"):
        # AutoTokenizer goes by the model's type: a Qwen2 model that was saved with another tokenizer would get Qwen2's.
        named = get_tokenizer_config(source, revision=revision, trust_remote_code=False).get("tokenizer_class")
        plain = named in ("PreTrainedTokenizerFast", "TokenizersBackend")
        loader = PreTrainedTokenizerFast if plain else AutoTokenizer
        return loader.from_pretrained(source, revision=revision, trust_remote_code=False)


def load_tokenizer_alone(source: str | Path) -> Any:
    """The same, or of a GGUF file, of which nothing else is read then."""
    return load_gguf_tokenizer(source) if is_gguf(source) else load_tokenizer(source)


def check_finite(model: Any, source: str | Path) -> None:
    """Refuse weights with NaN or infinity, naming the first such tensor; of a quantiser's own tensors, what they stand for."""
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if type(weight) not in (torch.Tensor, torch.nn.Parameter) and hasattr(weight, "dequantize"):
            weight = weight.dequantize()
        if weight.is_floating_point() and weight.itemsize == 1:
            weight = weight.float()  # torch does not ask floats of 8 bits
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"'{source}' contains NaN or infinite weights in {name}")


@contextlib.contextmanager
def readable(source: str | Path, what: str) -> Iterator[None]:
    """Check that a local folder can hold `what`, and turn the libraries' many errors into one sentence."""
    folder = expand_home(source)
    if folder.is_file():
        raise ModelError(f"'{source}' is a file; give the folder that holds the {what}")
    if folder.is_dir():
        _check_folder(folder, source, what)
    elif len(folder.parts) > 2 or folder.is_absolute() or str(source).startswith((".", "~")):
        raise ModelError(f"'{source}' does not exist")
    try:
        yield
    except TrimtabError:
        raise
    except Exception as error:  # any there is: what a configuration may get wrong, libraries find anywhere
        reason = reason_of(error)
        if isinstance(error, ModuleNotFoundError) and error.name:
            reason += f" (pip install {error.name.partition('.')[0]})"
        if not folder.is_dir():
            raise ModelError(f"'{source}' is no folder here, and the hub gave no {what} of that name: {reason}") from error
        kind = CheckpointError if isinstance(error, SafetensorError) else ModelError
        raise kind(f"cannot read the {what} in '{source}': {reason}") from error


def _check_folder(folder: Path, source: str | Path, what: str) -> None:
    needed = "tokenizer_config.json" if what == "tokenizer" else "config.json"
    if what == "aligner":
        return
    if not (folder / needed).is_file():
        raise ModelError(f"'{source}' holds no {what}: {needed} is missing")
    try:
        json.loads((folder / needed).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"'{source}': {needed} is not JSON ({error})") from None
    if what == "model" and (folder / "adapter_config.json").is_file():  # transformers would put it into the model by itself
        raise CheckpointError(
            f"'{source}' holds an adapter beside its {what} (adapter_config.json): move it into a folder of its own, and name"
            " that as the aligner"
        )
    if what == "model" and not any(folder.glob("*.safetensors")):
        pickled = sorted(item.name for item in folder.iterdir() if item.suffix in (".bin", ".pt", ".pth", ".pkl"))
        why = f"; {pickled[0]} is pickled, which is never loaded: save the model again as safetensors" if pickled else ""
        raise CheckpointError(f"'{source}' holds no safetensors weights{why}")
    index = folder / "model.safetensors.index.json"
    if what == "model" and index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"'{source}': {index.name} is no index ({error})") from None
        if gone := [part for part in parts if not (folder / part).is_file()]:
            raise CheckpointError(f"'{source}' lacks {len(gone)} of its {len(parts)} files of weights, such as {gone[0]}")


def quiet_loading() -> None:
    """Hide transformers' bar for each checkpoint it loads, and what it says to PEFT, which no user can mend."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
