"""What is used where nobody said otherwise: in Python, on the command line and in benchmarks.

The C interface names the same in its header; a test holds it to these.
"""

__all__ = ["ENGINE", "PRECISION", "K"]

ENGINE = "onnxruntime-cpu"
"""Runs anywhere, and needs nothing but the core's dependencies and ONNX Runtime."""

PRECISION = "fp32"
"""What every bundle has."""

K = 4
"""Most exemplars recalled of a structure."""
