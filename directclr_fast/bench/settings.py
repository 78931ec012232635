"""What ``directclr-fast bench`` measures: every setting, its default, its flag and its check."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..train.config import check_setting, resolve_device

DTYPES = ("float32", "bfloat16", "float16")


def setting(default: Any, help: str, *, low: int | None = None, choices=None, **flag) -> Any:
    """A field of Settings and the flag of ``bench`` for it. The default may be None.

    ``low``: the least value, of each where there are several; ``choices``: the values there are.
    ``flag``: what argparse takes beside ``help``, and the flag's ``name`` where it is another.
    """
    how = {"low": low, "choices": choices, "flag": {"help": help, **flag}}
    return dataclasses.field(default=default, metadata=how)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, every size with every variant, and for how long."""

    rows: tuple[int, ...] = setting(
        (256, 512, 1024, 2048, 4096, 8192), "rows of each view", low=2,
        type=int, nargs="+", metavar="N",
    )  # fmt: skip
    dims: tuple[int, ...] = setting(
        (360,), "columns taken, default 360", low=1, name="--dim", type=int, nargs="+", metavar="D"
    )
    width: int = setting(
        2048, "columns of a representation, default 2048", low=1, type=int, metavar="R"
    )
    negatives: str = setting("cross", "cross (default) or both", choices=("cross", "both"))
    both_rows: tuple[int, ...] = setting(
        (128, 1024), "sizes also measured with negatives both, default 128 1024", low=2,
        type=int, nargs="*", metavar="N",
    )  # fmt: skip
    dtype: str | None = setting(
        None, "float32, bfloat16, float16 (default: bfloat16 on a GPU)", choices=DTYPES
    )
    device: str = setting(
        "auto", "cpu or cuda (default: cuda where there is one)", choices=("auto", "cpu", "cuda")
    )
    precisions: tuple[str, ...] | None = setting(
        None, "of this package's backends: auto, bf16, ...", nargs="+", metavar="P"
    )
    names: tuple[str, ...] | None = setting(
        None, "only these; --list shows them", name="--variants", nargs="+", metavar="V"
    )
    rounds: int = setting(7, "turns that count, default 7", low=1, type=int)
    budget: float | None = setting(
        None, "seconds of turns for a case, after 3 (default: none)", type=float
    )
    memory: bool = setting(True, "times only", name="--no-memory", action="store_false")

    def resolved(self) -> Settings:
        """With the device and dtype of this machine. ValueError for what cannot be."""
        for field in dataclasses.fields(self):
            low, choices = field.metadata["low"], field.metadata["choices"]
            value = getattr(self, field.name)
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None:
                    check_setting(field.name, one, low=low, choices=choices)
        if not self.rows or not self.dims:
            raise ValueError("rows: expected at least one size, got none")
        device = resolve_device(self.device)
        dtype = self.dtype or ("bfloat16" if device == "cuda" else "float32")
        return dataclasses.replace(self, device=device, dtype=dtype)

    def cases(self) -> list:
        """The grid, small sizes first."""
        from .variants import Case

        both = self.both_rows if self.negatives == "cross" else ()
        return [
            Case(rows, max(self.width, dim), dim, self.dtype, self.device, negatives)
            for negatives, sizes in ((self.negatives, self.rows), ("both", both))
            for dim in self.dims
            for rows in sizes
        ]

    def catalogue(self, case) -> list:
        """The variants wanted for a case. ValueError for a name that none has."""
        from . import variants

        offered = variants.catalogue(case, self.precisions)
        if self.names is None:
            return offered
        known = {v.name for v in offered}
        if unknown := [name for name in self.names if name not in known]:
            raise ValueError(
                f"variants: expected names of {', '.join(sorted(known))}, got {', '.join(unknown)}"
            )
        return [v for v in offered if v.name in self.names]


QUICK = Settings(rows=(256, 1024, 4096), both_rows=(128, 1024), rounds=5, budget=8.0)
