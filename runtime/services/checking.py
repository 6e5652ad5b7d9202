"""Whether what a configuration names is there: asked before a service is started."""

from __future__ import annotations

from recallseg.engines.errors import RecallSegError
from recallseg.runtime.services.audit_keys import read_audit_key
from recallseg.runtime.services.questions import check_rule
from recallseg.runtime.services.settings import AuditSettings, Configuration

__all__ = ["check_configuration"]


def check_configuration(configuration: Configuration) -> list[str]:
    """Return what is wrong, a sentence each; empty if nothing is. Nothing is written."""
    problems = [problem for rule in configuration.rules if (problem := check_rule(rule))]
    if configuration.audit is not None:
        problems += _check_audit(configuration.audit)
    if configuration.node is not None:
        problems += configuration.node.problems(configuration)
    if configuration.mrd is not None:
        problems += configuration.mrd.problems(configuration)
    if configuration.igtl is not None:
        problems += configuration.igtl.problems(configuration)
    return problems


def _check_audit(audit: AuditSettings) -> list[str]:
    try:
        if audit.log.exists():
            audit.open()
        elif not audit.log.parent.is_dir():
            return [f"audit.log: there is no folder {audit.log.parent}"]
        elif audit.key is not None:
            read_audit_key(audit.key)
    except (RecallSegError, OSError) as error:
        return [f"audit: {error}"]
    return []
