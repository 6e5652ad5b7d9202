"""All datasets of the benchmark by name, each loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from recallseg.benchmarks.accuracy import brains, microscopy, radiology
from recallseg.benchmarks.accuracy.dataset import Dataset
from recallseg.engines.errors import InputError

__all__ = ["DATASETS", "load_datasets"]

DATASETS: Mapping[str, Callable[[Path | None], Dataset]] = MappingProxyType(
    {
        "mni-axial": brains.mni_axial,
        "mni-frame": brains.mni_frame,
        "mni-coronal": brains.mni_coronal,
        "mni-sagittal": brains.mni_sagittal,
        "deep-grey": brains.deep_grey,
        "nuclei": microscopy.nuclei,
        "bacteria": microscopy.bacteria,
        "glands": microscopy.glands,
        "lungs": radiology.lungs,
        "lung-tumour": radiology.lung_tumour,
        "brain-tumour": radiology.brain_tumour,
    }
)


def load_datasets(
    names: Sequence[str] | None, data: Path | None
) -> tuple[list[Dataset], dict[str, str]]:
    """Load datasets, and say which could not be.

    Parameters
    ----------
    names : None for all that can be had; then one that is missing is left out, with the reason.
    data : folder with downloaded archives.

    Returns
    -------
    datasets, and the reasons for those left out, by name.

    Raises
    ------
    InputError
        For an unknown name, or one that was asked for and cannot be had.
    """
    unknown = [name for name in names or () if name not in DATASETS]
    if unknown:
        raise InputError(f"there is no dataset '{unknown[0]}'; choose from {', '.join(DATASETS)}.")
    loaded: list[Dataset] = []
    missing: dict[str, str] = {}
    for name in names or DATASETS:
        try:
            loaded.append(DATASETS[name](data))
        except InputError as error:
            if names is not None:
                raise
            missing[name] = str(error)
    return loaded, missing
