"""Prepares what a GPU machine without a compiler and a network needs, in one folder.

    python bench/gpu_kit.py build/gpu-kit [--arch sm_90]

The folder holds ``env.sh`` (to be sourced in the checkout there), the Hopper extension built for
this Python, a cache of Triton kernels compiled by this Triton, and the peers of the benchmark, so
this Python and Triton have to be that machine's. A part that cannot be made is left out, and said;
then it is made or missed there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from directclr_fast.machine import commit

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("memeff==0.3.1", "inf_cl==1.2.1")
ENV = """# source build/gpu-kit/env.sh, in the folder of the checkout
kit=$PWD/{folder}
cp $kit/_cuda*.so directclr_fast/ 2> /dev/null
[ -e directclr_fast/kernels ] || ln -s ../kernels directclr_fast/kernels
export PYTHONPATH=$PWD:$kit/peers PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 DIRECTCLR_COMMIT={commit}
export TRITON_CACHE_DIR=$kit/triton
[ "$({digest})" = {made_from} ] || echo "kit: made from other sources than these; make it again"
sed -i "s|{placeholder}|$kit/triton|g" $kit/triton/*/__grp__*.json 2> /dev/null
echo "kit: $(ls $kit/triton 2> /dev/null | wc -l) kernels cached"
"""


# Triton's cache names its files by their whole paths, which differ there.
PLACEHOLDER = "@TRITON@"
# Of all that is compiled or imported there, as the shell makes it in both places.
DIGEST = """cat $(find csrc kernels directclr_fast -name '*.py' -o -name '*.cu*' -o -name '*.h' \\
-o -name '*.cpp' | LC_ALL=C sort) | sha256sum | cut -c1-16"""


def output(*command: str | Path, **how) -> str:
    """What a command prints; OSError with its last line where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **how)
    if done.returncode:
        raise OSError((done.stderr or done.stdout).strip().splitlines()[-1])
    return done.stdout.strip()


def extension(folder: Path) -> str:
    """The compiled module, built as an installation builds it."""
    output(sys.executable, ROOT / "csrc/build.py", folder / "build", "cuda")
    (module,) = (folder / "build").glob("_cuda*.so")
    shutil.copy(module, folder)
    shutil.rmtree(folder / "build")
    return module.name


def kernels(folder: Path, arch: str) -> str:
    """A Triton cache; compiled in a process of its own, where kernels are not interpreted."""
    gate = ROOT / "tests/gates/triton_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = (sys.executable, gate, "--fill", folder / "triton", "--arch", arch)
    made = output(*command, env=environment)
    for path in (folder / "triton").rglob("*"):  # what only a reader wants, and locks
        if path.suffix in (".ttir", ".ttgir", ".llir", ".ptx", ".source", ".lock"):
            path.unlink()
    for path in (folder / "triton").glob("*/__grp__*.json"):
        path.write_text(path.read_text().replace(str(folder / "triton"), PLACEHOLDER))
    return made


def peers(folder: Path) -> str:
    """The benchmark's peers, unpacked: they are pure Python."""
    wheels = folder / "wheels"
    download = (sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check")
    output(*download, "--no-deps", "-d", wheels, *PEERS)
    for wheel in (found := list(wheels.glob("*.whl"))):
        zipfile.ZipFile(wheel).extractall(folder / "peers")
    if len(found) < len(PEERS):
        raise OSError(f"expected wheels of {', '.join(PEERS)}, got {len(found)}")
    shutil.rmtree(wheels)
    return ", ".join(PEERS)


def main() -> int:
    """Makes every part; 1 if one is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="sm_90")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    place = {"folder": os.path.relpath(folder, ROOT), "placeholder": PLACEHOLDER, "digest": DIGEST}
    place["made_from"] = output("bash", "-c", DIGEST)
    (folder / "env.sh").write_text(ENV.format(commit=commit().get("commit", "unknown"), **place))
    missing = 0
    parts = {
        "extension": lambda: extension(folder),
        "kernels": lambda: kernels(folder, arguments.arch),
        "peers": lambda: peers(folder),
    }
    for name, make in parts.items():
        begin = time.monotonic()
        try:
            said = make()
        except (OSError, ValueError) as error:
            missing, said = 1, f"left out, {error}"
        print(f"{name}: {said} ({time.monotonic() - begin:.0f} s)", flush=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB")
    return missing


if __name__ == "__main__":
    sys.exit(main())
