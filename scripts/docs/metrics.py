"""Metrics, from the registry of a service and the words that services use."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from text import cell

from recallseg.runtime.services.metrics import Metrics

__all__ = ["metrics_page"]

SERVICES = Path(__file__).parents[2] / "runtime" / "services"
KINDS = {
    "queue": ("recallseg_queue", "state"),
    "done": ("recallseg_done_total", "what"),
    "refused": ("recallseg_refusals_total", "reason"),
    "stage": ("recallseg_stage_seconds", "stage"),
    "took": ("recallseg_stage_seconds", "stage"),
}


def metrics_page() -> str:
    """Return the page of all metrics."""
    out = [
        "# Metrics\n",
        "`/metrics` of a service in Prometheus' format: where the configuration has `[metrics]` "
        "(`node`, `mrd`, `igtl`), and of `recallseg serve` with its token. `/healthz` is 200 while "
        "the service's own threads live, `/readyz` once it can take work; otherwise 503 with the "
        "reason.\n",
        "| metric | kind | labels | |",
        "|---|---|---|---|",
    ]
    for name, kind, labels, said in families():
        out.append(f"| `{name}` | {kind} | {', '.join(f'`{each}`' for each in labels)} | {said} |")
    out += ["", "## Words of the labels\n", "| service | metric | words |", "|---|---|---|"]
    for (service, metric, label), words in sorted(_words().items()):
        shown = ", ".join(f"`{each}`" for each in sorted(words))
        out.append(f"| {service} | `{metric}`, `{label}` | {cell(shown)} |")
    out += ["", "`…` stands for a state, a kind or a stage by its name.", ""]
    return "\n".join(out)


def families() -> list[tuple[str, str, tuple[str, ...], str]]:
    """Return each metric: its exposed name, its kind, its labels, what it says."""
    found = []
    for collector in Metrics("x").registry._collector_to_names:
        each: Any = collector
        name = each._name + ("_total" if each._type == "counter" else "")
        found.append((name, each._type, each._labelnames, each._documentation))
    return found


def _words() -> dict[tuple[str, str, str], set[str]]:
    found: dict[tuple[str, str, str], set[str]] = {}
    for path in sorted(SERVICES.rglob("*.py")):
        service = path.relative_to(SERVICES).parts[0].removesuffix(".py")
        if path.parent == SERVICES:
            service = "all"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr in KINDS and owner.endswith("metrics") and node.args:
                words = _constants(node.args[0])
                metric, label = KINDS[node.func.attr]
                if words:
                    service = {"http": "serve"}.get(service, service)
                    found.setdefault((service, metric, label), set()).update(words)
    return found


def _constants(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.IfExp):
        return _constants(node.body) + _constants(node.orelse)
    if isinstance(node, ast.JoinedStr):
        parts = [each.value if isinstance(each, ast.Constant) else "…" for each in node.values]
        return ["".join(str(part) for part in parts)]
    return []
