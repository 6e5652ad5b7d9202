"""Are the five modules the video model? And would the gate see it if they were not?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from recallseg.engines.bundle import MemorySemantics
from recallseg.engines.composition import Composition
from recallseg.engines.errors import ParityError
from recallseg.engines.golden import GoldenCase, make_case
from recallseg.engines.specs import GRAPHS, graph_specs
from recallseg.export.checkpoints import Loaded, load_sam2
from recallseg.export.families.base import IMAGENET
from recallseg.export.graphs import Attend, Memorize, build_graphs, read_geometry
from recallseg.export.parity import DEFINITION_TOLERANCE, Measured, TorchEngine, check_definition

Models = tuple[Loaded, Loaded]


def compare(
    models: Models,
    *,
    spoil: Callable[[dict[str, nn.Module]], None] = lambda modules: None,
    object_pointers: bool = True,
    case: GoldenCase | None = None,
) -> Measured:
    sam2, dinov2 = models[0].model, models[1].model
    geometry = read_geometry(sam2, dinov2, embed_size=dinov2.config.image_size)
    specs = graph_specs(geometry, object_pointers=object_pointers)
    modules = build_graphs(sam2, dinov2, object_pointers=object_pointers)
    spoil(modules)
    composition = Composition({name: TorchEngine(specs[name], modules[name]) for name in GRAPHS})
    return check_definition(
        composition,
        sam2,
        case or make_case(3),
        geometry,
        IMAGENET,
        MemorySemantics(object_pointers, 0.0),
    )


@pytest.mark.parametrize("object_pointers", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_the_modules_are_the_video_model(models: Models, k: int, object_pointers: bool) -> None:
    measured = compare(models, object_pointers=object_pointers, case=make_case(3, k=k))
    assert 0 < measured.error < DEFINITION_TOLERANCE


def test_sam_2_0_has_neither_pointer_times_nor_occlusion_embeddings(models: Models) -> None:
    sam2 = load_sam2("random:demo", image_size=256).model
    config = sam2.config
    config.enable_temporal_pos_encoding_for_object_pointers = False
    config.enable_occlusion_spatial_embedding = False
    old = type(sam2)(config).eval()
    old.load_state_dict(sam2.state_dict(), strict=False)
    loaded = Loaded(old, "sam2-demo", "random", "", (), "", "")
    assert compare((loaded, models[1])).error < DEFINITION_TOLERANCE


def forget_pointers(modules: dict[str, nn.Module]) -> None:
    attend = modules["attend"]
    assert isinstance(attend, Attend)
    attend.object_pointers = False


def forget_time(modules: dict[str, nn.Module]) -> None:
    attend = modules["attend"]
    assert isinstance(attend, Attend)
    attend.temporal = nn.Parameter(torch.zeros_like(attend.temporal))


def scale_masks_twice(modules: dict[str, nn.Module]) -> None:
    memorize = modules["memorize"]
    assert isinstance(memorize, Memorize)
    memorize.bias = memorize.scale * memorize.bias + memorize.bias
    memorize.scale *= memorize.scale


@pytest.mark.parametrize("spoil", [forget_pointers, forget_time, scale_masks_twice])
def test_a_term_left_out_is_seen(
    models: Models, spoil: Callable[[dict[str, nn.Module]], None]
) -> None:
    with pytest.raises(ParityError, match="'logits' is off"):
        compare(models, spoil=spoil)


def test_a_reference_without_an_object_is_no_reference(models: Models) -> None:
    head = models[0].model.mask_decoder.pred_obj_score_head.proj_out
    before = head.bias.detach().clone()
    try:
        with torch.no_grad():
            head.bias.fill_(-100.0)
        with pytest.raises(ParityError, match="proves nothing"):
            compare(models)
    finally:
        with torch.no_grad():
            head.bias.copy_(before)
