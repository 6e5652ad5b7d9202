"""Weights are read as ONNX reads them, and what cannot be read is named."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import onnx
import pytest

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import ExportError
from recallseg.export.converting import convert_bundle
from recallseg.export.onnx_export import export_graph
from recallseg.export.reading import read_graph
from recallseg.export.writing import write_bundle

DEMO = Bundle.open("demo")


@pytest.mark.parametrize("graph", ["encode", "attend"])
def test_a_graph_is_what_onnx_reads(graph: str) -> None:
    path, _ = DEMO.graph_file(graph, ("portable",), "fp32")
    assert read_graph(path) == onnx.load(path)
    assert read_graph(path, weights=False) == onnx.load(path, load_external_data=False)


def test_weights_that_are_cut_off_are_refused_by_name(tmp_path: Path) -> None:
    path, _ = DEMO.graph_file("encode", ("portable",), "fp32")
    folder = Path(shutil.copytree(path.parent, tmp_path / "graphs"))
    largest = max(folder.glob("*.weights"), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size - 1)
    with pytest.raises(ExportError, match=rf"{largest.name} is cut off"):
        [read_graph(graph) for graph in folder.glob("*.onnx")]


def test_a_source_that_the_disk_does_not_give_is_not_called_a_fault_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def refuse(self: Path, *values: object, **named: object) -> object:
        if self.suffix == ".weights" and DEMO.path in self.parents:
            raise OSError(errno.EMFILE, "Too many open files", str(self))
        return real(self, *values, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Bundle, "check_files", lambda self: None)
    with pytest.raises(ExportError, match=r"weights cannot be read: Too many.*not written"):
        convert_bundle(DEMO, tmp_path / "made", ["fp16"])
    assert not (tmp_path / "made").exists()


def test_a_disk_that_fills_while_a_graph_is_exported_is_told_with_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from recallseg.engines.specs import GraphSpec, TensorSpec

    class Program:
        model = onnx.ModelProto()

        def save(self, *values: object, **named: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.onnx, "export", lambda *values, **named: Program())
    monkeypatch.setattr("recallseg.export.onnx_export._forget_origin", lambda model: None)
    monkeypatch.setattr("recallseg.export.onnx_export._rename_twins", lambda model: None)
    spec = GraphSpec("embed", (TensorSpec("image", "float32", (1, 3, 8, 8)),), ())
    with (
        pytest.raises(ExportError, match=r"bundle .*made cannot be written: .*No space left"),
        write_bundle(tmp_path / "made", overwrite=False) as work,
    ):
        export_graph(torch.nn.Identity(), spec, DEMO.geometry, work / "graph.onnx")
