"""Packages by name, so that ``kernels/`` installs as ``directclr_fast.kernels`` and nothing else.

The compiled extension is described in ``csrc/build.py`` and is optional: where it cannot be built
the installation still succeeds and ``directclr-fast doctor`` says what is missing.
"""

import importlib.util
from pathlib import Path

from setuptools import setup

options = {}
recipe = Path(__file__).parent / "csrc" / "build.py"
if recipe.exists():
    spec = importlib.util.spec_from_file_location("directclr_fast_build", recipe)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    options = {"ext_modules": build.extensions(), "cmdclass": {"build_ext": build.BuildExt}}

setup(
    packages=[
        "directclr_fast",
        "directclr_fast.adapters",
        "directclr_fast.backends",
        "directclr_fast.bench",
        "directclr_fast.kernels",
        "directclr_fast.paper",
        "directclr_fast.train",
    ],
    package_dir={"directclr_fast": "directclr_fast", "directclr_fast.kernels": "kernels"},
    package_data={"directclr_fast": ["py.typed"]},
    include_package_data=False,
    **options,
)
