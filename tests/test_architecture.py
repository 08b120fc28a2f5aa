"""The house rules: who may import what, and what an installed package must hold."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hqsearch

PACKAGE = Path(hqsearch.__file__).parent
ROOT = PACKAGE.parent
ROOMS = ("embedding", "assignment", "search")


def imported_modules(path):
    """Absolute names of all modules that a file imports, anywhere in it."""
    package = ["hqsearch", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


def files_of(folder):
    return sorted((PACKAGE / folder).rglob("*.py"))


def test_only_the_embedding_room_imports_torch():
    guilty = [
        str(path)
        for path in files_of(".")
        if "embedding" not in path.parts and any(m.split(".")[0] == "torch" for m in imported_modules(path))
    ]
    assert guilty == []


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_do_not_import_each_other(room):
    others = [f"hqsearch.{other}" for other in ROOMS if other != room]
    for path in files_of(room):
        for module in imported_modules(path):
            assert not any(module == o or module.startswith(f"{o}.") for o in others), (path, module)


@pytest.mark.parametrize("room", [*ROOMS, "display"])
def test_nobody_reaches_past_a_rooms_door(room):
    for path in files_of("."):
        if room in path.relative_to(PACKAGE).parts:
            continue
        for module in imported_modules(path):
            assert not module.startswith(f"hqsearch.{room}."), (path, module)


@pytest.mark.parametrize("room", [*ROOMS, "display"])
def test_every_door_lists_its_names_in_order(room):
    module = __import__(f"hqsearch.{room}", fromlist=["__all__"])
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_importing_the_package_leaves_heavy_packages_out():
    heavy = ["torch", "numba", "networkx", "matplotlib", "ortools", "safetensors"]
    code = (
        "import sys, hqsearch, hqsearch.assignment, hqsearch.search, hqsearch.metrics, hqsearch.display;"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_wheel_holds_every_module_and_imports_from_an_empty_folder(tmp_path):
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--no-index", "--wheel-dir", str(tmp_path), str(ROOT)),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("hqsearch-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "hqsearch" / "py.typed").exists()
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in files_of(".")
    ]
    # The checkout is not on the path there, so what imports comes from the wheel.
    code = (
        f"import sys; sys.path[:0] = [{str(site)!r}]; import importlib;"
        f"[importlib.import_module(m) for m in {modules!r}];"
        "import hqsearch; print(hqsearch.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(site))
