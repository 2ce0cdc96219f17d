"""The architecture, read off the source: which package imports from which."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rpo_jax

PACKAGE = Path(rpo_jax.__file__).parent
ARCHITECTURE = PACKAGE.parent / "docs" / "architecture.md"

# Lowest first. A package imports from lower levels only, never from one beside it; docs/architecture.md has
# the same table.
LEVELS = (
    ("core",),
    ("objectives", "data", "tasks"),
    ("config",),
    ("models", "hosts"),
    ("runs",),
    ("sampling",),
    ("training",),
    ("tools",),
    ("train", "prepare", "generate", "judge", "export", "plan", "doctor", "report", "compare", "sample", "cli"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
COMMANDS = LEVELS[-1]
MAX_COMMAND_LINES = 110
ACCELERATED = {"jax", "jaxlib", "flax", "optax", "orbax"}
HEAVY = {"torch", "transformers", "sentence_transformers", "datasets"}
FILES = {"pathlib", "os", "io", "json", "yaml", "tempfile", "shutil", "gzip", "pickle"}

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything that a file imports anywhere, functions and type checking included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def used_packages(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_modules(path) if name.startswith("rpo_jax.")}


def imported_packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(path)}


def loaded_after(modules: list[str]) -> set[str]:
    """Top-level packages in a fresh interpreter that imported these modules."""
    code = f"import sys, {', '.join(modules)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(done.stdout.split())


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", SOURCES, ids=dotted)
def test_a_module_imports_from_lower_levels_only(path):
    package, used = package_of(path), used_packages(path) - {package_of(path)}
    assert package in LEVEL, f"give {package} its level in LEVELS"
    unknown = used - set(LEVEL) - {"Config", "RunResult", "__version__", "load_config", "run"}
    assert not unknown, f"{path} imports {unknown}"
    wrong = {other for other in used if LEVEL.get(other, -1) >= LEVEL[package]}
    assert not wrong, f"{path} imports {wrong}, which are not below it"


def test_nothing_but_packages_and_commands_is_at_the_top():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set(COMMANDS)
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == set(LEVEL) - set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_thin(name):
    lines = len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_COMMAND_LINES, "arguments, one call, what is printed and the exit status; no more"


def test_the_documentation_shows_the_same_architecture():
    section = ARCHITECTURE.read_text(encoding="utf-8").partition("## Packages")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:4] for line in section.splitlines() if re.match(r"\| *\d", line)]
    shown = {int(level): tuple(re.findall(r"`(\w+)/?`", names)) for level, names, _ in rows}
    assert shown == dict(enumerate(LEVELS, start=1))


def test_the_package_itself_imports_nothing_at_once():
    loaded = loaded_after(["rpo_jax"])
    assert not loaded & (ACCELERATED | HEAVY | {"numpy"})


def test_data_is_numpy_only():
    for path in (source for source in SOURCES if package_of(source) == "data"):
        assert not imported_packages(path) & ACCELERATED, path
    loaded = loaded_after([dotted(path) for path in SOURCES if package_of(path) == "data"])
    assert "numpy" in loaded
    assert not loaded & (ACCELERATED | HEAVY)


# Pallas: JAX's kernel for TPUs, and its language for GPUs, in which ours are written.
@pytest.mark.parametrize("private", ["jax._src", "jax.experimental.pallas.ops", "jax.experimental.pallas.triton"])
def test_what_jax_may_change_at_any_time_is_used_in_one_file(private):
    users = [path for path in SOURCES if any(name.startswith(private) for name in imported_modules(path))]
    assert len(users) == 1, f"{private} is used by {users}; the one file is where a new version of jax is met"


def test_objectives_know_neither_configuration_nor_files():
    for path in (source for source in SOURCES if package_of(source) == "objectives"):
        assert used_packages(path) <= {"objectives", "core"}, path
        assert not imported_packages(path) & FILES, path
        calls = {node.func.id for node in ast.walk(ast.parse(path.read_text())) if _is_plain_call(node)}
        assert "open" not in calls, path


def _is_plain_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def test_importing_the_commands_loads_no_heavy_library():
    loaded = loaded_after([dotted(path) for path in SOURCES])
    assert "jax" in loaded
    assert not loaded & HEAVY


def test_hints_name_packages_that_can_be_installed():
    """This package is installed from a checkout; the extras of one that is not published cannot be had by its name."""
    for path in SOURCES:
        assert "rpo-jax[" not in path.read_text(encoding="utf-8"), path


def test_what_is_imported_is_declared():
    """Directly, not by way of what some other package happens to need; extras count for what they are for."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    homes = metadata.packages_distributions()
    imported = set().union(*(imported_packages(path) for path in SOURCES)) - sys.stdlib_module_names - {"rpo_jax"}
    missing = {
        name for name in imported if not declared & {canonicalize_name(home) for home in homes.get(name, [name])}
    }
    assert not missing
