from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.fake_driver import FakeDriver

from recallseg.engines.bundle import Bundle
from recallseg.engines.device import Device, open_device
from recallseg.engines.errors import EngineUnavailableError, InputError
from recallseg.runtime.model import host
from recallseg.runtime.model.model import Model

PICTURE = np.arange(60, dtype=np.uint16).reshape(6, 10)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Device:
    stand_in = Device(FakeDriver())
    monkeypatch.setattr(host, "open_device", lambda: stand_in)
    return stand_in


@pytest.fixture
def model(fake_bundle: Bundle) -> Model:
    """On the CPU, whatever the frames are."""
    return Model.open(fake_bundle, engine="fake")


def on_device(cuda: Device, array: np.ndarray, **more: Any) -> Any:
    tensor = cuda.tensor(array.shape, array.dtype)
    cuda.stream.copy_in(tensor, array)
    return SimpleNamespace(
        __cuda_array_interface__={**tensor.__cuda_array_interface__, **more}, kept=tensor
    )


@pytest.mark.parametrize("strides", [None, PICTURE.strides])
def test_a_frame_comes_from_the_gpu(cuda: Device, model: Model, strides: object) -> None:
    image = on_device(cuda, PICTURE, strides=strides)
    found = model.copy_frame(image)
    assert found.dtype == np.uint16
    assert np.array_equal(found, PICTURE)


def test_a_frame_that_is_not_contiguous_is_refused(cuda: Device, model: Model) -> None:
    with pytest.raises(InputError, match="contiguous"):
        model.copy_frame(on_device(cuda, PICTURE, strides=(40, 2)))


def test_a_frame_on_a_gpu_that_is_not_there(model: Model) -> None:
    try:
        open_device()
    except EngineUnavailableError:
        image = SimpleNamespace(
            __cuda_array_interface__={"shape": (2, 2), "typestr": "|u1", "data": (64, True)}
        )
        with pytest.raises(EngineUnavailableError, match=r"driver|needs a GPU"):
            model.copy_frame(image)
    else:
        pytest.skip("there is a GPU")


def test_a_copy_is_a_copy(model: Model) -> None:
    found = model.copy_frame(PICTURE)
    assert found is not PICTURE
    assert not np.shares_memory(found, PICTURE)


@pytest.mark.gpu
def test_a_frame_of_pytorch_on_the_gpu(model: Model) -> None:
    import torch

    image = torch.from_numpy(PICTURE.astype(np.int32)).cuda() + 1
    assert np.array_equal(model.copy_frame(image), PICTURE + 1)
