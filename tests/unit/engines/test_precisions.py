"""There is one table of precisions, and nothing is missing in it."""

from __future__ import annotations

import pytest

from recallseg.engines.budget import memory_budget
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.engines.precisions import PRECISIONS, find_precision, precisions_made
from recallseg.engines.registry import ENGINES, engine_class


def test_a_precision_is_made_from_one_that_is_exported_or_made() -> None:
    for precision in PRECISIONS.values():
        assert (precision.made_by == "export") == (not precision.made_from)
        assert not precision.made_from or precision.made_from in PRECISIONS
        assert 0 < precision.tolerance < 1
    assert precisions_made("export") == ("fp32", "pooled")
    made = [
        name for by in ("export", "floating", "native", "quantized") for name in precisions_made(by)
    ]
    assert sorted(made) == sorted(PRECISIONS)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_offer_only_what_is_in_it(name: str) -> None:
    offered = getattr(engine_class(name), "precisions", ())
    assert set(offered) <= set(PRECISIONS)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_budget_knows_every_precision(precision: str) -> None:
    demo = Bundle.open("demo")
    budget = memory_budget(demo, k=4, n=1, precision=precision, image_size=1024)
    exact = memory_budget(demo, k=4, n=1, precision="fp32", image_size=1024)
    assert 0 < budget.total <= exact.total


def test_another_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match=r"no precision 'fp8'; choose fp32, fp32-native, .*pooled"):
        find_precision("fp8")
