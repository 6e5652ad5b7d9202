"""The parity gate: does what was exported compute what the PyTorch model computes?

Three steps. Are the five modules, composed, the complete video model with exemplars as
mask-conditioned frames and the query as the next frame? (Its pointer times are fed and its rounding
of memories to bfloat16 is imitated where it rounds, pitfall 19, so that what remains is
arithmetic.) Is each
exported graph its module, on random and on image-like inputs? Are the five graphs, composed, the
five modules?

A comparison can come out perfect for the wrong reason: where the object score is negative SAM 2
replaces every logit by one constant. The gate therefore refuses to judge such a case (pitfall 18).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from recallseg.engines.bundle import MemorySemantics, Normalisation
from recallseg.engines.composition import Composition, Features, Prediction, Recall
from recallseg.engines.engine import Engine
from recallseg.engines.engine import Tensor as Array
from recallseg.engines.errors import ParityError
from recallseg.engines.golden import GoldenCase, network_images, network_masks
from recallseg.engines.specs import Geometry, GraphSpec
from recallseg.engines.verification import relative_error
from recallseg.export.correcting import PRIOR_CLAMP
from recallseg.export.families import Segmenter, segmenter_family
from recallseg.export.onnx_export import example_inputs

__all__ = [
    "DEFINITION_TOLERANCE",
    "PARITY_TOLERANCE",
    "Measured",
    "TorchEngine",
    "check_corrections",
    "check_definition",
    "check_end_to_end",
    "check_graph",
]

PARITY_TOLERANCE = 1e-4
"""Largest relative error (2-norm) of an fp32 graph against its module. Seen: about 1e-6."""

DEFINITION_TOLERANCE = 5e-5
"""The same for the five modules against the video model, where a last bit may flip a rounding to
bfloat16. Seen: 3e-6; with object pointers left out 3e-2."""

_SIZES = ((1, 1), (2, 3))
"""(n, k) at which graphs with dynamic axes are compared."""

_MOST_CLICKS = 8
"""Points up to which ``correct`` is compared, one number after the other."""


@dataclass(frozen=True)
class Measured:
    """One comparison, as it goes into the manifest."""

    graph: str
    variant: str
    inputs: str
    tensor: str
    n: int
    k: int
    error: float
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields for the manifest."""
        return asdict(self)


class TorchEngine(Engine):
    """A PyTorch module behind the engine interface: the reference side of every comparison."""

    name = "torch"
    variants = ()

    def __init__(self, spec: GraphSpec, module: nn.Module) -> None:
        super().__init__(spec)
        self.module = module

    def _execute(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        with torch.inference_mode():
            found = self.module(*(torch.from_numpy(inputs[t.name]) for t in self.spec.inputs))
        for tensor, value in zip(
            self.spec.outputs, found if isinstance(found, tuple) else (found,), strict=True
        ):
            np.copyto(outputs[tensor.name], value.numpy())


def check_graph(
    engine: Engine,
    module: nn.Module,
    image_like: Mapping[str, np.ndarray[Any, Any]] | None = None,
    *,
    variant: str = "portable",
) -> Iterator[Measured]:
    """Compare one exported graph with its module.

    Parameters
    ----------
    engine : the exported graph, ready to run.
    module : what it was exported from.
    image_like : inputs taken from a real run of the pipeline, by tensor name.
    variant : which form of the graph it is, for the record.

    Raises
    ------
    ParityError
        Naming graph, tensor, error and tolerance.
    """
    spec = engine.spec
    reference = TorchEngine(spec, module)
    dynamic = any(isinstance(size, str) for tensor in spec.inputs for size in tensor.shape)
    generator = torch.Generator().manual_seed(1)
    cases: list[tuple[str, dict[str, Array]]] = []
    if spec.name == "correct":
        drawn_prompts = _prompts(spec, generator)
        cases += [
            (kind, {name: value.numpy() for name, value in drawn.items()})
            for kind, drawn in drawn_prompts
        ]
    sizes = _SIZES if dynamic else _SIZES[:1]
    for n, k in sizes if spec.name != "correct" else ():
        drawn = example_inputs(spec, generator, n=n, k=k)
        cases.append(("random", {name: value.numpy() for name, value in drawn.items()}))
    if image_like is not None:
        cases.append(("image-like", {t.name: image_like[t.name] for t in spec.inputs}))
    for kind, inputs in cases:
        symbols: dict[str, int] = {"n": 1, "k": 1, "p": 1}
        for tensor in spec.inputs:
            seen: dict[str, int] = {}
            tensor.bind(inputs[tensor.name], seen, spec.name)
            symbols.update(seen)
        found = engine.allocate_outputs(**symbols)
        expected = engine.allocate_outputs(**symbols)
        engine.run(inputs, found)
        reference.run(inputs, expected)
        for name in found:
            yield _judge(
                Measured(
                    spec.name,
                    variant,
                    kind,
                    name,
                    symbols["n"],
                    symbols["k"],
                    relative_error(found[name], expected[name]),
                    PARITY_TOLERANCE,
                )
            )


def _prompts(
    spec: GraphSpec, generator: torch.Generator
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield inputs of ``correct``: 0 to 8 points, a box with points, each with and without a prior.

    No point at all is one that is none.
    """
    for count in range(_MOST_CLICKS + 1):
        for box in (False, True) if count >= 2 else (False,):
            for prior in (False, True):
                drawn = example_inputs(spec, generator, p=max(1, count))
                labels = torch.randint(0, 2, (1, max(1, count)), generator=generator)
                if count == 0:
                    labels[:] = -1
                if box:
                    labels[:, :2] = torch.tensor([2, 3])
                drawn["point_labels"] = labels.to(torch.int32)
                drawn["prior"] *= 20  # some beyond what it is held within
                drawn["has_prior"][:] = prior
                what = f"box and {count - 2} points" if box else f"{count} points"
                yield f"random, {what}{', a prior' if prior else ''}", drawn


def check_corrections(
    modules: Composition, sam2: Segmenter, tensors: Mapping[str, Array]
) -> Iterator[Measured]:
    """Compare ``correct`` with the video model's own step for prompts, on a conditioned image.

    Parameters
    ----------
    modules : a composition of :class:`TorchEngine`.
    sam2 : with the prompt encoder and mask decoder of ``correct``.
    tensors : of a run of the golden case: its image is the one that is corrected.

    Raises
    ------
    ParityError
        If a mask or an IoU estimate differs, or the reference finds no object.
    """
    engine = modules.engines["correct"]
    image = {name: tensors[name] for name in ("skip0", "skip1")}
    conditioned = tensors["conditioned"][:1]
    for what, drawn in _prompts(engine.spec, torch.Generator().manual_seed(2)):
        inputs = {**{name: value.numpy() for name, value in drawn.items()}, **image}
        inputs["conditioned"] = conditioned
        found = engine.allocate_outputs(p=inputs["points"].shape[1])
        engine.run(inputs, found)
        logits, iou, score = _run_video_step(sam2, inputs)
        if score <= 0:
            raise ParityError(
                f"the reference finds no object after {what} (object score {score:.2f}), so its "
                "mask is a constant and proves nothing. Raise the bias of "
                "mask_decoder.pred_obj_score_head.proj_out (random weights), or change the case."
            )
        for name, expected in (("logits", logits), ("iou", iou)):
            error = relative_error(found[name], expected)
            yield _judge(
                Measured(
                    "definition of correct", "modules", what, name, 1, 0, error,
                    DEFINITION_TOLERANCE,
                )
            )  # fmt: skip


def _run_video_step(sam2: Segmenter, inputs: Mapping[str, Array]) -> tuple[Array, Array, float]:
    """Run ``_run_single_frame_inference`` on conditioned features: logits, IoU, object score.

    Its memory attention is given these features as what it makes; no point is given as none.
    """
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    features = given["conditioned"]
    flat = [given[n].flatten(2).permute(2, 0, 1) for n in ("skip0", "skip1", "conditioned")]
    points = None
    if int(given["point_labels"][0, 0]) >= 0:
        points = {
            "point_coords": given["points"][:, None],
            "point_labels": given["point_labels"][:, None],
        }
    prior = given["prior"].clamp(-PRIOR_CLAMP, PRIOR_CLAMP) if bool(given["has_prior"]) else None
    seen: list[Tensor] = []
    decoder = sam2.mask_decoder.forward

    def watched(*args: Any, **named: Any) -> Any:
        made = decoder(*args, **named)
        seen.append(made[1])
        return made

    session = SimpleNamespace(num_frames=1)  # nothing else is asked of it
    with (
        torch.inference_mode(),
        patch.object(sam2, "_prepare_vision_features", return_value=(flat, flat)),
        patch.object(sam2, "_prepare_memory_conditioned_features", return_value=features),
        patch.object(sam2.mask_decoder, "forward", watched),
    ):
        out = sam2._run_single_frame_inference(
            inference_session=session,
            frame_idx=0,
            obj_idx=0,
            batch_size=1,
            is_init_cond_frame=False,
            point_inputs=points,
            mask_inputs=None,
            reverse=False,
            prev_sam_mask_logits=prior,
            **segmenter_family(sam2).step_options,
        )
    iou = seen[0].flatten().max().reshape(1).numpy()  # one mask, or the best of three
    score = float(out["object_score_logits"].flatten()[0])
    return out["pred_masks"][:, 0].numpy(), iou, score


def check_definition(
    modules: Composition,
    sam2: Segmenter,
    case: GoldenCase,
    geometry: Geometry,
    normalisation: Normalisation,
    memory: MemorySemantics,
) -> Measured:
    """Compare the five modules, composed, with the complete video model: are they the same model?

    Parameters
    ----------
    modules : a composition of :class:`TorchEngine`. Both sides are PyTorch, so rounding to bfloat16
        falls the same way on both and the tolerance can be tight enough to see a term left out.

    Raises
    ------
    ParityError
        If their mask logits differ, or if the reference finds no object: nothing was compared then.
    """
    k, n = case.masks.shape[:2]
    family = segmenter_family(sam2)
    images = network_images(case, geometry.image_size, normalisation)
    masks = network_masks(case, geometry.image_size)
    expected, score = _run_video_model(sam2, images, masks, memory.object_pointers)
    if not bool((score > 0).all()):
        raise ParityError(
            f"the reference finds no object in the gate's case (object scores {score.tolist()}), "
            "so its mask is a constant and proves nothing. Raise the bias of "
            "mask_decoder.pred_obj_score_head.proj_out (random weights), or change the case."
        )
    recall = Recall.allocate(geometry, n, k, memory)
    offsets = torch.arange(k, 0, -1) / (min(k + 1, sam2.config.max_object_pointers_in_encoder) - 1)
    recall.pointer_time[:] = offsets.numpy()
    features = Features.allocate(geometry)
    tokens = np.zeros((n, geometry.tokens, geometry.memory_dim), np.float32)
    pointers = np.zeros((n, geometry.channels), np.float32)
    for i in range(k):
        modules.encode(images[i], features)
        modules.memorize(features, masks[i], tokens, pointers)
        recall.memories[:, i] = tokens
        if family.rounds_memories:
            recall.memories[:, i] = torch.from_numpy(tokens).bfloat16().float().numpy()
        recall.pointers[:, i] = pointers
    modules.encode(images[k], features)
    prediction = Prediction.allocate(geometry, n)
    modules.attend(features, recall, prediction)
    modules.decode(features, prediction)
    error = relative_error(prediction.logits, expected.numpy())
    return _judge(
        Measured("definition", "modules", "image-like", "logits", n, k, error, DEFINITION_TOLERANCE)
    )


def check_end_to_end(
    found: Mapping[str, Array], expected: Mapping[str, Array], n: int, k: int, *, variant: str
) -> Measured:
    """Compare the mask logits of five exported graphs, composed, with those of five modules."""
    error = relative_error(found["logits"], expected["logits"])
    return _judge(
        Measured("end to end", variant, "image-like", "logits", n, k, error, PARITY_TOLERANCE)
    )


def _run_video_model(
    sam2: Segmenter,
    images: list[Array],
    masks: list[Array],
    object_pointers: bool,
) -> tuple[Tensor, Tensor]:
    """Run the whole model; return the query's logits nx(S/4)x(S/4) and object scores n.

    Without object pointers the model is told that no frame has one: its own code path for that.
    """
    video = torch.from_numpy(np.concatenate(images))
    session = segmenter_family(sam2).session_class(
        video=video,
        video_height=video.shape[-2],
        video_width=video.shape[-1],
        dtype=torch.float32,
    )
    n = masks[0].shape[0]
    indices = [session.obj_id_to_idx(j + 1) for j in range(n)]
    no_pointers = patch.object(sam2, "_get_object_pointers", return_value=([], [], 0))
    with torch.inference_mode(), nullcontext() if object_pointers else no_pointers:
        for frame, mask in enumerate(masks):
            for j in indices:
                session.add_mask_inputs(j, frame, torch.from_numpy(mask[j : j + 1]))
            session.obj_with_new_inputs = [j + 1 for j in range(n)]
            sam2(session, frame_idx=frame)
        output = sam2(session, frame_idx=len(masks))
    return output.pred_masks[:, 0], output.object_score_logits.flatten()


def _judge(measured: Measured) -> Measured:
    if not measured.error <= measured.tolerance:
        raise ParityError(
            f"graph '{measured.graph}' ({measured.variant}, {measured.inputs} inputs, "
            f"n={measured.n}, k={measured.k}): tensor '{measured.tensor}' is off by "
            f"{measured.error:.2e}, allowed is {measured.tolerance:.0e}. The bundle was not "
            "written. Try the versions of torch and onnxscript in constraints.txt, and report it "
            "with this message."
        )
    return measured
