"""`trimtab.blend(...)`: what `trimtab blend` does, from Python."""

from typing import Any

from trimtab.blend.options import BlendOptions
from trimtab.options import make_options, named_for_python

__all__ = ["blend"]


def blend(options: BlendOptions | None = None, /, **settings: Any) -> dict[str, Any]:
    """Blend aligners into one, θ = θ_0 + Σ_d λ_d (θ_d − θ_0). What `trimtab blend` does.

        trimtab.blend(base="A0", vector=["med=A1:0.7", "law=A2:-0.3"], out="A")

    Args:
        options: all options at once; `BlendOptions` says what each means.
        settings: options by name, in the place of `options` or over its fields.

    Returns:
        `out`, `kind` (`"weights"`, or `"lora"` for LoRA adapters of one base), the `parts` and what the manifest says of how to
        decode with it.

    Raises:
        InvalidOption: an option is not known, is missing, or cannot be; or the parts disagree on what a flag could say.
        ModelError: a part cannot be read, is not what the others are, or has another vocabulary.
    """
    from trimtab.blend.run import run

    with named_for_python(BlendOptions):
        return run(make_options(BlendOptions, options, settings))
