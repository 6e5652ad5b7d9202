"""Two loaded models in, one proven bundle out.

The folder is made beside its destination and moved there when everything in it has passed the
parity gate: a bundle that exists is a bundle that was checked.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from recallseg.engines.bundle import (
    FORMAT,
    FORMAT_VERSION,
    Bundle,
    Description,
    MemorySemantics,
    Weights,
)
from recallseg.engines.composition import Composition
from recallseg.engines.engine import Tensor
from recallseg.engines.errors import ExportError
from recallseg.engines.golden import (
    GoldenCase,
    GoldenTensors,
    golden_prompts,
    make_case,
    network_images,
    network_masks,
    run_case,
)
from recallseg.engines.precisions import PRECISIONS
from recallseg.engines.registry import load_engines
from recallseg.engines.specs import GRAPHS, MOST_POINTS, OPTIONAL_GRAPHS, graph_specs
from recallseg.engines.verification import compare_with_golden, relative_error
from recallseg.export import ort_cpu, ort_cuda, tensorrt
from recallseg.export.checkpoints import Loaded
from recallseg.export.correcting import PRIOR_CLAMP, Correct, Corrector, with_corrector
from recallseg.export.families import Segmenter, is_segmenter
from recallseg.export.families.embedders import embedder_family
from recallseg.export.graphs import build_graphs, read_geometry
from recallseg.export.onnx_export import OPSET, export_graph
from recallseg.export.parity import (
    Measured,
    TorchEngine,
    check_corrections,
    check_definition,
    check_end_to_end,
    check_graph,
)
from recallseg.export.sharing import share_weights
from recallseg.export.writing import (
    check_output,
    entry,
    graph_file,
    write_bundle,
    write_manifest,
)

__all__ = ["export_bundle", "former_identities"]

VARIANTS = ("portable", "ort-cpu", "ort-cuda", "tensorrt")
"""Graph variants that can be exported."""

DEFAULT_VARIANTS = ("portable", "ort-cpu")
"""Those that are exported unless others are asked for: what a machine without a GPU uses."""

_GOLDEN_SEED = 7

Report = Callable[[str], None]


def export_bundle(
    sam2: Loaded,
    dinov2: Loaded,
    output: Path,
    *,
    corrector: Corrector | None = None,
    name: str | None = None,
    embed_size: int | None = None,
    object_pointers: bool = True,
    variants: Sequence[str] = DEFAULT_VARIANTS,
    pooled: bool = False,
    overwrite: bool = False,
    report: Report = lambda step: None,
) -> Bundle:
    """Export the graphs, prove them, and write the bundle.

    Parameters
    ----------
    sam2, dinov2 : models in eval mode, fp32, on the CPU, with where they came from.
    output : the bundle's folder; it must not exist unless ``overwrite``.
    corrector : weights that the graph ``correct`` has in the place of the segmenter's own.
    name : what the bundle calls itself; the folder's name by default.
    embed_size : E in pixels, a multiple of DINOv2's patch; 224, or less for a smaller model.
    object_pointers : whether memory attention takes SAM 2's object pointers too.
    variants : graph variants to write; ``portable`` must be among them.
    pooled : also write precision ``pooled`` of variant ``ort-cpu``, an approximation.
    report : is told the name of every step as it begins.

    Raises
    ------
    ExportError, ParityError
        Nothing is left at ``output``, or what was there stays.
    """
    unknown = set(variants) - set(VARIANTS)
    if unknown or "portable" not in variants:
        raise ExportError(
            f"variants must be 'portable' and any of {', '.join(VARIANTS)}; got "
            f"{', '.join(variants)}."
        )
    if pooled and "ort-cpu" not in variants:
        raise ExportError("precision 'pooled' is one of variant 'ort-cpu': export that too.")
    check_output(output, overwrite=overwrite)
    segmenter: Segmenter = sam2.model
    embedder: Any = dinov2.model
    if not is_segmenter(segmenter) or is_segmenter(embedder):
        raise ExportError(
            f"a bundle takes a segmenter (SAM 2, EdgeTAM) and an embedder, in this order; got "
            f"{sam2.architecture} and {dinov2.architecture}."
        )
    family = embedder_family(embedder)
    size = family.size(embedder, embed_size)
    family.fix(embedder, size)
    normalisation = {"embed": dinov2.normalisation, "encode": sam2.normalisation}
    geometry = read_geometry(segmenter, embedder, embed_size=size)
    memory = MemorySemantics(object_pointers, _pointer_time(segmenter))
    modules = build_graphs(segmenter, embedder, object_pointers=object_pointers)
    every = (*GRAPHS, *OPTIONAL_GRAPHS)
    specs = graph_specs(geometry, object_pointers=object_pointers, optional=OPTIONAL_GRAPHS)
    correcting = with_corrector(segmenter, None if corrector is None else corrector.tensors)
    modules["correct"] = Correct(correcting).eval()

    with write_bundle(output, overwrite=overwrite) as work:
        graphs: dict[str, Any] = {}

        def write(
            variant: str, graph: str, module: nn.Module, opset: int, precision: str = "fp32"
        ) -> None:
            report(f"export {variant} {graph} in {precision}")
            path = graph_file(work, variant, precision, graph)
            export_graph(module, specs[graph], geometry, path, opset=opset)
            graphs[f"{variant}/{precision}/{graph}"] = entry(work, path)

        for graph in every:
            write("portable", graph, modules[graph], OPSET)
        if "ort-cpu" in variants:
            with ort_cpu.fused_attention(segmenter, embedder):
                for graph, module in ort_cpu.build_ort_cpu_graphs(
                    segmenter, embedder, object_pointers=object_pointers
                ).items():
                    write("ort-cpu", graph, module, ort_cpu.OPSET)
                if pooled:
                    fewer = ort_cpu.build_ort_cpu_graphs(
                        segmenter, embedder, object_pointers=object_pointers, pool=ort_cpu.POOL
                    )
                    write("ort-cpu", "attend", fewer["attend"], ort_cpu.OPSET, "pooled")
        if pooled:  # all but attend are the exact graphs
            for graph in every:
                exact = graphs.get(f"ort-cpu/fp32/{graph}", graphs[f"portable/fp32/{graph}"])
                graphs.setdefault(f"ort-cpu/pooled/{graph}", exact)
        if "ort-cuda" in variants:
            for graph, module in ort_cuda.build_ort_cuda_graphs(
                segmenter, embedder, object_pointers=object_pointers
            ).items():
                write("ort-cuda", graph, module, ort_cuda.OPSET)
                file = work / graphs[f"ort-cuda/fp32/{graph}"]["file"]
                ort_cuda.forget_unread_outputs(file)
                graphs[f"ort-cuda/fp32/{graph}"] = entry(work, file)
        if "tensorrt" in variants:
            better = tensorrt.build_tensorrt_graphs(
                segmenter, embedder, object_pointers=object_pointers
            )
            with tensorrt.fusable_attention(segmenter, embedder, correcting):
                for graph in every:
                    module = better.get(graph, modules[graph])
                    write("tensorrt", graph, module, tensorrt.OPSET)
                    tensorrt.check_operators(work / graphs[f"tensorrt/fp32/{graph}"]["file"])
        share_weights(work, graphs)
        report("golden tensors")
        case = make_case(_GOLDEN_SEED)
        reference = Composition({name: TorchEngine(specs[name], modules[name]) for name in every})
        tensors = run_case(case, reference, geometry, normalisation, memory)
        golden_file = work / "golden" / "golden.npz"
        golden_file.parent.mkdir()
        GoldenTensors.from_run(case, tensors, _GOLDEN_SEED).save(golden_file)
        digests = (sam2.digest, dinov2.digest)
        no_memory = tuple(segmenter.no_memory_embedding.detach().flatten().tolist())
        described = Description(digests, geometry, normalisation, memory, no_memory)
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "name": name or output.name,
            "identity": described.identity,
            "former_identities": former_identities(sam2, dinov2, described),
            "weights": {
                "segmenter": _weights(sam2),
                "embedder": _weights(dinov2),
                **({} if corrector is None else {"corrector": asdict(corrector.weights)}),
            },
            "correct": {
                "prompt_encoder_and_mask_decoder": "segmenter"
                if corrector is None
                else "corrector",
                "most_points": MOST_POINTS,
                "padding_points": 1,
                "prior_clamp": PRIOR_CLAMP,
            },
            "geometry": geometry.to_json(),
            "normalisation": {key: asdict(value) for key, value in normalisation.items()},
            "memory": asdict(memory),
            "no_memory": list(no_memory),
            "graphs": graphs,
            "golden": entry(work, golden_file),
            "parity": [],
            "made_with": _versions(),
        }
        write_manifest(work, manifest)
        report("compare the modules with the video model")
        manifest["parity"] = [
            check_definition(
                reference, segmenter, case, geometry, normalisation["encode"], memory
            ).to_json(),
            *(value.to_json() for value in check_corrections(reference, correcting, tensors)),
            *(
                value.to_json()
                for value in _gate(Bundle.open(work), modules, case, tensors, report)
            ),
        ]
        write_manifest(work, manifest)
        report("done")
    return Bundle.open(output)


def _gate(
    bundle: Bundle,
    modules: dict[str, nn.Module],
    case: GoldenCase,
    tensors: dict[str, Tensor],
    report: Report,
) -> list[Measured]:
    """Compare the files on disk with PyTorch, per graph and end to end, in every variant."""
    n, k = case.masks.shape[1::-1]
    geometry, normalisation = bundle.geometry, bundle.normalisation
    like = {
        **tensors,
        "image": network_images(case, geometry.image_size, normalisation["encode"])[-1],
        "masks": network_masks(case, geometry.image_size)[0],
        "pointer_time": np.full((n, k), bundle.memory.pointer_time, np.float32),
    }
    said = {"conditioned": tensors["conditioned"][:1], **vars(golden_prompts(tensors["logits"][0]))}
    small = network_images(case, geometry.embed_size, normalisation["embed"])[-1]
    golden = GoldenTensors.load(bundle.golden_file)
    measured: list[Measured] = []
    for variant in bundle.precisions:
        # A variant may leave graphs out; the portable ones then stand in, as they will at run time.
        every = (*GRAPHS, *bundle.optional_graphs)
        engines = load_engines(
            bundle, "onnxruntime-cpu", "fp32", graphs=every, variants=(variant, "portable")
        )
        for graph in every:
            if f"{variant}/fp32/{graph}" in bundle.manifest["graphs"]:
                report(f"compare {variant} {graph}")
                inputs = {**like, "image": small} if graph == "embed" else like
                inputs = {**like, **said} if graph == "correct" else inputs
                measured += check_graph(engines[graph], modules[graph], inputs, variant=variant)
        report(f"compare {variant} end to end")
        found = run_case(case, Composition(engines), geometry, normalisation, bundle.memory)
        measured.append(check_end_to_end(found, tensors, n, k, variant=variant))
        compare_with_golden(bundle, golden, found, engines["embed"].name, "fp32")
    if "pooled" in bundle.precisions.get("ort-cpu", ()):
        report("compare pooled end to end")
        engines = load_engines(bundle, "onnxruntime-cpu", "pooled", graphs=every)
        found = run_case(case, Composition(engines), geometry, normalisation, bundle.memory)
        compare_with_golden(bundle, golden, found, engines["embed"].name, "pooled")
        error = relative_error(found["logits"], tensors["logits"])
        measured.append(
            Measured(
                "end to end", "ort-cpu/pooled", "image-like", "logits", n, k, error,
                PRECISIONS["pooled"].tolerance,
            )
        )  # fmt: skip
    return measured


def _pointer_time(model: Segmenter) -> float:
    """Every exemplar counts as the frame just before the query, the closest that SAM 2 knows."""
    return 1.0 / (int(model.config.max_object_pointers_in_encoder) - 1)


def _weights(loaded: Loaded) -> dict[str, str]:
    return asdict(Weights(loaded.architecture, loaded.source, loaded.digest, loaded.licence))


def former_identities(
    segmenter: Loaded, embedder: Loaded, described: Description
) -> list[dict[str, str]]:
    """Return the manifest's list of what format 1 called the same weights.

    One entry for each pair of names that transformers gave them; with the digests, so that an entry
    can be checked.
    """
    return [
        {"identity": described.former(first, second), "segmenter": first, "embedder": second}
        for first in segmenter.former_digests
        for second in embedder.former_digests
    ]


def _versions() -> dict[str, str]:
    packages = ("recallseg", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            found[package] = "not installed as a package"
    return found
