"""The house stays one a stranger finds his way in: small files, small functions, doors in place."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py")) + sorted((ROOT / "bench").glob("*.py"))
NATIVE = sorted(p for p in (ROOT / "src").rglob("*") if p.suffix in (".cpp", ".h"))
MOST_LINES, MOST_IN_A_FUNCTION, MOST_ARGUMENTS = 500, 60, 12


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*SOURCES, *NATIVE], ids=name)
def test_no_file_is_too_long_to_read(path):
    assert path.read_text(encoding="utf-8").count("\n") <= MOST_LINES


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_function_is_too_long_or_takes_too_much(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_IN_A_FUNCTION, f"{node.name} has {lines} lines"
            count = len(node.args.args) + len(node.args.kwonlyargs)
            assert count <= MOST_ARGUMENTS or "cli" in path.parts, f"{node.name} takes {count}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_the_command_line_and_the_benches_use_what_a_folder_exports(path):
    if "cli" not in path.parts and "bench" not in path.parts:
        pytest.skip("a module of the library")
    folders = {p.name for p in (ROOT / "src/skimlm").iterdir() if p.is_dir()} - {"cli"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("skimlm."):
            first, *inside = node.module.split(".")[1:]
            assert first not in folders or not inside, f"line {node.lineno}: {node.module}"
