"""A person at napari with its plugin napari-nninteractive, who works on a server of ours.

Run by ``test_napari`` with a Python that has napari; nothing of RecallSeg is imported. What the
person does is done with the mouse on the window; what comes of it is kept beside screenshots.

    python napari_person.py URL TOKEN PICTURE.npz FOLDER

``PICTURE.npz`` has ``image`` HxW or DxHxW, ``spacing``, and ``clicks`` nx4: inside (1 or 0) and the
place in voxels, z 0 in a picture.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import napari
import numpy as np
from qtpy.QtCore import QPoint, Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication

SECONDS = 120.0


class Person:
    """What a person sees and does."""

    def __init__(self, url: str, token: str, image: Any, spacing: Sequence[float]) -> None:
        self.viewer = napari.Viewer(show=True)
        self.viewer.window.resize(1300, 850)
        self.viewer.add_image(image, name="image", scale=spacing)
        self.flat = image.ndim == 2
        _, self.widget = self.viewer.window.add_plugin_dock_widget("napari-nninteractive")
        self.widget.server_url_edit.setText(url)
        self.widget.api_key_edit.setText(token)

    def wait(self, true: Callable[[], object], what: str) -> None:
        end = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < end, f"{what}: {self.widget.remote_status_label.text()}"
            QApplication.processEvents()
            time.sleep(0.01)

    def settle(self, seconds: float = 0.5) -> None:
        """Let what is drawn be drawn."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            QApplication.processEvents()
            time.sleep(0.01)

    def press(self, button: Any) -> None:
        assert button.isEnabled(), f"{button.text()} cannot be pressed"
        QTest.mouseClick(button, Qt.LeftButton)

    def connect(self) -> None:
        self.press(self.widget.connect_btn)
        self.wait(lambda: self.widget._remote_connected, "connecting")

    def begin(self) -> None:
        self.press(self.widget.init_button)
        self.wait(
            lambda: (
                self.widget.point_layer_name in self.viewer.layers
                and self.widget._upload_dialog is None
            ),
            "the image is sent",
        )
        self.settle()

    @property
    def mask(self) -> Any:
        return self.viewer.layers[self.widget.label_layer_name].data

    def place(self, voxel: Sequence[float]) -> QPoint:
        """Go to the slice of a voxel (z, y, x); return where it is on the canvas."""
        layer = self.viewer.layers[self.widget.label_layer_name]
        world = layer.data_to_world(voxel)
        self.viewer.dims.set_point(range(len(world)), world)
        self.settle(0.2)
        canvas = self.viewer.window._qt_viewer.canvas
        shown = [world[axis] for axis in self.viewer.dims.displayed]
        transform = canvas.view.scene.transform
        x, y = transform.map([shown[1], shown[0]])[:2]
        return QPoint(round(float(x)), round(float(y)))

    def click(self, voxel: Sequence[float], inside: bool) -> list[float]:
        """Click; return where the plugin put the point, in voxels."""
        self.press(self.widget.prompt_button.buttons[0 if inside else 1])
        native = self.viewer.window._qt_viewer.canvas.native
        at = self.place(voxel)
        points = self.widget.point_layer_name
        before = len(self.viewer.layers[points].data)
        QTest.mouseMove(native, at)
        QTest.mouseClick(native, Qt.LeftButton, Qt.NoModifier, at)
        self.wait(lambda: len(self.viewer.layers[points].data) > before, "a point is set")
        self.settle()
        return [float(value) for value in self.viewer.layers[points].data[-1]]

    def picture(self, path: Path) -> None:
        self.settle()
        self.viewer.window.screenshot(str(path), flash=False)


def main(url: str, token: str, given: str, folder: str) -> None:
    task, out = np.load(given), Path(folder)
    person = Person(url, token, task["image"], task["spacing"].tolist())
    person.connect()
    person.begin()
    kept: dict[str, Any] = {"inside": task["clicks"][:, 0]}
    for number, (inside, *voxel) in enumerate(task["clicks"].tolist()):
        kept[f"point{number}"] = np.asarray(person.click(voxel, bool(inside)))
        kept[f"mask{number}"] = person.mask.copy()
        person.picture(out / f"click-{number}.png")
    person.press(person.widget.undo_button)
    person.settle()
    kept["undone"] = person.mask.copy()
    person.press(person.widget.reset_interaction_button)
    person.settle()
    kept["reset"] = person.mask.copy()
    person.widget.auto_run_ckbx.setChecked(False)
    person.press(person.widget.run_button)  # without a prompt: proposed from the library
    person.settle()
    kept["proposed"] = person.mask.copy()
    person.picture(out / "proposed.png")
    np.savez(out / "found.npz", **kept)
    person.viewer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
