"""Is this engine right, here? Compare it with the bundle's golden tensors before it is used.

A build that succeeds proves nothing (pitfalls 6 to 8): wrong fused attention, half-precision
overflow and a transposed output all come out of successful builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.bundle import Bundle
from recallseg.engines.composition import Composition
from recallseg.engines.engine import Engine, Tensor
from recallseg.engines.errors import BundleError, VerificationError
from recallseg.engines.golden import CORRECTED, GoldenTensors, run_case
from recallseg.engines.precisions import find_precision

__all__ = [
    "Check",
    "Verification",
    "compare_with_golden",
    "mask_dice",
    "relative_error",
    "verify_engines",
]

MASK_DICE = 0.98
"""Least Dice between an engine's golden masks and the reference's, in every number format."""

APPROXIMATE_MASK_DICE = 0.9
"""The same where less is computed than the reference computes: this catches what is broken, and an
evaluation on real images says what the approximation costs."""


@dataclass(frozen=True)
class Check:
    """One comparison: ``error`` must be at most ``tolerance``."""

    tensor: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; a NaN never is."""
        return bool(self.error <= self.tolerance)


@dataclass(frozen=True)
class Verification:
    """All checks of one engine and precision, and the Dice of its golden masks."""

    engine: str
    precision: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected| in the 2-norm; infinite when not finite."""
    found64, expected64 = found.astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(found64).all():
        return float("inf")
    return float(np.linalg.norm(found64 - expected64)) / max(
        float(np.linalg.norm(expected64)), 1e-12
    )


def mask_dice(found: NDArray[np.bool_], expected: NDArray[np.bool_]) -> float:
    """Return the Dice coefficient of two masks; two empty masks agree (1.0)."""
    total = int(found.sum()) + int(expected.sum())
    return 1.0 if total == 0 else 2.0 * int((found & expected).sum()) / total


def verify_engines(
    bundle: Bundle, engines: Mapping[str, Engine], precision: str, *, strict: bool = True
) -> Verification:
    """Run the golden case through ``engines`` and compare.

    Parameters
    ----------
    bundle : with golden tensors.
    engines : all five, by graph name, and those optional ones that are to be judged.
    precision : chooses the tolerance.
    strict : raise when a check fails; otherwise report only.

    Raises
    ------
    VerificationError
        Naming the first tensor that differs, by how much, and what was allowed.
    """
    golden = GoldenTensors.load(bundle.golden_file)
    found = run_case(
        golden.case, Composition(engines), bundle.geometry, bundle.normalisation, bundle.memory
    )
    engine = next(iter(engines.values())).name
    return compare_with_golden(bundle, golden, found, engine, precision, strict=strict)


def compare_with_golden(
    bundle: Bundle,
    golden: GoldenTensors,
    found: Mapping[str, Tensor],
    engine: str,
    precision: str,
    *,
    strict: bool = True,
) -> Verification:
    """Compare a run of the golden case that was already made; see :func:`verify_engines`.

    Parameters
    ----------
    bundle, golden : the golden tensors, and the bundle that they belong to.
    found : what :func:`recallseg.engines.golden.run_case` returned.
    engine, precision : what made it; the precision chooses the tolerance.
    strict : raise when a check fails; otherwise report only.

    Raises
    ------
    VerificationError
        Naming the first tensor that differs, by how much, and what was allowed.
    BundleError
        If the golden tensors have other names or sizes than what the graphs make.
    """
    asked = find_precision(precision)
    try:
        checks = [
            Check(
                name,
                relative_error(found[name].ravel()[golden.index[name]], values),
                asked.tolerance,
            )
            for name, values in golden.values.items()
            if name in found or not name.startswith(CORRECTED)  # of a graph that was not asked for
        ]
        if found["logits"].shape != golden.masks.shape:
            raise ValueError(f"masks of {golden.masks.shape}, logits of {found['logits'].shape}")
    except (KeyError, IndexError, ValueError) as error:
        raise BundleError(
            f"the golden tensors of bundle {bundle.name} are not of its graphs: "
            f"{type(error).__name__}: {error}. Export the bundle again."
        ) from error
    dice = mask_dice(found["logits"] > 0, golden.masks)
    least = APPROXIMATE_MASK_DICE if asked.approximations else MASK_DICE
    checks.append(Check("masks (1 - Dice)", 1.0 - dice, 1.0 - least))
    result = Verification(engine, precision, tuple(checks))
    if strict and not result.passed:
        failed = [check for check in checks if not check.passed]
        raise VerificationError(
            f"engine '{engine}' in {precision} does not reproduce the golden tensors of bundle "
            f"{bundle.name}: '{failed[0].tensor}' is off by {failed[0].error:.2e}, allowed is "
            f"{failed[0].tolerance:.0e} ({len(failed)} of {len(checks)} checks failed). Do not use "
            "it; choose another engine or precision, or build it again."
        )
    return result
