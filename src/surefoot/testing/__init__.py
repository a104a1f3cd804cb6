"""Reference twins for people who test a rule of their own."""

from surefoot.testing.reference import ReferenceGroup, ReferenceOptimizer, reference_scale

__all__ = ["ReferenceGroup", "ReferenceOptimizer", "reference_scale"]
