"""For people who write a rule or a probe of their own: the tests it should pass, and slow float64 twins."""

from surefoot.testing.no_sync import NoSync
from surefoot.testing.optimizer_suite import OptimizerSuite
from surefoot.testing.probe_suite import ProbeSuite
from surefoot.testing.reference import ReferenceGroup, ReferenceOptimizer, reference_scale

__all__ = ["NoSync", "OptimizerSuite", "ProbeSuite", "ReferenceGroup", "ReferenceOptimizer", "reference_scale"]
