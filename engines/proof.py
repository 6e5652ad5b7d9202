"""From measurements to verdicts: which of five compiled graphs may be used on this device.

What it takes until engines on a GPU are used is said here, once; a backend says how they are made.

The golden case has three exemplars. A kernel that is wrong beyond some number of keys (pitfall 5)
passes it, so ``attend`` is asked once more with as many memories as it was built for. That needs no
further golden tensors: the same exemplar recalled k times has k equal keys for every one, the
softmax divides their weight by k, and the result is that of k = 1; likewise for all three exemplars
repeated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import numpy as np

from recallseg.engines.bundle import Bundle
from recallseg.engines.composition import Composition, Features, Prediction, Recall
from recallseg.engines.engine import Engine, EngineOptions, Tensor
from recallseg.engines.errors import VerificationError
from recallseg.engines.golden import CORRECTED, GoldenTensors, run_case
from recallseg.engines.precisions import find_precision
from recallseg.engines.specs import GRAPHS
from recallseg.engines.verdicts import Verdict, Verdicts
from recallseg.engines.verification import Check, compare_with_golden, relative_error

__all__ = ["Candidate"]

_AFTER: Mapping[str, tuple[str, ...]] = {
    "embed": (),
    "encode": (),
    "memorize": ("encode",),
    "attend": ("encode", "memorize"),
    "decode": ("encode", "memorize", "attend"),
    "correct": ("encode", "memorize", "attend", "decode"),
}
"""Whose errors reach a graph: it is only judged when these are right. In the order of judging."""


class Candidate(ABC):
    """A bundle's graphs as one backend compiled them for one GPU: used once they were proven there.

    Parameters
    ----------
    engine : the backend's name.
    bundle, precision : whose graphs.
    options : with the device.

    Attributes
    ----------
    device : the GPU, driver included, as verdicts name it.
    records : where verdicts are kept, by the graphs that one speaks of.
    graphs : all five, and the optional ones that there are in this precision.
    most : the largest k that the engines take.
    again : for messages, what gives another chance to what was refused.
    always : whether they are proven at each start, whatever the records say.
    """

    records: Mapping[tuple[str, ...], Verdicts]
    graphs: tuple[str, ...]
    most: int
    again: str
    always: bool = False

    def __init__(self, engine: str, bundle: Bundle, precision: str, options: EngineOptions) -> None:
        self.engine, self.bundle, self.precision, self.options = engine, bundle, precision, options
        self.device = str(options.device.facts) if options.device else ""

    @abstractmethod
    def make(self, graphs: tuple[str, ...]) -> Mapping[str, Engine]:
        """Return engines that run these graphs."""

    def load(self, graphs: tuple[str, ...]) -> dict[str, Engine]:
        """Return engines that reproduced the bundle's golden tensors on this GPU, now or before.

        What nobody proved here yet is proven now, all graphs together, and recorded.

        Raises
        ------
        VerificationError
            If one was refused, now or before; with the tensor and its error.
        EngineRunError
            If one fails altogether; that is not recorded.
        PlanError
            If the outcome cannot be stored.
        """
        known = [
            record.find(self.device, self.bundle.golden_digest)
            for spoken_of, record in self.records.items()
            if not {*graphs}.isdisjoint(spoken_of)
        ]
        self._refuse(verdict for verdict in known if verdict is not None)
        if self.always or None in known:
            verdicts = self.prove()
            for spoken_of, record in self.records.items():
                said = [verdicts[graph] for graph in spoken_of if graph in verdicts]
                if said:  # the first that refuses, or the last one
                    record.record(next((each for each in said if not each.passed), said[-1]))
            self._refuse(verdicts.values())
        return {**self.make(graphs)}

    def prove(self) -> dict[str, Verdict]:
        """Judge each graph: as it is and, if CUDA graphs are wanted, recorded and replayed."""
        engines = self.make(self.graphs)
        for _ in range(3 if self.options.cuda_graphs else 1):
            verdicts = self.judge(engines)
            if not all(verdict.passed for verdict in verdicts.values()):
                break
        return verdicts

    def judge(self, engines: Mapping[str, Engine]) -> dict[str, Verdict]:
        """Run the golden case and the repeated memories; judge each graph.

        A graph behind a wrong one is missing in what is returned: its inputs were wrong, so that
        nothing is known of it.
        """
        bundle, golden = self.bundle, GoldenTensors.load(self.bundle.golden_file)
        composition = Composition(engines)
        found = run_case(
            golden.case, composition, bundle.geometry, bundle.normalisation, bundle.memory
        )
        asked = (self.engine, self.precision)
        checks = [
            *compare_with_golden(bundle, golden, found, *asked, strict=False).checks,
            *self._repeated(composition, found),
        ]
        makers = {made.name: name for name in GRAPHS for made in bundle.specs[name].outputs}
        by: dict[str, list[Check]] = {graph: [] for graph in _AFTER if graph in engines}
        for check in checks:  # masks come of what 'decode' makes
            maker = makers.get(check.tensor.partition(" ")[0], "decode")
            by["correct" if check.tensor.startswith(CORRECTED) else maker].append(check)
        unproven = [graph for graph, own in by.items() if not own]
        if unproven:
            raise VerificationError(
                f"no golden tensors of bundle {bundle.name} cover the graph '{unproven[0]}', and "
                f"engine '{self.engine}' runs nothing unproven. Export the bundle again."
            )
        verdicts: dict[str, Verdict] = {}
        for graph, own in by.items():
            if not all(before in verdicts and verdicts[before].passed for before in _AFTER[graph]):
                continue
            reasons = [
                f"'{check.tensor}' of graph '{graph}' is off by {check.error:.2e}, allowed is "
                f"{check.tolerance:.0e}"
                for check in own
                if not check.passed
            ]
            verdicts[graph] = Verdict(
                not reasons,
                self.device,
                bundle.golden_digest,
                tuple((check.tensor, check.error, check.tolerance) for check in own),
                reasons[0] if reasons else "",
            )
        return verdicts

    def _repeated(self, composition: Composition, found: Mapping[str, Tensor]) -> list[Check]:
        """Compare ``attend`` on repeated memories with what it made of each of them once.

        Its inputs are those of ``found``, a run of the golden case.
        """
        bundle, checks = self.bundle, []
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

        for count in (1, exemplars):
            k = self.most // count * count
            if k > count:
                once = found["conditioned"][:1] if count == exemplars else attend(1, 1)
                error = relative_error(attend(count, k), np.asarray(once))
                allowed = find_precision(self.precision).tolerance
                checks.append(Check(f"conditioned at k={k}", error, allowed))
        return checks

    def _refuse(self, verdicts: Iterable[Verdict]) -> None:
        for verdict in verdicts:
            if not verdict.passed:
                raise VerificationError(
                    f"engine '{self.engine}' in {self.precision} was refused on {self.device}: "
                    f"{verdict.reason}. Choose another precision or engine, or {self.again}."
                )
