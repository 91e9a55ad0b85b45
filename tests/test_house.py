"""The house keeps its form: what lies where, lines that fit, one statement a line, imports that go one
way."""
import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = "*.py", "support/*.py", "tests/*.py", "exercises/**/*.py"
FILES = sorted(p.relative_to(ROOT) for place in PLACES for p in ROOT.glob(place))
MODULES = {p.with_suffix("").as_posix().replace("/", "."): p for p in FILES
           if p.parts[0] not in ("tests", "exercises")}
MOST_LINES = {"diwa.py": 1200, "calvin_sim.py": 500, "data.py": 400}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_lines_fit(path):
    lines = (ROOT / path).read_text().splitlines()
    assert not [f"{path}:{i}" for i, line in enumerate(lines, 1) if len(line) > 110]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_one_statement_a_line(path):
    tree = ast.parse((ROOT / path).read_text())
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    lone = [node for node in statements if isinstance(node, ast.Expr)]
    assert not [f"{path}:{node.lineno}" for node in lone if isinstance(node.value, ast.Tuple)]
    simple = [node.lineno for node in statements if not hasattr(node, "body")]
    assert not [f"{path}:{line}" for line in simple if simple.count(line) > 1]


def project_imports(body):
    """The project's own modules that these statements import."""
    found = set()
    for node in body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


def test_imports_go_one_way():
    """No circle, and none hidden inside a function; the commands of calvin_sim.py and data.py import under
    their main guard."""
    trees = {name: ast.parse((ROOT / path).read_text()) for name, path in MODULES.items()}
    for name, tree in trees.items():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        late = {other for f in functions for other in project_imports(ast.walk(f))}
        assert not late, f"{name} imports {late} inside a function"
    wants = {name: project_imports(tree.body) for name, tree in trees.items()}
    while wants:
        free = {name for name, others in wants.items() if not others & set(wants)}
        assert free, f"these import each other in a circle: {sorted(wants)}"
        wants = {name: others for name, others in wants.items() if name not in free}
    imported = [project_imports(tree.body) for tree in trees.values()]
    assert not any("diwa" in names for names in imported), "nothing imports the method"


@pytest.mark.parametrize("name", MOST_LINES)
def test_sizes(name):
    assert len((ROOT / name).read_text().splitlines()) <= MOST_LINES[name]


def test_the_top_level_is_what_was_ordered():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert top == {
        "diwa.py", "calvin_sim.py", "data.py", "README.md", "requirements.txt", "tests", "support", "docs",
        "exercises",
        ".ci", ".gitignore",
    }


@pytest.mark.parametrize("path", FILES, ids=str)
def test_names_of_our_modules_exist(path):
    """`module.name` and `from module import name` of the project's own modules: a function that was moved or
    renamed leaves no caller behind, not even in programs that no test runs."""
    sys.path.insert(0, str(ROOT))
    tree = ast.parse((ROOT / path).read_text())
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    modules[alias.asname or alias.name] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in MODULES:
                    name = f"{node.module}.{alias.name}"
                    modules[alias.asname or alias.name] = importlib.import_module(name)
                elif node.module in MODULES:
                    assert hasattr(importlib.import_module(node.module), alias.name), f"{path}:{node.lineno}"
    stored = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]
    bound = {node.id for node in stored if isinstance(node, ast.Name)}     # a local name may hide a module
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        name = node.value.id
        if name in modules and name not in bound and isinstance(node.ctx, ast.Load):
            assert hasattr(modules[name], node.attr), f"{path}:{node.lineno}: {name}.{node.attr}"
