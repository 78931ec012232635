"""What one call of the loss asks, checked: its options, and the record every backend reads.

An option is a field of :class:`Options`: its default, its check and, by its type, its place in the
schema of the registered ops stand on one line. :class:`Problem` is those fields and the sizes of
the tensors. A backend that cannot do what a field says gives its reason in ``why_not``.

The record holds metadata only, never a tensor's values, so it can be built while tracing and costs
no device synchronisation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .address import dispatched, readable, unwrapped

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NEGATIVES = ("cross", "both", "same")
SAME_LABEL = ("positive", "ignore")
PRECISIONS = ("auto", "fp16", "bf16", "tf32", "fp8", "highest")
LARGEST = sys.float_info.max  # an int may be larger
PRIORITY = ("cpu", "cuda", "triton", "torch", "reference")  # backends, fastest first


def _one_of(*choices: str):
    def check(name: str, value) -> None:
        if value not in choices:
            expected = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"{name}: expected one of {expected}, got {value!r}")

    return check


def _boolean(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def _is_number(value) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def check_positive(name: str, value, hint: str = "") -> None:
    """Raises ``ValueError`` unless ``value`` is a positive finite number."""
    if not _is_number(value) or not 0.0 < value <= LARGEST:
        raise ValueError(f"{name}: expected a positive finite number, got {value!r}{hint}")


def _bytes_or_none(name: str, value) -> None:
    if value is not None and (not isinstance(value, int) or value < 0):
        raise ValueError(f"{name}: expected None or a number of bytes >= 0, got {value!r}")


def _of_the_tensors(name: str, value) -> None:
    """Checked beside the tensors that say what is allowed."""


def _option(default, check=_of_the_tensors, agreed: bool = True, reference_only: tuple = ()):
    """``agreed``: processes that share a batch must ask the same. ``reference_only``: values that
    no other backend takes."""
    how = {"check": check, "agreed": agreed, "reference_only": reference_only}
    return dataclasses.field(default=default, metadata=how)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a call asks besides its tensors, in the words of ``fast_directclr_loss``."""

    dim: int | None = _option(360)  # not read where columns are given
    temperature: float | None = _option(0.1)  # None: a tensor, whose value the host must not need
    negatives: str = _option("cross", _one_of(*NEGATIVES), reference_only=("same",))
    same_label: str = _option("positive", _one_of(*SAME_LABEL))  # not read without labels
    symmetric: bool = _option(True, _boolean)
    reduction: str = _option("mean", _one_of("mean", "sum", "none"))
    gather: str = _option("auto", _one_of("auto", "all", "ring"))
    even_batches: bool = _option(False, _boolean)
    precision: str = _option("auto", _one_of(*PRECISIONS))
    backend: str = _option("auto", _one_of("auto", *PRIORITY))
    workspace_bytes: int | None = _option(None, _bytes_or_none, agreed=False)
    eps: float = _option(1e-12, check_positive)
    return_stats: bool = _option(False, _boolean, agreed=False)
    autocast: bool = _option(False, _boolean)  # not the caller's to say: whether it is on

    def values(self) -> tuple[Any, ...]:
        """In the order of :data:`SCHEMA`."""
        return tuple([getattr(self, name) for name in _NAMES])

    def reference_only(self) -> list[str]:
        """Reasons against every backend but the reference."""
        reasons = []
        for name, values in _REFERENCE_ONLY:  # asked at every step: no comprehension's call
            if getattr(self, name) in values:
                reasons.append(f"{name} {getattr(self, name)!r} is in the reference backend only")
        return reasons

    def replace(self, **changes):
        """A copy with these fields; nothing is checked."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, **changes)
        return made


_FIELDS = dataclasses.fields(Options)
_NAMES = tuple(field.name for field in _FIELDS)
_CHECKS = tuple((field.name, field.metadata["check"]) for field in _FIELDS)
_REFERENCE_ONLY = tuple(
    (field.name, values) for field in _FIELDS if (values := field.metadata["reference_only"])
)
AGREED = tuple(field.name for field in _FIELDS if field.metadata["agreed"])
# Annotations are strings here; the schema's language is torch.library's.
SCHEMA = ", ".join(
    f"{field.type.replace('int | None', 'int?').replace('float | None', 'float?')} {field.name}"
    for field in _FIELDS
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(Options):
    """Options and sizes of one call, in the symbols of docs/design.md section 2.

    ``rows`` M anchors (rows of r1), ``candidates`` N (rows of r2), ``width`` columns of both,
    ``dim`` d columns taken, ``groups`` G column groups whose losses are summed. The positive of
    anchor i is candidate ``row_offset + i``.
    """

    rows: int
    candidates: int
    width: int
    dtype: torch.dtype
    device_type: str
    gathered: bool = False  # columns come from an index tensor, not from the slice [:, :dim]
    labelled: bool = False  # each candidate has a label, and row i of r1 that of its positive
    groups: int = 1
    row_offset: int = 0
    differentiable: bool = False  # a backward pass may follow, so keeping E tiles can pay
    device_index: int | None = None  # of the views' device, None where it has none

    @classmethod
    def of(
        cls,
        options: Options,
        rows: int,
        candidates: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        columns: tuple[int, int] | None,
        labelled: bool,
        differentiable: bool = True,
    ) -> Problem:
        """The record of a call on views of that kind. ``columns`` is their shape (G, d) or None."""
        given = dict(zip(_NAMES, options.values()))
        if columns is not None:
            given["dim"] = columns[1]
        return cls(
            **given,
            rows=rows,
            candidates=candidates,
            width=width,
            dtype=dtype,
            device_type=device.type,
            device_index=device.index,
            gathered=columns is not None,
            labelled=labelled,
            groups=1 if columns is None else columns[0],
            differentiable=differentiable,
        )

    @property
    def ignores(self) -> bool:
        """Whether candidates with the label of an anchor are left out of its sums."""
        return self.labelled and self.same_label == "ignore"

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the loss and, unless another is asked for, of z: fp64 for fp64, else fp32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def statistics_dtype(self) -> torch.dtype:
        """dtype of the per-row statistics: fp64, which costs nothing at O(N) and keeps a log-sum
        of 17 from rounding every weight of its row by 1e-6; fp32 where a device has no fp64."""
        return torch.float32 if self.device_type == "mps" else torch.float64

    def bounded(self, scale: float | Tensor) -> bool:
        """Whether exp(scale * s), |s| <= 1, and its sums stay far inside the exponent range.

        Asked of ``scale = 1 / temperature``, which the host must know. The bound leaves room for
        the reciprocals of the sums times upstream gradients down to 1e-8 before anything turns
        denormal.
        """
        if isinstance(scale, Tensor):
            return False
        limit = 600.0 if self.compute_dtype == torch.float64 else 60.0
        # log(2 N) + scale <= limit, written so that a traced N is compared and not specialised.
        return 2 * max(self.rows, self.candidates) <= math.exp(limit - scale)


class Call(NamedTuple):
    """A checked call: r1 (M, R), r2 (N, R), columns (G, d) int64 or None, a 0-dim temperature or
    None where it is a number, labels (N,) int64 or None, and the options."""

    r1: Tensor
    r2: Tensor
    columns: Tensor | None
    temperature: Tensor | None
    labels: Tensor | None
    options: Options


def checked(r1, r2, columns, temperature, labels, *values) -> Call:
    """The call as the ops take it; raises ``TypeError`` or ``ValueError``, one sentence each.

    ``temperature`` is a number or a tensor. ``values`` are those of :class:`Options` in its order,
    without temperature and autocast.
    """
    compiling = torch.compiler.is_compiling()
    alike = type(r1) is type(r2) is Tensor
    if not alike or compiling or r1.is_neg() or r2.is_neg():
        r1, r2 = unwrapped("r1", r1), unwrapped("r2", r2)
    autocast = _check_views(r1, r2)
    if r1.dtype != r2.dtype:  # under autocast; the conversions bring gradients back
        wide = torch.promote_types(r1.dtype, r2.dtype)
        r1, r2 = r1.to(wide), r2.to(wide)
    index = None if columns is None else _check_index(unwrapped("columns", columns), r1)
    tensor, number = None, temperature
    if isinstance(temperature, Tensor):
        tensor, number = _check_temperature(unwrapped("temperature", temperature), r1), None
    given = r1.shape[1], index is None, tensor is None, number, autocast, *values
    try:
        options = None if compiling else _known(*given)
    except TypeError:  # also of what cannot be hashed, which has a sentence below
        options = None
    options = options or _options(*given)
    if options.negatives != "cross" and r1.shape[0] != r2.shape[0]:
        raise ValueError(
            f"r2: expected {r1.shape[0]} rows like r1 with negatives={options.negatives!r}, "
            f"got {r2.shape[0]}"
        )
    if labels is not None:
        labels = _check_labels(unwrapped("labels", labels), r2, options)
    return Call(r1, r2, index, tensor, labels, options)


def _options(
    width: int, slices: bool, fixed: bool, temperature, autocast: bool, dim, *values
) -> Options:
    """The record of these values, checked. ``slices``: no columns are given; ``fixed``: the
    temperature is no tensor."""
    dim = _check_dim(dim, width) if slices else 0
    given = dict(zip(_NAMES, (dim, temperature, *values, autocast)))
    for name, check in _CHECKS:
        check(name, given[name])
    if fixed:
        if not _is_number(temperature):
            raise TypeError(
                "temperature: expected a positive number or a tensor of one element, "
                f"got {type(temperature).__name__}"
            )
        check_positive("temperature", temperature)
    elif given["negatives"] == "same":
        raise ValueError(
            "temperature: expected a number with negatives='same', which does not use it, "
            "got a tensor"
        )
    given.update(temperature=float(temperature) if fixed else None, eps=float(given["eps"]))
    return Options(**given)


# Most calls ask what an earlier one asked. Types count: True is no 1.
_known = functools.lru_cache(maxsize=256, typed=True)(_options)


# Asked once: torch 2.11 cannot trace the question.
AUTOCAST = frozenset(
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia")
    if torch.amp.is_autocast_available(kind)
)


def _check_views(r1: Tensor, r2: Tensor) -> bool:
    """Whether autocast is on, so that eager PyTorch would round operands: precision "auto"."""
    for name, r in (("r1", r1), ("r2", r2)):
        if not isinstance(r, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(r).__name__}")
        if r.is_nested or r.layout != torch.strided:
            kind = "nested" if r.is_nested else str(r.layout)
            raise TypeError(f"{name}: expected a dense strided tensor, got a {kind} one")
        if r.dtype not in DTYPES:
            raise TypeError(
                f"{name}: expected float16, bfloat16, float32 or float64, got {_name(r.dtype)}"
            )
        if r.dim() != 2:
            raise ValueError(
                f"{name}: expected 2 dimensions (rows, width), got shape {tuple(r.shape)}"
            )
    autocast = r1.device.type in AUTOCAST and torch.is_autocast_enabled(r1.device.type)
    if r1.dtype != r2.dtype and not autocast:
        raise TypeError(f"r2: expected {_name(r1.dtype)} like r1, got {_name(r2.dtype)}")
    if r1.device != r2.device:
        raise ValueError(f"r2: expected device {r1.device} like r1, got {r2.device}")
    if r1.shape[0] == 0 or r1.shape[1] == 0:
        raise ValueError(f"r1: expected at least one row and column, got shape {tuple(r1.shape)}")
    if r2.shape[1] != r1.shape[1]:
        raise ValueError(f"r2: expected width {r1.shape[1]} like r1, got shape {tuple(r2.shape)}")
    if r2.shape[0] < r1.shape[0]:
        raise ValueError(
            f"r2: expected at least {r1.shape[0]} rows, a positive for each row of r1, "
            f"got {r2.shape[0]}"
        )
    # Operands of fp16 are no faster on a CPU, and bf16 would be coarser than what is asked for.
    return autocast and not (r1.is_cpu and torch.get_autocast_dtype("cpu") == torch.float16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_dim(dim, width: int) -> int:
    if dim is None:
        return width
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim: expected an int or None, got {type(dim).__name__}")
    if not 0 < dim <= width:
        raise ValueError(f"dim: expected 1 to {width} (the width of r1) or None, got {dim}")
    return dim


def _check_temperature(temperature: Tensor, r1: Tensor) -> Tensor:
    """The tensor, 0-dim."""
    if temperature.numel() != 1 or not temperature.is_floating_point():
        raise ValueError(
            "temperature: expected a floating-point tensor of one element, got shape "
            f"{tuple(temperature.shape)} of {_name(temperature.dtype)}"
        )
    if temperature.device != r1.device and temperature.device.type != "cpu":
        raise ValueError(
            f"temperature: expected device {r1.device} like r1, or cpu, got {temperature.device}"
        )
    # Its gradient comes back through the reshape, in its own shape.
    return temperature if temperature.dim() == 0 else temperature.reshape(())


def _check_labels(labels, r2: Tensor, options: Options) -> Tensor:
    """(N,) int64 on the device of r2."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor of integers, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected a tensor of integers, got {_name(labels.dtype)}")
    if labels.shape != r2.shape[:1]:
        raise ValueError(
            f"labels: expected shape ({r2.shape[0]},), one for each row of r2, "
            f"got {tuple(labels.shape)}"
        )
    if options.negatives == "same":
        raise ValueError("labels: expected None with negatives='same', got a tensor")
    return labels.to(r2.device, torch.int64)


def index_tensor(columns) -> Tensor:
    """int64 (d,) or (G, d) from a tensor or nested lists of ints; raises what it is not."""
    try:
        index = columns if isinstance(columns, Tensor) else torch.tensor(columns, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"columns: expected an int64 tensor or a list of ints: {error}") from None
    if index.dtype != torch.int64:
        raise TypeError(f"columns: expected int64, got {_name(index.dtype)}")
    if index.dim() not in (1, 2) or index.numel() == 0:
        raise ValueError(
            f"columns: expected shape (d,) or (G, d), not empty, got {tuple(index.shape)}"
        )
    return index


def _check_index(columns, r1: Tensor) -> Tensor:
    """(G, d) index on the device of r1."""
    index = index_tensor(columns)
    # Values are read only where that waits for no device; a compiled call's op reads them.
    if index.is_cpu and not torch.compiler.is_compiling() and not dispatched(index):
        readable("columns", index)
        check_columns(index, r1.shape[1])
        if not r1.is_cpu:
            return _placed(index.reshape(-1, index.shape[-1]), r1.device)
    return index.reshape(-1, index.shape[-1]).contiguous().to(r1.device)


_places: dict[tuple, Tensor] = {}
_captured: dict[tuple, Tensor] = {}  # a CUDA graph reads them whenever it is replayed


def _placed(index: Tensor, device: torch.device) -> Tensor:
    """A copy of an index on the CPU; the same one for the same values, since the host waits for a
    copy and a training run asks for one at every step."""
    key = index.numpy().tobytes(), index.shape, device
    placed = _places.get(key)
    if placed is None:
        if len(_places) >= 64:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # a kernel on another stream may still read one
            _places.clear()
        with torch.inference_mode(False):  # the next call may want gradients
            placed = _places[key] = index.contiguous().to(device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[key] = placed
    return placed


def check_columns(index: Tensor, width: int | None) -> None:
    """Raises ``ValueError`` unless an index on the CPU is in range and names no column twice."""
    ordered = index.sort(-1).values
    low, high = int(ordered[..., 0].min()), int(ordered[..., -1].max())
    if low < 0 or (width is not None and high >= width):
        last = "the width of r1" if width is None else width - 1
        bad = low if low < 0 else high
        raise ValueError(f"columns: expected indices from 0 to {last}, got {bad}")
    repeated = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
    if repeated.numel():
        raise ValueError(
            f"columns: expected each column at most once in a group, got {int(repeated[0])} twice"
        )
