"""Bundles as they were written before weights were stored once: all are in their graphs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx

from recallseg.engines.bundle import Bundle
from recallseg.engines.digest import digest_file

__all__ = ["write_former"]


def write_former(bundle: Bundle, folder: Path, manifest: dict[str, Any] | None = None) -> Bundle:
    """Write a bundle anew in format 2, or with another manifest of the same graphs and files."""
    shutil.copytree(bundle.path, folder, ignore=shutil.ignore_patterns("graphs"))
    manifest = {**bundle.manifest, "version": 2} if manifest is None else manifest
    graphs: dict[str, Any] = {}
    files: dict[str, str] = {}
    for key in manifest["graphs"]:
        source = str(bundle.manifest["graphs"][key]["file"])
        file = files.setdefault(source, f"graphs/{key}.onnx")
        if not (folder / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            onnx.save(onnx.load(bundle.path / source), folder / file)
        graphs[key] = {"file": file, "sha256": digest_file(folder / file)}
    text = json.dumps({**manifest, "graphs": graphs})
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return Bundle.open(folder)
