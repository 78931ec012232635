"""Every launcher, as ``backends.packed`` asks for them; importing it needs Triton."""

from __future__ import annotations

from .common import launch
from .finish import add_positives as add_positives
from .finish import finish as finish
from .normalize import normalize as normalize
from .normalize import normalize_views as normalize_views
from .normalize import positives as positives
from .products import product as product
from .sums import combine as combine
from .sums import combine_blocks as combine_blocks
from .sums import fold as fold
from .sums import lines as lines
from .sums import sums as sums
from .sums import total as total
from .weights import factors as factors
from .weights import weights as weights

device = launch.device
