"""From measurements to verdicts: which of five compiled graphs may be used on this device.

The golden case has three exemplars. A kernel that is wrong beyond some number of keys (PITFALLS 5)
passes it, so ``attend`` is asked once more with as many memories as it was built for. That needs no
further golden tensors: the same exemplar recalled k times has k equal keys for every one, the
softmax divides their weight by k, and the result is that of k = 1; likewise for all three exemplars
repeated.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from recallseg.engines.bundle import Bundle
from recallseg.engines.composition import Composition, Features, Prediction, Recall
from recallseg.engines.engine import Engine, Tensor
from recallseg.engines.golden import GoldenTensors, run_case
from recallseg.engines.precisions import find_precision
from recallseg.engines.specs import GRAPHS
from recallseg.engines.verdicts import Verdict
from recallseg.engines.verification import Check, compare_with_golden, relative_error

__all__ = ["check_repeated", "prove"]

_MADE_BY = {
    "embedding": "embed",
    "features": "encode",
    "skip0": "encode",
    "skip1": "encode",
    "memories": "memorize",
    "pointers": "memorize",
    "conditioned": "attend",
}
"""Which graph makes a tensor; the rest comes from ``decode``."""

_AFTER: Mapping[str, tuple[str, ...]] = {
    "embed": (),
    "encode": (),
    "memorize": ("encode",),
    "attend": ("encode", "memorize"),
    "decode": ("encode", "memorize", "attend"),
}
"""Whose errors reach a graph: it is only judged when these are right."""


def prove(
    bundle: Bundle, engines: Mapping[str, Engine], precision: str, device: str, *, most: int
) -> dict[str, Verdict]:
    """Run the golden case and the repeated memories; judge each graph.

    Parameters
    ----------
    bundle, engines : all five graphs, in the form that is to be judged.
    precision : chooses the tolerance.
    device : for the record.
    most : the largest k that the engines take.

    Returns
    -------
    verdicts : by graph. A graph behind a wrong one is missing: its inputs were wrong, so that
        nothing is known of it.

    Raises
    ------
    EngineRunError
        If an engine fails altogether; that says nothing of its numbers and is not recorded.
    """
    golden = GoldenTensors.load(bundle.golden_file)
    composition = Composition(engines)
    found = run_case(golden.case, composition, bundle.geometry, bundle.normalisation, bundle.memory)
    name = engines["embed"].name
    checks = [
        *compare_with_golden(bundle, golden, found, name, precision, strict=False).checks,
        *check_repeated(bundle, composition, found, precision, most),
    ]
    verdicts: dict[str, Verdict] = {}
    for graph in GRAPHS:
        if any(before not in verdicts or not verdicts[before].passed for before in _AFTER[graph]):
            continue
        own = [check for check in checks if _maker(check.tensor) == graph]
        wrong = [check for check in own if not check.passed]
        reason = ""
        if wrong:
            reason = (
                f"'{wrong[0].tensor}' of graph '{graph}' is off by {wrong[0].error:.2e}, allowed "
                f"is {wrong[0].tolerance:.0e}"
            )
        verdicts[graph] = Verdict(
            not reason,
            device,
            bundle.golden_digest,
            tuple((check.tensor, check.error, check.tolerance) for check in own),
            reason,
        )
    return verdicts


def check_repeated(
    bundle: Bundle,
    composition: Composition,
    found: Mapping[str, Tensor],
    precision: str,
    most: int,
) -> list[Check]:
    """Compare ``attend`` on repeated memories with what it made of each of them once.

    Parameters
    ----------
    found : a run of the golden case; its memories and query features are used.
    most : repetitions go up to this k.
    """
    features = Features(found["features"], found["skip0"], found["skip1"])
    exemplars = found["memories"].shape[1]

    def attend(count: int, k: int) -> Tensor:
        recall = Recall.allocate(bundle.geometry, 1, k, bundle.memory)
        for i in range(k):
            recall.memories[0, i] = found["memories"][0, i % count]
            recall.pointers[0, i] = found["pointers"][0, i % count]
        prediction = Prediction.allocate(bundle.geometry, 1)
        composition.attend(features, recall, prediction)
        return prediction.conditioned

    checks = []
    for count in (1, exemplars):
        k = most // count * count
        if k > count:
            once = found["conditioned"][:1] if count == exemplars else attend(1, 1)
            error = relative_error(attend(count, k), np.asarray(once))
            checks.append(
                Check(f"conditioned at k={k}", error, find_precision(precision).tolerance)
            )
    return checks


def _maker(tensor: str) -> str:
    return _MADE_BY.get(tensor.partition(" ")[0], "decode")
