"""A person at napari with its plugin napari-nninteractive, who works on a server of ours.

Run by ``test_napari`` with a Python that has napari; nothing of RecallSeg is imported. What the
person does is done with the mouse on the window; what comes of it is kept beside screenshots.

    python napari_person.py URL TOKEN PICTURE.npz FOLDER

``PICTURE.npz`` has ``image`` HxW or DxHxW, ``spacing``, ``clicks`` nx4: inside (1 or 0) and the
place in voxels, z 0 in a picture; and maybe ``drags`` nx3, places along a stroke of other tools.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import napari
import numpy as np
from qtpy.QtCore import QEvent, QPoint, QPointF, Qt
from qtpy.QtGui import QMouseEvent
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication

SECONDS = 120.0


class Person:
    """What a person sees and does."""

    def __init__(self, url: str, token: str, image: Any, spacing: Sequence[float]) -> None:
        self.viewer = napari.Viewer(show=True)
        self.viewer.window.resize(1300, 850)
        self.viewer.add_image(image, name="image", scale=spacing)
        self.said: list[Any] = []
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

    def show(self, voxel: Sequence[float]) -> None:
        """Go to the slice of a voxel (z, y, x)."""
        world = self.viewer.layers[self.widget.label_layer_name].data_to_world(voxel)
        self.viewer.dims.set_point(range(len(world)), world)
        self.settle(0.2)

    def place(self, voxel: Sequence[float]) -> QPoint:
        """Return where a voxel of the slice that is shown is on the canvas."""
        world = self.viewer.layers[self.widget.label_layer_name].data_to_world(voxel)
        canvas = self.viewer.window._qt_viewer.canvas
        shown = [world[axis] for axis in self.viewer.dims.displayed]
        transform = canvas.view.scene.transform
        x, y = transform.map([shown[1], shown[0]])[:2]
        return QPoint(round(float(x)), round(float(y)))

    def click(self, voxel: Sequence[float], inside: bool) -> list[float]:
        """Click; return where the plugin put the point, in voxels."""
        self.press(self.widget.prompt_button.buttons[0 if inside else 1])
        native = self.viewer.window._qt_viewer.canvas.native
        self.show(voxel)
        at = self.place(voxel)
        points = self.widget.point_layer_name
        before = len(self.viewer.layers[points].data)
        QTest.mouseMove(native, at)
        QTest.mouseClick(native, Qt.LeftButton, Qt.NoModifier, at)
        self.wait(lambda: len(self.viewer.layers[points].data) > before, "a point is set")
        self.settle()
        return [float(value) for value in self.viewer.layers[points].data[-1]]

    def drag(self, tool: int, voxels: Sequence[Sequence[float]]) -> None:
        """Draw with another tool: 1 a box, 2 a scribble, 3 a lasso."""
        self.press(self.widget.prompt_button.buttons[0])
        self.press(self.widget.interaction_button.buttons[tool])
        self.settle()
        native = self.viewer.window._qt_viewer.canvas.native
        self.show(voxels[0])
        places = [self.place(voxel) for voxel in voxels]
        before = len(self.said)
        QTest.mouseMove(native, places[0])
        QTest.mousePress(native, Qt.LeftButton, Qt.NoModifier, places[0])
        for at in places[1:]:
            self.settle(0.02)
            moved = QMouseEvent(
                QEvent.MouseMove, QPointF(at), Qt.NoButton, Qt.LeftButton, Qt.NoModifier
            )
            QApplication.sendEvent(native, moved)
        QTest.mouseRelease(native, Qt.LeftButton, Qt.NoModifier, places[-1])
        self.wait(lambda: len(self.said) > before, f"tool {tool} is answered")
        self.settle()

    def listen(self) -> None:
        """Note what the plugin says to the server."""

        def noted(name: str, say: Callable[..., Any]) -> Callable[..., Any]:
            def said(*given: Any, **more: Any) -> Any:
                answer = say(*given, **more)
                self.said.append((name, given, more))
                return answer

            return said

        session = self.widget.session
        for name in ("point", "bbox", "scribble", "lasso"):
            say = f"add_{name}_interaction"
            setattr(session, say, noted(say, getattr(session, say)))

    def picture(self, path: Path) -> None:
        self.settle()
        self.viewer.window.screenshot(str(path), flash=False)


def main(url: str, token: str, given: str, folder: str) -> None:
    task, out = np.load(given), Path(folder)
    person = Person(url, token, task["image"], task["spacing"].tolist())
    person.connect()
    person.begin()
    person.listen()
    kept: dict[str, Any] = {}
    for number, (inside, *voxel) in enumerate(task["clicks"].tolist()):
        kept[f"point{number}"] = np.asarray(person.click(voxel, bool(inside)))
        kept[f"mask{number}"] = person.mask.copy()
        person.picture(out / f"click-{number}.png")
    for tool in (1, 2, 3) if "drags" in task else ():
        person.drag(tool, task["drags"].tolist())
        kept[f"mask{len(person.said) - 1}"] = person.mask.copy()
        person.picture(out / f"tool-{tool}.png")
    (out / "said.pickle").write_bytes(pickle.dumps(person.said))
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
