"""What is true here: numbers measured on a network and its data, that say what kind of number they are."""

from surefoot.measure.curvature import sharpness
from surefoot.measure.eigen import lambda_max, lambda_min, spectral_norm, spectrum
from surefoot.measure.features import FeatureRank, feature_rank
from surefoot.measure.gradient import alignment, full_gradient, jacobian_conditioning, pl_ratio
from surefoot.measure.gram_rounding import gram_rounding
from surefoot.measure.inputs import duplicates
from surefoot.measure.measurement import Measurement
from surefoot.measure.noise import gradient_noise, mean_noise
from surefoot.measure.smoothness import SmoothnessProbe
from surefoot.measure.smoothness_fit import Observation, SmoothnessFit, fit_smoothness, refutation
from surefoot.measure.tangent import jacobian_transpose_product, tangent_gram

__all__ = [
    "FeatureRank",
    "Measurement",
    "Observation",
    "SmoothnessFit",
    "SmoothnessProbe",
    "alignment",
    "duplicates",
    "feature_rank",
    "fit_smoothness",
    "full_gradient",
    "gradient_noise",
    "gram_rounding",
    "jacobian_conditioning",
    "jacobian_transpose_product",
    "lambda_max",
    "lambda_min",
    "mean_noise",
    "pl_ratio",
    "refutation",
    "sharpness",
    "spectral_norm",
    "spectrum",
    "tangent_gram",
]
