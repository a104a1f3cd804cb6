"""lr, γ and δ from measured constants, instead of a grid."""

from surefoot.tune.online import Online
from surefoot.tune.suggest import Reason, Suggestion, suggest

__all__ = ["Online", "Reason", "Suggestion", "suggest"]
