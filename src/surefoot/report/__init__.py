"""One JSON document in, one self-contained HTML file out.

The page needs no network, no script and no second file. Documents are of two formats, `surefoot.run` and
`surefoot.comparison`, both version 1.
"""

from surefoot.report.build import render, write_report

__all__ = ["render", "write_report"]
