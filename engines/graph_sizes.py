"""What a stored graph needs: its weights, and the tensors between its operators that live at once.

Both are read from the graph's file; no weights are read, and nothing runs. Exporters write the
shape of every tensor beside it, in the symbols of its inputs (``578*k``); what converts a graph to
other types leaves them out, so that shapes are those of the fp32 graph of the same variant.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from math import prod
from pathlib import Path

from recallseg.engines.errors import BundleError
from recallseg.engines.wire import Wire

__all__ = ["GraphSizes"]

_IN_PLACE = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"))
"""Operators whose output is their input under another name."""
_FLOAT, _BYTES = 1, {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2}
"""``TensorProto.DataType``: that of fp32, and the bytes of one element."""

_Dims = tuple[str, ...]


class GraphSizes(Wire):
    """Reads one graph.

    Parameters
    ----------
    path : the ``.onnx`` file, which :func:`recallseg.engines.graph_check.check_graph` has passed.

    Attributes
    ----------
    weights : bytes of the graph's constants, wherever they lie.

    Raises
    ------
    BundleError
        For what is no graph.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._nodes: list[tuple[str, list[str], list[str]]] = []
        self._tensors: dict[str, tuple[int, _Dims]] = {}
        self._outside: set[str] = set()  # inputs, outputs: the caller's
        self.weights = 0
        try:
            with path.open("rb") as file:
                held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: it is empty
            raise self.refused(f"cannot be read: {error}") from error
        with held:
            super().__init__(held)
            for number, at, stop in self.parts(0, len(held)):
                if number == 7:
                    self._graph(at, stop)

    def refused(self, why: str) -> BundleError:
        return BundleError(f"the graph {self._path} {why}. Export the bundle again.")

    def peak(self, symbols: Mapping[str, int], *, float_bytes: int, fused: bool) -> int:
        """Return the most bytes of tensors that live at once while the graph runs as it is stored.

        A tensor lives from the operator that makes it to the last that reads it; inputs, outputs
        and constants are not counted, and nothing is made in the place of what it is made from.

        Parameters
        ----------
        symbols : what n, k and p stand for: structures, memories, points.
        float_bytes : of a number between two operators: 4, or 2.
        fused : whether scores of attention, and what a softmax makes of them, are never stored.

        A tensor whose shape was not stored is as large as what it is made from.
        """
        owner: dict[str, str] = {}
        last: dict[str, int] = {}
        makers: dict[str, tuple[str, list[str]]] = {}
        for index, (operator, inputs, outputs) in enumerate(self._nodes):
            for name in inputs:
                last[owner.get(name, name)] = index
            if operator in _IN_PLACE:
                owner[outputs[0]] = owner.get(inputs[0], inputs[0])
            for name in outputs:
                makers[name] = (operator, inputs)
        unstored = self._scores(makers) if fused else set()
        ends: dict[int, list[str]] = {}
        for name, index in last.items():
            ends.setdefault(index, []).append(name)
        sizes: dict[str, int] = {}
        alive: dict[str, int] = {}
        most = now = 0
        for index, (_, inputs, outputs) in enumerate(self._nodes):
            for name in outputs:
                size = self._size(name, symbols, float_bytes)
                if size is None:  # what only moves its input: a symbol was lost on the way
                    size = max((sizes.get(one, 0) for one in inputs), default=0)
                sizes[name] = size
                if name and not {name} & (owner.keys() | self._outside | unstored):
                    alive[name] = size
                    now += size
            most = max(most, now)
            for name in ends.get(index, ()):
                now -= alive.pop(name, 0)
        return most

    def _scores(self, makers: Mapping[str, tuple[str, list[str]]]) -> set[str]:
        """Return the tensors of softmaxes over products."""
        found = set()
        for name, (operator, inputs) in makers.items():
            if operator == "Softmax" and makers.get(inputs[0], ("",))[0] == "MatMul":
                found |= {name, inputs[0]}
        return found

    def _size(self, name: str, symbols: Mapping[str, int], float_bytes: int) -> int | None:
        """Return the bytes of a tensor, None where its shape was not stored."""
        kind, dims = self._tensors.get(name, (_FLOAT, ("",)))
        size = float_bytes if kind == _FLOAT else _BYTES.get(kind, 8)
        for factor in "*".join(dims).split("*") if dims else ():
            if factor.isdigit():
                size *= int(factor)
            elif factor in symbols:
                size *= symbols[factor]
            else:
                return None
        return size

    def _graph(self, start: int, end: int) -> None:
        for number, at, stop in self.parts(start, end):
            if number == 1:
                self._node(at, stop)
            elif number == 5:
                self._constant(at, stop)
            elif number in (11, 12, 13):  # input, output, value_info
                name = self._value(at, stop)
                if number != 13:
                    self._outside.add(name)

    def _node(self, start: int, end: int) -> None:
        operator = ""
        inputs: list[str] = []
        outputs: list[str] = []
        for number, at, stop in self.parts(start, end):
            if number == 4:
                operator = self.text(at, stop)
            elif number in (1, 2):
                (inputs if number == 1 else outputs).append(self.text(at, stop))
        self._nodes.append((operator, inputs, outputs))

    def _constant(self, start: int, end: int) -> None:
        dims: list[int] = []
        kind = 0
        for number, at, stop in self.parts(start, end):
            if number == 1:
                dims += self.numbers(at, stop)
            elif number == 2:
                kind = self.numbers(at, stop)[0]
        self.weights += prod(dims) * _BYTES.get(kind, 8)

    def _value(self, start: int, end: int) -> str:
        """Read a ``ValueInfoProto``; return its name."""
        name, kind, dims = "", 0, []
        for number, at, stop in self.parts(start, end):
            if number == 1:
                name = self.text(at, stop)
            for field, inner, inner_stop in self.parts(at, stop) if number == 2 else ():
                for part, place, place_stop in self.parts(inner, inner_stop) if field == 1 else ():
                    if part == 1:  # elem_type
                        kind = self.numbers(place, place_stop)[0]
                    elif part == 2:  # shape
                        dims = [self._dim(a, s) for f, a, s in self.parts(place, place_stop)]
        self._tensors[name] = kind, tuple(dims)
        return name

    def _dim(self, start: int, end: int) -> str:
        """Read a ``Dimension``: a number or a formula."""
        for number, at, stop in self.parts(start, end):
            return str(self.numbers(at, stop)[0]) if number == 1 else self.text(at, stop)
        return ""
