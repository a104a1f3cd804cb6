"""The training loop of the command line: run folders, checkpoints, resume, comparisons."""

from surefoot.train.config import TrainConfig
from surefoot.train.loop import resume, train

__all__ = ["TrainConfig", "resume", "train"]
