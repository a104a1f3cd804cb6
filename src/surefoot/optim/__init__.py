"""How a step is taken: clipped optimizers, the rules behind them, and clipping for any other optimizer."""

from surefoot.optim._base import ClippedOptimizer
from surefoot.optim.clip import clip_grad_
from surefoot.optim.delta_gclip import DeltaGClip
from surefoot.optim.fused_clip import fused_clip_step
from surefoot.optim.gclip import GClip
from surefoot.optim.mixed_clip import MixedClip
from surefoot.optim.normalized_gd import NormalizedGD
from surefoot.optim.smooth_clip import SmoothClip
from surefoot.optim.thresholds import Measured, Percentile, Threshold, ZScore
from surefoot.optim.unitwise import agc_

__all__ = [
    "ClippedOptimizer",
    "DeltaGClip",
    "GClip",
    "Measured",
    "MixedClip",
    "NormalizedGD",
    "Percentile",
    "SmoothClip",
    "Threshold",
    "ZScore",
    "agc_",
    "clip_grad_",
    "fused_clip_step",
]
