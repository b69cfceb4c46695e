"""Limits of the layout. Who may import whom is a contract of import-linter (pyproject.toml, ``make lint``)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "torchvision", "torchmetrics", "lightning", "monai"}
FILES = sorted(p for room in ("src", "data_modules") for p in (ROOT / room).rglob("*.py"))
TORCH_FREE = [
    *("weakmedsam.errors", "weakmedsam.contracts", "weakmedsam.config_diff", "weakmedsam.__main__"),
    *("weakmedsam.backbones.weights", "weakmedsam.backbones.download", "weakmedsam.sce.config"),
    *(
        f"data_modules.{name}"
        for name in (
            *(
                "store",
                "splits",
                "cases",
                "config",
                "volumes",
                "resampling",
                "store_index",
                "prepare",
                "phantom_drawing",
            ),
            *(
                "scan_io",
                "scan_files",
                "folder_files",
                "label_tables",
                "survey",
                "survey_classes",
                "survey_layout",
                "formats.read",
                "findings",
            ),
            *("nifti_files", "sources", "tables", "case_tables", "wholeness"),
        )
    ),
    *(
        f"weakmedsam.{room}.{path.stem}"
        for room in ("system", "run", "report", "study")
        for path in sorted((ROOT / "src/weakmedsam" / room).glob("[a-z]*.py"))
    ),
]

LOADED = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
    found = set(sys.argv[1].split()) & set(sys.modules)
    assert not found, f"{name} loads {found}"
"""


def load(*modules: str) -> subprocess.CompletedProcess[str]:
    """Import modules one after another in a process of their own; fails at the first that loads torch or its kin."""
    return subprocess.run(
        [sys.executable, "-c", LOADED, " ".join(HEAVY), *modules], capture_output=True, text=True, check=False
    )


def test_commands_that_only_look_or_prepare_load_no_torch() -> None:
    done = load(*TORCH_FREE)
    assert done.returncode == 0, done.stderr


def test_a_module_that_loads_torch_is_found() -> None:
    assert "weakmedsam.geometry loads {'torch'}" in load("weakmedsam.geometry").stderr


def test_the_top_of_the_package_is_small() -> None:
    assert len(list((ROOT / "src/weakmedsam").glob("[a-z]*.py"))) <= 12


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many arguments a function takes, without ``self``."""
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_take_ten_arguments_at_most(path: Path) -> None:
    assert [node.name for node in functions(path) if arguments(node) > 10] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_absolute(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"line {node.lineno}"
