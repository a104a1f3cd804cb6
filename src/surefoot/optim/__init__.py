"""How a step is taken: clipped optimizers, the rules behind them, and clipping for any other optimizer."""

from surefoot.optim.clip import clip_grad_
from surefoot.optim.delta_gclip import DeltaGClip
from surefoot.optim.gclip import GClip
from surefoot.optim.normalized_gd import NormalizedGD
from surefoot.optim.smooth_clip import SmoothClip

__all__ = ["DeltaGClip", "GClip", "NormalizedGD", "SmoothClip", "clip_grad_"]
