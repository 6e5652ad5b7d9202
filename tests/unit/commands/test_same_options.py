"""What a command is told, Python is told by the same name, with the same default."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest

import recallseg
from recallseg.commands import evaluate as evaluate_command
from recallseg.commands import importing, segment
from recallseg.runtime.library import Library
from recallseg.runtime.library.importing import import_exemplars
from recallseg.runtime.reports.evaluation import evaluate

OPENED = "the library is opened with it: Library.open(...)"
FILES = "of files that the command writes; Python has the result"

IMPORT = {
    "library": "",
    **dict.fromkeys(("engine", "precision", "threads"), OPENED),
    "path": "'found': a path, or what was found",
    "tag": "'tags': a mapping",
    "as_json": "the report",
}
SEGMENT = {
    "library": "",
    "paths": "'path', one at a time",
    "tag": "'tags': a mapping",
    "format": "'kind', as items and records call it",
    "propagate": "'frames' of a segmenter, which streams have too",
    "clean_up": "clean_up(result, largest=..., fill_holes=...), of any result",
    "codes": "'concepts': read_concepts(file)",
    "as_stored": "of pictures: read_image(path, as_stored=True)",
    **dict.fromkeys(("output", "overwrite", "resume", "preview"), FILES),
    **dict.fromkeys(("audit", "audit_key", "audit_head"), "AuditLog(...).record(...)"),
    "strict": "a path that cannot be read raises",
    "as_json": "the result's to_json()",
}
EVALUATE = {
    "library": "",
    "folder": "'images': a path, what was found, or sources",
    "output": FILES,
    "k": "'ks', several",
    "split_by": "'groups', which fill_pool returns",
    "group_by": "'group' of a source",
    "bundle": "Library.create(...)",
    "strict": "what failed or was passed over is in the evaluation, and in what was found",
    "as_json": "to_json(evaluation, settings)",
}
"""Options of commands that Python has in another way, and which."""

DEFAULTS = {
    "engine": "None: what the library was opened with, which is the command's default",
    "precision": "None: likewise",
    "budgets": "(): none",
    "baselines": "(): none",
    "time": "None in both; the command's 'all' segments one after the other",
}
"""Why a default is written in another way."""


@pytest.mark.parametrize(
    ("command", "functions", "otherwise"),
    [
        (importing.import_, (import_exemplars,), IMPORT),
        (
            segment.segment,
            (
                recallseg.Segmenter,
                recallseg.read_volume,
                recallseg.segment_volume,
                recallseg.write_segmentation,
            ),
            SEGMENT,
        ),
        (evaluate_command.evaluate, (evaluate,), EVALUATE),
    ],
)
def test_options_of_commands_are_arguments_of_functions(
    command: Callable[..., Any], functions: tuple[Any, ...], otherwise: Mapping[str, str]
) -> None:
    told = {
        name: parameter
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
    }
    asked = inspect.signature(command).parameters
    assert set(otherwise) <= set(asked), "no longer an option"
    missing = set(asked) - set(told) - set(otherwise)
    assert not missing, "from Python it cannot be said"
    for name in set(asked) & set(told) - set(otherwise):
        if name not in DEFAULTS:
            assert told[name].default == asked[name].default, name


def test_libraries_are_opened_and_added_to_as_commands_do() -> None:
    from recallseg.commands import library

    for command, function, otherwise in (
        (library.add, Library.add, {"labels", "mask", "missing", "tag", "as_json"}),
        (library.rebuild, Library.rebuild, {"index_only", "as_json"}),
    ):
        asked = set(inspect.signature(command).parameters) - {"library"} - otherwise
        opened = set(inspect.signature(Library.open).parameters)
        assert asked <= opened | set(inspect.signature(function).parameters)
