"""The independent checker of certificates: NumPy and safetensors, nothing of torch or of the rest of surefoot."""

from surefoot.check.verify import CheckResult, Line, verify

__all__ = ["CheckResult", "Line", "verify"]
