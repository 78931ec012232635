"""The build backend: setuptools', with CUTLASS's headers among the requirements where the Hopper
kernels are built (build_cuda.py)."""

import importlib.util
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

_spec = importlib.util.spec_from_file_location(
    "directclr_fast_build_cuda", Path(__file__).with_name("build_cuda.py")
)
_cuda = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_cuda)


def _with_headers(requirements):
    needed = _cuda.wanted() and _cuda.cutlass() is None
    return [*requirements, _cuda.CUTLASS] if needed else requirements


def get_requires_for_build_wheel(config_settings=None):
    return _with_headers(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_headers(build_meta.get_requires_for_build_editable(config_settings))
