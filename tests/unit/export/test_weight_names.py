"""One checkpoint has one digest, whatever transformers calls its tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, Sam2VideoModel

from recallseg.engines.bundle import Bundle, Description
from recallseg.export.bundling import former_identities
from recallseg.export.checkpoints import (
    architectures,
    load_dinov2,
    load_sam2,
    meta_dinov2,
    meta_sam2,
    state_digest,
)
from recallseg.export.checkpoints.names import (
    TWINS,
    former_digests,
    newer_names,
    older_names,
    weights_digest,
)
from recallseg.export.checkpoints.random_weights import random_state
from recallseg.export.checkpoints.strict import tensor_shapes

MODULES_OF_5_17 = {
    "attention.attention.key",
    "attention.attention.query",
    "attention.attention.value",
    "attention.output.dense",
    "layer_scale1",
    "layer_scale2",
    "norm1",
    "norm2",
}
"""Modules of a block in ``Dinov2Model`` of transformers 5.17.0, beside those of its ``mlp``."""


def _state(swiglu: bool) -> dict[str, Any]:
    config = Dinov2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=56,
        patch_size=14,
        use_swiglu_ffn=swiglu,
    )
    return newer_names(random_state(tensor_shapes(Dinov2Model, config), seed=1))


@pytest.mark.parametrize("swiglu", [False, True])
def test_both_namings_of_the_same_tensors_have_one_digest(swiglu: bool) -> None:
    newer = _state(swiglu)
    older = older_names(newer)
    block = "encoder.layer.1."
    modules = {n.removeprefix(block).rsplit(".", 1)[0] for n in older if n.startswith(block)}
    mlp = {"mlp.weights_in", "mlp.weights_out"} if swiglu else {"mlp.fc1", "mlp.fc2"}
    assert modules == MODULES_OF_5_17 | mlp
    assert newer_names(older).keys() == newer.keys()
    digest = weights_digest(newer, meta_dinov2.resolve)
    assert digest == weights_digest(older, meta_dinov2.resolve)
    both = (state_digest(newer), state_digest(older))
    assert former_digests(newer) == former_digests(older) == both
    newer["encoder.layer.1.attention.v_proj.bias"][3] += 1
    assert weights_digest(newer, meta_dinov2.resolve) != digest


def test_random_weights_do_not_depend_on_the_naming_either() -> None:
    newer = _state(swiglu=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in older_names(newer).items()}
    drawn = random_state(shapes, seed=1)
    assert drawn.keys() == shapes.keys()
    assert state_digest(newer_names(drawn)) == state_digest(newer)


def test_a_matrix_that_was_trained_twice_counts_twice() -> None:
    config = architectures.sam2_config("tiny", newer=True, image_size=256)
    shapes = tensor_shapes(Sam2VideoModel, config)
    state = {name: torch.zeros(shapes[name]) for name in TWINS}
    same = weights_digest(state, meta_sam2.resolve)
    assert same == weights_digest({TWINS[0]: state[TWINS[0]]}, meta_sam2.resolve)
    apart = {**state, TWINS[1]: state[TWINS[1]] + 1}
    swapped = {**state, TWINS[0]: state[TWINS[0]] + 1}
    digests = {weights_digest(s, meta_sam2.resolve) for s in (state, apart, swapped)}
    assert len(digests) == 3
    assert weights_digest(dict(reversed(apart.items())), meta_sam2.resolve) in digests


def test_the_shipped_bundle_is_called_what_its_weights_give() -> None:
    bundle = Bundle.open("demo")
    size = bundle.geometry.image_size
    segmenter, embedder = load_sam2("demo", image_size=size), load_dinov2("demo")
    model: Any = segmenter.model
    described = Description(
        (segmenter.digest, embedder.digest),
        bundle.geometry,
        bundle.normalisation,
        bundle.memory,
        tuple(model.no_memory_embedding.detach().flatten().tolist()),
    )
    assert bundle.identity == described.identity
    former = former_identities(segmenter, embedder, described)
    assert bundle.former_identities == tuple(entry["identity"] for entry in former)
    # As the first edition shipped it, and as it was exported under transformers 5.17.
    assert [identity[:12] for identity in bundle.former_identities] == [
        "e4ae56aaf273",
        "f37cf16726f2",
    ]


ASK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import transformers
from recallseg.export.checkpoints import load_dinov2, load_sam2
loaded = (load_sam2("demo", image_size=384), load_dinov2("demo"), load_dinov2("random:small-reg"))
print(json.dumps([transformers.__version__, *([x.digest, *x.former_digests] for x in loaded)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "beside"),
    [
        ("5.0.0", ("huggingface_hub==1.5.0", "tokenizers==0.22.2", "httpx")),
        ("5.17.0", ("huggingface_hub==1.5.0", "httpx")),
        ("5.24.0", ()),
    ],
)
def test_another_transformers_gives_the_same_digests(
    tmp_path: Path, version: str, beside: tuple[str, ...]
) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path)]
    for packages in ([f"transformers=={version}", *beside[:-1]], beside[-1:]):
        # Without dependencies: torch is taken from here. httpx has small ones of its own.
        options = ["--no-deps"] if packages and "httpx" not in packages else []
        if packages and subprocess.run([*pip, *options, *packages], check=False).returncode:
            pytest.skip(f"transformers {version} cannot be installed here")

    def ask(folder: str) -> list[Any]:
        found = subprocess.run(
            [sys.executable, "-c", ASK, folder],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        answer: list[Any] = json.loads(found.stdout.splitlines()[-1])
        return answer

    asked, *theirs = ask(str(tmp_path))
    _, *ours = ask(".")
    assert asked == version
    assert theirs == ours
