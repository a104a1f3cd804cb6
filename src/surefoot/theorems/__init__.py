"""What follows: hypotheses held against measurements give verdicts."""

from surefoot.theorems.clipped_descent import check_clipped_descent
from surefoot.theorems.delta_gclip import check_delta_gclip, check_stochastic_delta_gclip
from surefoot.theorems.last_layer import check_last_layer
from surefoot.theorems.local_pl import check_local_pl, check_local_pl_jacobian, check_path_integral
from surefoot.theorems.path_length import PathLengthNumbers, check_path_length, path_length
from surefoot.theorems.positive_init import PositiveInit, positive_init_
from surefoot.theorems.tangent_kernel import check_tangent_kernel
from surefoot.theorems.verdict import Finding, Outcome, Verdict

__all__ = [
    "Finding",
    "Outcome",
    "PathLengthNumbers",
    "PositiveInit",
    "Verdict",
    "check_clipped_descent",
    "check_delta_gclip",
    "check_last_layer",
    "check_local_pl",
    "check_local_pl_jacobian",
    "check_path_integral",
    "check_path_length",
    "check_stochastic_delta_gclip",
    "check_tangent_kernel",
    "path_length",
    "positive_init_",
]
