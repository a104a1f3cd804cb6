"""For people who write a rule of their own: the tests it should pass, and slow float64 twins."""

from surefoot.testing.no_sync import NoSync
from surefoot.testing.optimizer_suite import OptimizerSuite
from surefoot.testing.reference import ReferenceGroup, ReferenceOptimizer, reference_scale

__all__ = ["NoSync", "OptimizerSuite", "ReferenceGroup", "ReferenceOptimizer", "reference_scale"]
