"""What an installation promises: a light import, the layout, and links that lead somewhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_import_loads_neither_torch_nor_triton():
    loaded = run(
        "import sys, directclr_fast; print([m for m in ('torch', 'triton', 'numpy') "
        "if m in sys.modules])"
    )
    assert loaded == "[]"


def test_loss_loads_no_triton_and_no_trainer_and_opens_no_cuda_context():
    loaded = run(
        "import sys, torch; before = set(sys.modules); from directclr_fast import DirectCLRLoss; "
        "new = set(sys.modules) - before; print(torch.cuda.is_initialized(), "
        "[m for m in new if m.startswith(('triton', 'torchvision', 'torch._dynamo', "
        "'directclr_fast.train'))])"
    )
    assert loaded == "False []"


def test_public_names():
    import directclr_fast

    for name in directclr_fast.__all__:
        assert getattr(directclr_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = directclr_fast.no_such_name


def test_kernels_are_installed_under_the_package():
    import directclr_fast.kernels

    assert Path(directclr_fast.kernels.__file__).name == "__init__.py"


def test_every_folder_of_python_code_is_a_listed_package():
    listed = re.findall(r'^\s+"(directclr_fast[.\w]*)",$', (ROOT / "setup.py").read_text(), re.M)
    folders = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for base in ("directclr_fast", "kernels")
        for path in (ROOT / base).rglob("*.py")
    }
    assert {re.sub(r"^kernels", "directclr_fast.kernels", name) for name in folders} == set(listed)


def test_extras_and_versions_are_as_documented():
    text = (ROOT / "pyproject.toml").read_text()
    for extra in ("train", "plot", "test", "bench", "docs", "all"):
        assert re.search(rf"^{extra} = \[", text, re.M), extra
    torch = re.search(r'"torch>=([\d.]+)"', text)[1]
    assert (ROOT / f"constraints/torch-{torch}.0.txt").exists() and "torch<" not in text
    assert 'requires-python = ">=3.10"' in text


@pytest.mark.parametrize(
    "name",
    [
        "README.md", "docs/design.md", "docs/paper.md", "docs/scaling.md", "docs/testing.md",
        "docs/triton-kernels.md", "bench/README.md",
        "csrc/README.md", "csrc/cuda/README.md", "kernels/README.md",
    ],
)  # fmt: skip
def test_links_resolve(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not link.startswith(("http://", "https://")):
            assert (page.parent / link).exists(), link


def test_no_module_imports_upwards():
    """In the order of docs/design.md, section 4."""
    order = re.search(r"^    (cli >.*?)\n\n", (ROOT / "docs/design.md").read_text(), re.M | re.S)[1]
    floors = ["__main__", *re.split(r"\s*>\s*", order), "__init__"]
    package = ROOT / "directclr_fast"
    rooms = {p.stem for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms <= set(floors)
    for path in [*package.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        place = path.relative_to(package if package in path.parents else ROOT).with_suffix("").parts
        if place == ("__init__",):  # the public names, loaded on first use
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == len(place):
                named = [node.module] if node.module else [alias.name for alias in node.names]
                for other in {name.split(".")[0] for name in named} & set(floors):
                    below = floors.index(other) - floors.index(place[0])
                    assert below > 0 or below == 0 and len(place) > 1, (path.name, other)


@pytest.mark.xdist_group("together")
def test_groups_of_tests_stay_together(request):
    """pytest-xdist writes the group into the name; otherwise dear fixtures are made twice."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("pytest runs without --dist loadgroup")
    assert request.node.nodeid.endswith("@together")


def test_what_is_promised_has_run():
    """README, pyproject.toml and CI name the versions of docs/testing.md's table, and no others."""
    table = (ROOT / "docs/testing.md").read_text().partition("## Where all of it has run")[2]
    rows = re.findall(r"^\| `make test[^|]*` \| (3\.\d+) \| (\d\.\d+)", table, re.M)
    pythons = sorted({python for python, _ in rows}, key=lambda v: int(v[2:]))
    torches = sorted({torch for _, torch in rows}, key=lambda v: int(v[2:]))
    project, readme = (ROOT / "pyproject.toml").read_text(), (ROOT / "README.md").read_text()
    assert re.findall(r"Python :: (3\.\d+)", project) == pythons
    assert f'requires-python = ">={pythons[0]}"' in project
    assert f'"torch>={torches[0]}"' in project
    assert f"Python {pythons[0]} to {pythons[-1]}" in readme
    assert f"PyTorch {torches[0]} to {torches[-1]}" in readme
    assert f"oldest={torches[0]}." in (ROOT / ".ci/run").read_text()


def test_one_version_of_ruff():
    pinned = re.search(r"ruff==([\d.]+)", (ROOT / "pyproject.toml").read_text())[1]
    assert f"rev: v{pinned} " in (ROOT / ".pre-commit-config.yaml").read_text()


def test_every_mutation_has_its_line():
    """tests/mutations.py is run now and then; what a change makes of its lines shows at once."""
    counts = {m.name: (ROOT / m.file).read_text().count(m.old) for m in MUTATIONS}
    assert {name: count for name, count in counts.items() if count != 1} == {}
