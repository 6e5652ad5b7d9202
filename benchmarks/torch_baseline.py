"""The same method in PyTorch, on the same weights, to be measured in turns with the runtime.

Four baselines:

- ``torch-cached``: eager PyTorch with the library's memories in RAM; the runtime's five steps.
- ``torch-paper``: as the paper does it, every recalled exemplar is encoded and memorized anew for
  every query (arXiv 2408.08813). Their inputs are kept normalised in RAM, and exemplars
  that several structures recall are encoded once: both in the baseline's favour.
- ``torch-compile``: the first, with every graph through ``torch.compile`` for the very shapes.
- ``torch-graphs-fp16``: the best that PyTorch offers a user on a GPU: weights in half precision,
  every graph through ``torch.compile(mode="reduce-overhead")``, which records CUDA graphs.

``torch-cached`` and ``torch-compile`` also come with ``-fp16``: under ``torch.autocast``, as
PyTorch runs models in half precision. All use the runtime's own pixel code (prepare and finish) and
thread count. This is the one place of this room that needs torch; it is imported when a baseline is
asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.engines.onnxruntime_cpu import usable_cores
from recallseg.engines.pixels import open_pixels
from recallseg.export.checkpoints import Loaded, load_dinov2, load_segmenter
from recallseg.export.checkpoints.architectures import DINOV2_ALIASES, SEGMENTER_NAMES
from recallseg.export.graphs import build_graphs
from recallseg.runtime.checks import check_image
from recallseg.runtime.library import Library
from recallseg.runtime.model.postprocess import finish_masks
from recallseg.runtime.model.preprocess import prepare_image, prepare_mask

__all__ = ["TorchBaseline", "load_modules"]

MOST_SHAPES = 64
"""Shapes (k, n, size) for which one graph may be compiled in a run; beyond, torch would go eager
without a word."""

Call = Callable[..., Any]


def load_modules(
    bundle: Bundle, sam2: str | None = None, dinov2: str | None = None
) -> dict[str, nn.Module]:
    """Load the bundle's own weights and return the five graphs as modules.

    Parameters
    ----------
    bundle : its manifest says which weights.
    sam2, dinov2 : sources as for ``recallseg export``; needed for pretrained weights only, since
        random and demo weights can be made again from the manifest.

    Raises
    ------
    InputError
        If a source is needed and not given, or holds other weights than the bundle.
    CheckpointError
        If a source cannot be loaded.
    """
    first = load_segmenter(sam2 or _source(bundle, "sam2"), image_size=bundle.geometry.image_size)
    second = load_dinov2(dinov2 or _source(bundle, "dinov2"))
    for network, loaded in (("sam2", first), ("dinov2", second)):
        _check_weights(bundle, network, loaded)
    models: tuple[Any, Any] = (first.model, second.model)
    return build_graphs(*models, object_pointers=bundle.memory.object_pointers)


def _source(bundle: Bundle, network: str) -> str:
    weights = bundle.segmenter if network == "sam2" else bundle.embedder
    if weights.source == "demo":
        return "demo"
    if weights.source != "random":
        raise InputError(
            f"bundle {bundle.name} holds pretrained weights ({weights.architecture}); a PyTorch "
            f"baseline needs the checkpoint that it was exported from: --{network} SRC."
        )
    name = weights.architecture.removeprefix("sam2.1-hiera-").removeprefix("dinov2-")
    known = SEGMENTER_NAMES if network == "sam2" else DINOV2_ALIASES
    return f"random:{name if name.removesuffix('-registers') in known else 'demo'}"


def _check_weights(bundle: Bundle, network: str, loaded: Loaded) -> None:
    wanted = bundle.segmenter if network == "sam2" else bundle.embedder
    if wanted.digest not in (loaded.digest, *loaded.former_digests):
        raise InputError(
            f"the baseline's {network} weights have digest {loaded.digest[:12]} "
            f"({loaded.description}), those of bundle {bundle.name} have {wanted.digest[:12]} "
            f"({wanted.architecture}, {wanted.source}). A comparison needs equal weights: pass the "
            f"checkpoint that the bundle was exported from with --{network} SRC."
        )


class TorchBaseline:
    """One baseline at one k; see :class:`recallseg.benchmarks.subjects.Subject`.

    Parameters
    ----------
    name : one of those above.
    modules : from :func:`load_modules`.
    library : whose exemplars to recall; every one shows every structure. It must have kept its
        images for ``torch-paper``.
    k, structures : as for the segmenter.
    threads : CPU threads; None means one per usable core.
    device : PyTorch's name of where the graphs run; memories are kept there.
    """

    role = "baseline"

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        library: Library,
        *,
        k: int,
        structures: Sequence[str],
        threads: int | None,
        device: str = "cpu",
    ) -> None:
        self._device = torch.device(device)
        self.precision = "fp16" if name.endswith("-fp16") else "fp32"
        torch.set_num_threads(threads or usable_cores())
        self.name = name
        self.warm_ups = 1 if name == "torch-paper" else 2  # a query takes it up to minutes
        self.remarks: list[str] = []
        self._recorded = name.startswith("torch-graphs")
        if self._recorded:
            if self._device.type != "cuda":
                raise InputError(f"{name} records CUDA graphs: it needs --torch-device cuda.")
            modules = {graph: copy.deepcopy(module).half() for graph, module in modules.items()}
        modules = {graph: module.to(self._device) for graph, module in modules.items()}
        self._graphs: dict[str, Call] = dict(modules)
        if self._recorded or name.startswith("torch-compile"):
            mode = "reduce-overhead" if self._recorded else None
            self._graphs.update(_compiled(modules, self.remarks, mode))
        self._bundle, self._intensity = library.bundle, library.intensity
        self._k, self._structures = k, tuple(structures)
        g = self._bundle.geometry
        self._pixels = open_pixels()  # images are prepared, masks finished, as the runtime does it
        self._embed_image = np.zeros((1, 3, g.embed_size, g.embed_size), np.float32)
        self._encode_image = np.zeros((1, 3, g.image_size, g.image_size), np.float32)
        time = self._bundle.memory.pointer_time
        self._pointer_time = torch.full((len(self._structures), k), time, device=self._device)
        self._keys: dict[str, tuple[str, ...]] = {}
        self._embeddings: dict[str, Tensor] = {}
        for structure in self._structures:
            keys, vectors = library.embeddings(structure)
            self._keys[structure], self._embeddings[structure] = (
                keys,
                self._placed(vectors.copy()),
            )
        self._cached: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._exemplars: dict[str, tuple[Tensor, Tensor]] = {}
        if name == "torch-paper":
            self._keep_exemplars(library)
        else:
            self._keep_memories(library)
        self._logits = torch.zeros(0)
        self._stages: dict[str, float] = {}

    @property
    def logits(self) -> NDArray[np.float32]:
        """See :class:`recallseg.benchmarks.subjects.Subject`."""
        found: NDArray[np.float32] = self._logits.float().cpu().numpy()
        return found

    def _placed(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def run(self, image: NDArray[Any]) -> Mapping[str, float]:
        """Segment one image; see :class:`recallseg.benchmarks.subjects.Subject`."""
        self._stages = {}
        half = self.precision == "fp16"
        if self._recorded:  # what the last query's graphs gave out may be written over
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, torch.float16, enabled=half),
        ):
            with self._timed("prepare"):
                inputs = {"embed": self._embed_image, "encode": self._encode_image}
                targets = [(inputs[name], self._bundle.normalisation[name]) for name in inputs]
                prepare_image(check_image(image), self._intensity, self._pixels, *targets)
            with self._timed("embed"):
                embedding = self._graphs["embed"](self._placed(self._embed_image))[0]
            with self._timed("search"):
                recalled = {name: self._nearest(name, embedding) for name in self._structures}
            with self._timed("encode"):
                features, skip0, skip1 = self._graphs["encode"](self._placed(self._encode_image))
            memories, pointers = self._recall(recalled)
            with self._timed("attend"):
                extra = (
                    (pointers, self._pointer_time) if self._bundle.memory.object_pointers else ()
                )
                conditioned = self._graphs["attend"](features, memories, *extra)
            with self._timed("decode"):
                self._logits, _, score = self._graphs["decode"](conditioned, skip0, skip1)
            with self._timed("finish"):
                present = (score > 0).tolist()
                finish_masks(self.logits, present, image.shape[:2], self._pixels)
        return self._stages

    def take_stock(self, *, before: bool) -> None:
        """See :class:`recallseg.benchmarks.subjects.Subject`; PyTorch's memory is not judged."""

    def _nearest(self, structure: str, embedding: Tensor) -> list[str]:
        best = torch.topk(self._embeddings[structure] @ embedding.float(), self._k).indices.tolist()
        return [self._keys[structure][i] for i in best]

    def _recall(self, recalled: Mapping[str, Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Return memories nxkxTx64 and pointers nxkxC."""
        found = self._cached
        if self._exemplars:
            with self._timed("memorize"):
                found = self._memorize({key for keys in recalled.values() for key in keys})
        with self._timed("gather"):
            rows = [[found[key, name] for key in recalled[name]] for name in self._structures]
            memories = torch.stack([torch.stack([memory for memory, _ in row]) for row in rows])
            pointers = torch.stack([torch.stack([pointer for _, pointer in row]) for row in rows])
        return memories, pointers

    def _memorize(self, keys: set[str]) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        found = {}
        for key in sorted(keys):
            image, masks = self._exemplars[key]
            memories, pointers = self._graphs["memorize"](*self._graphs["encode"](image), masks)
            for i, name in enumerate(self._structures):
                found[key, name] = memories[i], pointers[i]
        return found

    def _keep_memories(self, library: Library) -> None:
        g = self._bundle.geometry
        memories = np.zeros((1, g.tokens, g.memory_dim), np.float32)
        pointers = np.zeros((1, g.channels), np.float32)
        for name in self._structures:
            for key in self._keys[name]:
                library.gather(library.memories([key], name), memories, pointers)
                self._cached[key, name] = (
                    self._placed(memories[0].copy()),
                    self._placed(pointers[0].copy()),
                )

    def _keep_exemplars(self, library: Library) -> None:
        side = self._bundle.geometry.image_size
        for key in {key for keys in self._keys.values() for key in keys}:
            image, masks = library.source(key)
            planes = np.zeros((1, 3, side, side), np.float32)
            target = (planes, self._bundle.normalisation["encode"])
            prepare_image(image, self._intensity, self._pixels, target)
            given = np.zeros((len(self._structures), 1, side, side), np.float32)
            for plane, name in zip(given[:, 0], self._structures, strict=True):
                prepare_mask(masks[name], plane)
            self._exemplars[key] = self._placed(planes), self._placed(given)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._stages[stage] = (perf_counter() - start) * 1e3


def _compiled(
    modules: Mapping[str, nn.Module], remarks: list[str], mode: str | None
) -> dict[str, Call]:
    """Return the query's four graphs compiled; ``remarks`` is told what cannot be, and why."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = MOST_SHAPES  # type: ignore[assignment,unused-ignore]
    dynamo.fail_on_recompile_limit_hit = True  # type: ignore[assignment,unused-ignore]
    return {
        graph: _Compiled(graph, modules[graph], remarks, mode)
        for graph in ("embed", "encode", "attend", "decode")
    }


class _Compiled:
    """A compiled graph that runs eagerly, and says so, where it cannot be compiled."""

    def __init__(self, graph: str, module: nn.Module, remarks: list[str], mode: str | None) -> None:
        self._graph, self._remarks, self._mode = graph, remarks, mode
        self._eager: Call = module
        self._call: Call | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self._call is not None:
            return self._call(*inputs)
        compiled: Call = torch.compile(self._eager, dynamic=False, mode=self._mode)
        start = perf_counter()
        try:
            found = compiled(*inputs)
        except Exception as error:  # compilers fail in many ways; the report says in which
            reason = (str(error).strip() or "no message").splitlines()[0]
            self._remarks.append(
                f"{self._graph} runs eagerly, torch.compile failed: "
                f"{type(error).__name__}: {reason}"
            )
            self._call = self._eager
            return self._call(*inputs)
        self._remarks.append(f"{self._graph} compiled in {perf_counter() - start:.0f} s")
        self._call = compiled
        return found
