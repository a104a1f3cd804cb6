"""One JSON document in, one self-contained HTML file out.

The page needs no network, no script and no second file. Documents are of three formats, `surefoot.run`,
`surefoot.comparison` and `surefoot.measurements`, all version 1; a run's document may hold its measurements.
"""

from surefoot.report.build import render, write_report

__all__ = ["render", "write_report"]
