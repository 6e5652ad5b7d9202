"""The public names of Python: a page for each class, one for functions, one for errors."""

from __future__ import annotations

import importlib
import inspect

from text import cell, flowing

import recallseg
from recallseg import errors

__all__ = ["python_pages"]


def python_pages() -> dict[str, str]:
    """Return the pages; mkdocstrings fills in what each name is."""
    names = [each for each in recallseg.__all__ if each not in ("__version__", "errors")]
    classes = [each for each in names if inspect.isclass(getattr(recallseg, each))]
    classes.remove("RecallSegError")
    functions = [each for each in names if each not in (*classes, "RecallSegError")]
    index = [
        "# Python\n",
        "`import recallseg` loads no network; each name is imported when it is first used.\n",
        "| | |",
        "|---|---|",
    ]
    pages = {}
    for name in classes:
        pages[f"reference/python/{name}.md"] = (
            f"{_directive(name)}    options:\n      heading_level: 1\n"
        )
        index.append(f"| [`{name}`]({name}.md) | {_summary(name)} |")
    index += [
        f"| [`{name}`](functions.md#{_home(name)}) | {_summary(name)} |" for name in functions
    ]
    index += ["| [`errors`](errors.md) | One tree of errors |", ""]
    parts = "\n\n".join(_directive(name) for name in functions)
    pages["reference/python/functions.md"] = f"# Functions\n\n{parts}"
    parts = "\n\n".join(f"::: {_place(getattr(errors, name))}" for name in errors.__all__)
    pages["reference/python/errors.md"] = f"# Errors\n\n{parts}\n"
    return {"reference/python/index.md": "\n".join(index), **pages}


def _home(name: str) -> str:
    """Return where a public name is defined: what the page's anchor is called after."""
    return f"{recallseg._HOMES[name]}.{name}"


def _place(kind: type) -> str:
    return f"recallseg.engines.errors.{kind.__name__}"


def _directive(name: str) -> str:
    return f"::: {_home(name)}\n"


def _summary(name: str) -> str:
    found = getattr(importlib.import_module(recallseg._HOMES[name]), name)
    return cell(flowing(inspect.getdoc(found) or "").split("\n\n")[0])
