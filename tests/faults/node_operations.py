"""A DICOM node: objects come by the network, are answered, and the answers stay.

Here the node reads objects in its own process, so that faults reach what otherwise happens in
another one. What a sender was told to be stored is written down beside the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pydicom
from pynetdicom import AE
from support.dicom_series import write_series
from support.fake_bundle import make_fake_bundle
from support.inside import HereDecoder
from support.nodes import configured
from support.services import half_library, half_volume, wait_until

from faults.operation import CommandError, Operation
from recallseg.runtime.services.node import answering, receiving
from recallseg.runtime.services.node.node import Node

__all__ = ["NODE_OPERATIONS"]

SLICES = 2
PATIENCE_S = 20.0


def _with_series(root: Path) -> None:
    answering.IsolatedDecoder = receiving.IsolatedDecoder = HereDecoder
    half_library(root / "library", make_fake_bundle(root / "bundle"))
    write_series(root.with_name("series"), half_volume(SLICES))


@contextmanager
def _node(root: Path) -> Iterator[Node]:
    node = Node(configured(root, root / "library", quiet_s=0.05))
    try:
        node.start()
        yield node
    finally:
        node.stop(2)


def _receive(root: Path) -> None:
    """Send a series until it is acknowledged or refused, and wait for the answer."""
    files = sorted(root.with_name("series").iterdir())
    told = root.with_name("told")
    if not os.path.exists(root / "state"):  # a fault that comes to who asks is a no
        told.unlink(missing_ok=True)
    with _node(root) as node:
        # Given up after five times, as the input may be what is too large: until somebody asks.
        if any("allocate memory" in trouble["why"] for trouble in node.troubles()):
            node._store.retry()
        ae = AE("SCANNER")
        ae.add_requested_context("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.1.2.1")
        association = ae.associate("127.0.0.1", node.port, ae_title="RECALLSEG")
        if not association.is_established:
            raise CommandError(f"the node of {root} takes no association")
        try:
            for file in files:
                status = association.send_c_store(pydicom.dcmread(file))
                code = status.get("Status")
                if code != 0:
                    why = status.get("ErrorComment")
                    raise CommandError(f"{root}: {code} {why}")
                with told.open("a") as done:
                    done.write(file.name + "\n")
        finally:
            association.release()
        with suppress(AssertionError):
            wait_until(lambda: _seen(root) == SLICES, PATIENCE_S)
            return
        raise CommandError(f"{root}: not answered: {node.counts()}, {node.troubles()}")


def _seen(root: Path) -> int:
    """Frames of the answer, looked at by a way on which no file can be kept from being opened."""
    way = root.with_name(f"{root.name}-seen")
    if not way.is_symlink():
        way.symlink_to(root)
    with suppress(OSError):  # the fault came to who looks; there is a next time
        return int(_answered(way)[1])
    return 0


def _answered(root: Path) -> Any:
    """How many objects were received, whole, and how many frames the largest answer has.

    A series of which the sender was refused a part is answered as far as it came, and anew when
    the rest has come.
    """
    received, frames = set(), [0]
    for file in (root / "state" / "received").glob("*/*.dcm"):
        received.add(str(pydicom.dcmread(file).SOPInstanceUID))
    for file in (root / "state" / "answers").glob("[0-9]*/*.seg.dcm"):
        frames.append(int(pydicom.dcmread(file).NumberOfFrames))
    told = root.with_name("told")
    if root.name == "case" and told.exists():
        series = root.with_name("series")
        promised = {
            str(pydicom.dcmread(series / name).SOPInstanceUID) for name in told.read_text().split()
        }
        if lost := promised - received:
            raise AssertionError(f"acknowledged and not there: {lost}")
    return len(received), max(frames)


def _on_the_way(state: Any, after: Any) -> bool:
    return state[0] <= after[0] and state[1] <= state[0]


NODE_OPERATIONS = (
    Operation(
        *("node", _with_series, _receive, _answered, _on_the_way),
        seconds=300,
        keeps="state/answers/",
    ),
)
