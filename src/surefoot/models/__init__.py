"""The models of the command line: a few standard ones by name, and any model of your own from a Python file."""

from surefoot.models.build import MODELS, build
from surefoot.models.shapes import check_shapes
from surefoot.models.vae import elbo_loss

__all__ = ["MODELS", "build", "check_shapes", "elbo_loss"]
