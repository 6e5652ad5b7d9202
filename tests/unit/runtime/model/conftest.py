"""What tests of a model on a GPU ask."""

from __future__ import annotations

import pytest
from support.device_segmenters import library_of_discs

from recallseg import Bundle, Library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Library:
    return library_of_discs(tmp_path_factory.mktemp("l"), tiny_bundle)
