"""The house rules: who may import what, and what an installed package must hold."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hqsearch

PACKAGE = Path(hqsearch.__file__).parent
ROOT = PACKAGE.parent
ROOMS = ("embedding", "assignment", "search")
DOORS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
# Packages beside the standard library: those a room may import with its modules, and when it needs them.
AT_ONCE = {"assignment": {"numpy", "scipy", "numba"}, "search": {"numpy", "numba", "llvmlite"}}
WHEN_NEEDED = {"assignment": {"networkx", "joblib", "ortools"}, "search": {"joblib", "faiss"}}
# Modules that any room may use; they use the standard library alone.
COMMON = {"hqsearch.threads"}


def imports_of(path):
    """Absolute name of each module that a file imports, and whether importing the file imports it."""
    package = ["hqsearch", *path.relative_to(PACKAGE).parts[:-1]]

    def below(node, at_once):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                yield ".".join([*base, *([child.module] if child.module else [])]), at_once
            else:
                typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                later = typing or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from below(child, at_once and not later)

    yield from below(ast.parse(path.read_text(encoding="utf-8")), True)


def imported_modules(path):
    """Absolute names of all modules that a file imports, anywhere in it."""
    return [module for module, _ in imports_of(path)]


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


@pytest.mark.parametrize("room", sorted(AT_ONCE))
def test_a_room_imports_only_what_the_design_allows_it_and_extras_only_when_needed(room):
    found = {(module, at_once) for path in files_of(room) for module, at_once in imports_of(path)}
    own = {module for module, _ in found if f"{module}.".startswith(f"hqsearch.{room}.")}
    others = {(module.split(".")[0], at_once) for module, at_once in found if module not in own | COMMON}
    others = {(name, at_once) for name, at_once in others if name not in sys.stdlib_module_names}
    assert {name for name, at_once in others if at_once} <= AT_ONCE[room]
    assert {name for name, _ in others} <= AT_ONCE[room] | WHEN_NEEDED[room]


@pytest.mark.parametrize("module", sorted(COMMON))
def test_what_the_rooms_share_uses_the_standard_library_alone(module):
    path = PACKAGE.parent / f"{module.replace('.', '/')}.py"
    assert {name.split(".")[0] for name in imported_modules(path)} <= sys.stdlib_module_names


@pytest.mark.parametrize("room", DOORS)
def test_nobody_reaches_past_a_rooms_door(room):
    for path in files_of("."):
        if room in path.relative_to(PACKAGE).parts:
            continue
        for module in imported_modules(path):
            assert not module.startswith(f"hqsearch.{room}."), (path, module)


@pytest.mark.parametrize("room", DOORS)
def test_every_door_lists_its_names_in_order(room):
    module = __import__(f"hqsearch.{room}", fromlist=["__all__"])
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_importing_the_package_leaves_heavy_packages_out():
    heavy = ["torch", "numba", "networkx", "matplotlib", "ortools", "safetensors"]
    doors = ", ".join(f"hqsearch.{room}" for room in DOORS if room != "embedding")
    code = f"import sys, hqsearch, hqsearch.metrics, {doors};print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_wheel_holds_exactly_the_sources_and_imports_from_an_empty_folder(tmp_path):
    # Built from a copy: a build leaves a folder behind, and packages what an earlier one left there.
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "hqsearch", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--no-index", "--wheel-dir", str(tmp_path), str(source)),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("hqsearch-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        packaged = sorted(name for name in archive.namelist() if name.endswith(".py"))
    assert packaged == sorted(path.relative_to(ROOT).as_posix() for path in files_of("."))
    assert (site / "hqsearch" / "py.typed").exists()
    modules = [name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in packaged]
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
