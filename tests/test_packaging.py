"""What is installed is what the source tree holds, and every public name says what it is."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import types
import zipfile
from pathlib import Path

import pytest

import jaxcache

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_files():
    """Every module of the package by its installed path, as the working tree has it."""
    places = {"jaxcache": ROOT / "jaxcache", "jaxcache/kernels": ROOT / "kernels"}
    return {
        f"{name}/{file.relative_to(place).as_posix()}"
        for name, place in places.items()
        for file in place.rglob("*.py")  # does not follow the link jaxcache/kernels
        if "__pycache__" not in file.parts and "kernels" not in file.relative_to(place).parts
    }


def build(kind, source, into):
    """Build with the backend that pip calls, without a build environment of its own."""
    code = f"from setuptools import build_meta as b; b.build_{kind}({str(into)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist's path and that of a wheel built from the unpacked sdist."""
    tmp = tmp_path_factory.mktemp("packaging")
    tree, unpacked, dist = tmp / "tree", tmp / "unpacked", tmp / "dist"
    tree.mkdir()
    dist.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("jaxcache", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    build("sdist", tree, dist)
    [sdist] = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(unpacked, filter="data")
    [top] = unpacked.iterdir()
    build("wheel", top, dist)
    [wheel] = dist.glob("*.whl")
    return sdist, wheel


def test_wheel_holds_the_package_and_nothing_else(built):
    _, wheel = built
    names = set(zipfile.ZipFile(wheel).namelist())
    # A top-level `kernels` would overwrite the package of that name in site-packages.
    tops = {name.split("/")[0] for name in names}
    assert tops == {"jaxcache", f"jaxcache-{PROJECT['project']['version']}.dist-info"}
    assert {name for name in names if name.endswith(".py")} == package_files()
    assert "jaxcache/kernels/__init__.py" in names
    assert "jaxcache/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)


def test_sdist_holds_the_sources(built):
    sdist, _ = built
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {name.removeprefix("jaxcache/") if "/kernels/" in name else name for name in package_files()}
    assert sources <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "jaxcache/py.typed"} <= names


def test_a_bare_checkout_finds_the_kernels():
    link = ROOT / "jaxcache" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"


def test_kernels_know_nothing_of_the_rest():
    for file in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{file.name}:{node.lineno} reaches above kernels/"
                imported = [] if node.level else [node.module]
            else:
                continue
            for name in imported:
                assert name.split(".")[0] not in {"jaxcache", "kernels"}, (
                    f"{file.name}:{node.lineno} imports {name}: relative imports inside kernels/, nothing of jaxcache"
                )


def test_version():
    if hasattr(jaxcache, "__version__"):
        assert jaxcache.__version__ == PROJECT["project"]["version"]
    assert f"## [{PROJECT['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text()


# ---- public names --------------------------------------------------------------------------------


def own_doc(obj):
    """The docstring somebody wrote for `obj`, not one inherited or generated."""
    if inspect.isclass(obj):
        doc = vars(obj).get("__doc__") or ""
        return "" if doc.startswith(f"{obj.__name__}(") else doc  # dataclasses, named tuples
    doc = getattr(obj, "__doc__", None) or ""
    return "" if doc == type(obj).__doc__ else doc


def undocumented(name, obj):
    """`name` and the public methods and properties below it that have no docstring."""
    missing = [] if own_doc(obj).strip() else [name]
    if inspect.isclass(obj):
        for attribute, member in vars(obj).items():
            member = getattr(member, "__func__", member)  # static and class methods
            described = inspect.isroutine(member) or isinstance(member, property)
            if attribute.startswith("_") or not described:
                continue
            if not own_doc(member).strip():
                missing.append(f"{name}.{attribute}")
    return missing


def test_all_lists_the_public_names_once():
    assert len(set(jaxcache.__all__)) == len(jaxcache.__all__)
    public = {
        name
        for name, value in vars(jaxcache).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public <= set(jaxcache.__all__), "public in jaxcache but not in its __all__"


@pytest.mark.parametrize("name", [n for n in jaxcache.__all__ if not n.startswith("__")])
def test_every_public_name_has_a_docstring(name):
    missing = undocumented(f"jaxcache.{name}", getattr(jaxcache, name))
    assert not missing, f"no docstring: {', '.join(missing)}"


def test_a_missing_docstring_is_found():
    from dataclasses import dataclass
    from typing import NamedTuple

    @dataclass
    class Generated:
        x: int

    class Fields(NamedTuple):
        x: int

    class Child(dict):
        """Documented."""

        def bare(self):
            pass

        @property
        def plain(self):
            return 1

        @classmethod
        def make(cls):
            """Documented."""

    assert undocumented("Generated", Generated) == ["Generated"]
    assert undocumented("Fields", Fields)[0] == "Fields"
    assert undocumented("Child", Child) == ["Child.bare", "Child.plain"]
    assert undocumented("three", 3) == ["three"]
    assert undocumented("f", lambda: None) == ["f"]
    assert undocumented("len", len) == []


# ---- README --------------------------------------------------------------------------------------


def fences(text, language):
    """(first line, code) of every fenced block of that language."""
    pattern = rf"^( *)```{language}\b[^\n]*\n(.*?)^\1```"
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        yield text[: match.start(2)].count("\n") + 1, textwrap.dedent(match[2])


def test_readme_python_compiles():
    for line, code in fences((ROOT / "README.md").read_text(), "python"):
        compile("\n" * (line - 1) + code, "README.md", "exec")


def test_readme_has_one_test_command_for_ci():
    blocks = re.findall(r"^ *```.*?\n(.*?)^ *```", (ROOT / "README.md").read_text(), re.M | re.S)
    commands = [row for block in blocks for row in block.splitlines() if "/pytest" in row]
    assert len(commands) == 1, commands
