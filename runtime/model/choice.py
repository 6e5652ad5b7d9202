"""What a model is opened with, and when an open one serves."""

from __future__ import annotations

from typing import NamedTuple

from recallseg.engines import defaults
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.engines.onnxruntime_cpu import usable_cores
from recallseg.engines.registry import check_choice
from recallseg.runtime.model.model import GpuOptions, Model

__all__ = ["Choice"]


class Choice(NamedTuple):
    """Engine, precision, CPU threads (None: all cores), use of the GPU (None: whichever)."""

    engine: str = defaults.ENGINE
    precision: str = defaults.PRECISION
    threads: int | None = None
    gpu: GpuOptions | None = None

    def but(
        self,
        engine: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        gpu: GpuOptions | None = None,
    ) -> Choice:
        """Return this choice with what is given instead; another engine begins with its defaults.

        Raises
        ------
        InputError
            If there is no such engine, precision or number of threads.
        """
        base = self if engine in (None, self.engine) else Choice(engine or self.engine)
        made = Choice(
            base.engine,
            precision or base.precision,
            base.threads if threads is None else threads,
            gpu or base.gpu,
        )
        check_choice(*made[:3])
        return made

    @classmethod
    def of(cls, model: Model) -> Choice:
        """Return what a model was opened with."""
        return cls(model.engine, model.precision, model.threads, model.gpu)

    def open(self, bundle: Bundle) -> Model:
        """Open a model; see :meth:`Model.open`."""
        engine, precision, threads, gpu = self
        return Model.open(bundle, engine=engine, precision=precision, threads=threads, gpu=gpu)

    def serves(self, model: Model) -> bool:
        """Whether an open model is what this asks for."""
        return (
            not model.closed
            and (model.engine, model.precision) == (self.engine, self.precision)
            and (self.gpu is None or self.gpu == model.gpu)
            and (
                model.device is not None
                or (self.threads or usable_cores()) == (model.threads or usable_cores())
            )
        )

    def require(self, model: Model) -> None:
        """Raise InputError unless a model is what this asks for."""
        if not model.closed and not self.serves(model):
            raise InputError(
                f"the model was opened with {Choice.of(model)}, and beside it {self} was asked "
                "for. Leave engine, precision, threads and gpu out where a model is given."
            )
