"""From the name of a data set to tensors in memory: images, tables, sentences and running text."""

from surefoot.data.dataset import Dataset
from surefoot.data.load import load

__all__ = ["Dataset", "load"]
