"""Triton's interpreter in half its time."""

import contextlib
import dataclasses
import types
from unittest import mock


@contextlib.contextmanager
def quicker():
    """Prepares ``triton.language`` once, and computes no check of integers.

    The interpreter prepares it at every call of every function. It forms int64 sums and conditions
    of all integers for an assertion that it makes in debugging only.
    """
    from triton.runtime import interpreter

    scopes = {}
    patch = interpreter._patch_lang
    builder = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=False)

    def patch_once(function):
        if function.__module__ not in scopes:
            scopes[function.__module__] = patch(function)
        return types.SimpleNamespace(restore=lambda: None)

    with (
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(builder, "options", options),
    ):
        try:
            yield
        finally:
            for scope in reversed(scopes.values()):
                scope.restore()
