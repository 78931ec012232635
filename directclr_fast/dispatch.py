"""Which backend runs a call: one walk, and the reasons of those that cannot.

A backend is the ``BACKEND`` of its module. Automatic choice takes the first of :data:`PRIORITY`
without a reason against it; one named by the caller runs, or fails with its reasons.
"""

from __future__ import annotations

import importlib
from functools import cache

from .backends.base import Backend
from .problem import PRIORITY, Problem

_last: str | None = None


@cache
def load(name: str) -> Backend:
    """The backend called ``name``; its module is imported when first asked for."""
    module = "torch_blocked" if name == "torch" else name
    return importlib.import_module(f".backends.{module}", __package__).BACKEND


def choose(problem: Problem) -> Problem:
    """``problem`` with the name of the backend that runs it in place of "auto".

    Raises ``NotImplementedError`` with the reasons where the named backend, or every one, cannot.
    """
    asked = problem.backend
    reasons = []
    for name in PRIORITY if asked == "auto" else (asked,):
        backend = load(name)
        against = backend.why_not(problem)
        if not against and asked == "auto":
            against = [reason] if (reason := backend.why_not_unasked(problem)) else []
        if not against:
            return problem.replace(backend=name)
        reasons += [f"{name}: {reason}" for reason in against]
    which = "no backend can run" if asked == "auto" else f"backend {asked!r} cannot run"
    raise NotImplementedError(f"{which} this call ({describe(problem)}): " + "; ".join(reasons))


def describe(problem: Problem) -> str:
    """The call in one line, for messages."""
    return (
        f"{problem.rows} x {problem.candidates} rows, {problem.dim} of {problem.width} columns, "
        f"{str(problem.dtype).removeprefix('torch.')} on {problem.device_type}, "
        f"negatives={problem.negatives!r}, precision={problem.precision!r}"
    )


def note(name: str) -> None:
    """Records that backend ``name`` ran a forward pass."""
    global _last
    _last = name


def last_backend() -> str | None:
    """Name of the backend that ran the last forward pass of this process, None before the first."""
    return _last
