"""Every launcher, as ``backends.packed`` asks for them; importing it needs Triton."""
# ruff: noqa: F401

from __future__ import annotations

from .finish import add_positives, finish
from .normalize import normalize, positives
from .products import product
from .sums import combine, combine_blocks, fold, lines, sums, total
from .weights import factors, weights
