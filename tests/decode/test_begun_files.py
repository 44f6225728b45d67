"""What files of earlier versions were begun with is written as it was, so that they go on."""

from trimtab.core.logprobs import Warp
from trimtab.core.rules import KLGate, Product
from trimtab.decode.shaping import Shaping


def test_a_shaping_is_written_as_before_there_were_blends_and_gates_of_any_kind():
    """`propose` and `eval` compare these texts with those of the run that they are to go on with."""
    warp = "Warp(temperature=1.0, top_k=0, top_p=1.0, min_p=None, max_top_k=0)"
    rest = f"weights=(1.0,), proposal={warp}, aligners=({warp},), draft_temperature=0.75"
    given = (1.0,), Warp(1.0, 0, 1.0), (Warp(1.0, 0, 1.0),), 0.75
    assert repr(Shaping(Product(), *given)) == f"Shaping(rule=Product(), {rest})"
    assert repr(Shaping(KLGate(), *given)) == f"Shaping(rule=KLGate(tau=0.1), {rest})"
    assert repr(Shaping(Product(), *given, blend=(0.5, 0.5))) == f"Shaping(rule=Product(), {rest}, blend=(0.5, 0.5))"
