"""The place of the loss over several processes (``group=`` of the public loss).

Sums and products are computed for a block row of S with ``row_offset`` (see ``problem``), which is
all the sharded form needs from a backend; what is missing here is the exchange between ranks.
"""

from __future__ import annotations


def check_group(group) -> None:
    """Raises unless ``group`` is None or names a group of one process.

    ``group`` is None, a ``torch.distributed.ProcessGroup`` or "world".
    """
    if group is None:
        return
    import torch.distributed as dist

    if isinstance(group, str) and group != "world":
        raise ValueError(f"group: expected None, a ProcessGroup or 'world', got {group!r}")
    if not isinstance(group, str | dist.ProcessGroup):
        raise TypeError(
            f"group: expected None, a ProcessGroup or 'world', got {type(group).__name__}"
        )
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group: expected torch.distributed to be initialised, it is not")
    size = dist.get_world_size(None if group == "world" else group)
    if size > 1:
        raise NotImplementedError(
            f"group: expected one process, got {size}: the loss over several processes is not in "
            "this version; gather the rows first, or let every rank compute its own loss"
        )
