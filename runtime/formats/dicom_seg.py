"""DICOM Segmentation objects (SEG, PS3.3 A.51), written and read by highdicom."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.dicom import SEGMENTATION, damaged_is_input_error, is_dicom
from recallseg.runtime.formats.images import write_atomically
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.volumes.slices import VolumeResult

__all__ = ["is_segmentation", "read_segmentation", "write_segmentation"]

SERIES_NUMBER = 900  # above what scanners number their own series with


def is_segmentation(path: Path) -> bool:
    """Whether a file is a DICOM SEG."""
    import pydicom

    if not is_dicom(path):
        return False
    with damaged_is_input_error(path):
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID"])
        return bool(header.get("SOPClassUID") == SEGMENTATION)


def read_segmentation(path: Path, volume: Volume) -> dict[str, NDArray[np.bool_]]:
    """Read the segments of a SEG on the grid of the series that it was drawn on.

    Returns
    -------
    dict
        Boolean masks of the volume's shape, by segment label.

    Raises
    ------
    InputError
        If it is damaged, refers to other images, or two segments have one label.
    """
    import highdicom

    sources = [str(dataset.SOPInstanceUID) for dataset in volume.origin]
    with damaged_is_input_error(path):
        segmentation = highdicom.seg.segread(path)
        referred = {str(uid) for _, _, uid in segmentation.get_source_image_uids()}
        if not referred & set(sources):
            raise InputError(
                f"{path} was drawn on other images than this series. Give the series it refers to."
            )
        masks: dict[str, NDArray[np.bool_]] = {}
        for number in segmentation.segment_numbers:
            label = str(segmentation.get_segment_description(number).segment_label)
            if label in masks:
                raise InputError(f"{path} has two segments with the label '{label}'.")
            if len(sources) == 1:
                count = volume.shape[0]
                planes = segmentation.get_pixels_by_source_frame(
                    sources[0],
                    list(range(1, count + 1)),
                    segment_numbers=[number],
                    assert_missing_frames_are_empty=True,
                )
            else:
                planes = segmentation.get_pixels_by_source_instance(
                    sources, segment_numbers=[number], assert_missing_frames_are_empty=True
                )
            masks[label] = np.asarray(planes[..., 0] > 0)
        return masks


def write_segmentation(path: Path, volume: Volume, result: VolumeResult) -> None:
    """Write a result as a BINARY SEG on the source's own pixel grid: in full, or not at all.

    Parameters
    ----------
    volume : as read by :func:`recallseg.runtime.formats.dicom.read_dicom`.
    result : its label map, structures, bundle and library; these two are the algorithm's version,
        since a library changes the output as a model does.

    Raises
    ------
    InputError
        If no structure is in the label map (DICOM knows no empty SEG), or the source lacks what a
        SEG must repeat of it.
    OSError
        If the folder cannot be written.
    """
    import highdicom
    from pydicom.sr.codedict import codes
    from pydicom.uid import ExplicitVRLittleEndian

    from recallseg import __version__

    label_map = result.label_map
    with damaged_is_input_error(path):
        algorithm = highdicom.AlgorithmIdentificationSequence(
            name="RecallSeg",
            family=codes.cid7162.ArtificialIntelligence,
            version=f"bundle {result.bundle_identity[:16]}, library {result.library_digest[:16]}",
            source="RecallSeg",
            parameters={
                "k": str(result.k),
                "precision": result.precision,
                "memory_format": result.memory_format,
                **({"notice": result.notice} if result.notice else {}),
            },
        )
        present = {
            name: value for name, value in result.labels.items() if (label_map == value).any()
        }
        if not present:
            raise InputError("no structure was found, and DICOM knows no empty SEG.")
        planes = np.stack([label_map == value for value in present.values()], axis=-1)
        segmentation = highdicom.seg.Segmentation(
            source_images=volume.origin,
            pixel_array=planes,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[
                highdicom.seg.SegmentDescription(
                    segment_number=number,
                    segment_label=name[:64],
                    segmented_property_category=codes.SCT.Tissue,
                    segmented_property_type=codes.SCT.Tissue,
                    algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                    algorithm_identification=algorithm,
                    tracking_uid=highdicom.UID(),
                    tracking_id=name[:64],
                )
                for number, name in enumerate(present, 1)
            ],
            series_instance_uid=highdicom.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="RecallSeg",
            manufacturer_model_name="RecallSeg",
            software_versions=__version__,
            device_serial_number=result.bundle_identity[:16],
            content_description=result.notice[:64] or None,
            content_label="RECALLSEG",
            series_description="RecallSeg segmentation",
            transfer_syntax_uid=ExplicitVRLittleEndian,
        )
        stream = io.BytesIO()
        segmentation.save_as(stream)
    write_atomically(path, stream.getvalue())
