"""fingerprint.py: which code made a result?

A stage is a function; what it calls, and what that calls, is found by reading the source (ast), without
running it.  Each function, class and constant on the way gets a checksum that comments, docstrings and
layout do not change.  A class counts as a whole.  Only the method counts (METHOD below): a change of how
results are stored or printed makes nothing anew.
"""
import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHOD = ("diwa", "calvin_sim", "data", "support.calvin_real", "support.evaluate", "support.expert",
          "support.linear", "support.online", "support.tabletop_model")
# of those passed on the way, but not counted
COUNTED = ("cast_once", "cosine_lr", "cut_recording", "first_seed", "half_precision", "has_bfloat16",
           "held_out", "in_half", "seed_everything")
PASSED = ("support.record", "support.runs", "support.report", "support.interactions", "support.files",
          "support.presets")


@functools.lru_cache(maxsize=None)
def definitions():
    """All top-level functions, classes and constants of the project.

    -> {(module, name): (checksum, set of (module, name) that it mentions)}"""
    found = {}
    for module in METHOD + PASSED:
        path = ROOT / (module.replace(".", "/") + ".py")
        found.update(definitions_in(module, path.read_text(encoding="utf-8")))
    return found


@functools.lru_cache(maxsize=None)
def definitions_in(module, source):
    """The same of one module, from its text."""
    tree = ast.parse(source)
    known = {}                                              # name here -> (module, name), or (module, None)
    nodes = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                origin = (whole, None) if whole in METHOD + PASSED else (node.module, alias.name)
                known[alias.asname or alias.name] = origin
        elif isinstance(node, ast.Import):
            known.update({alias.asname or alias.name: (alias.name, None) for alias in node.names})
    for node in tree.body:
        for name in names_of(node):
            known[name] = module, name
            nodes[name] = node
    return {(module, name): (checksum(node), mentions(node, known)) for name, node in nodes.items()}


def names_of(node):
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def checksum(node):
    """Of what a statement does: its syntax tree without docstrings; comments and layout are not in it."""
    return hashlib.sha256(repr(("Module", ("body", (plain(node),)))).encode()).hexdigest()[:10]


def plain(node):
    """A syntax tree as nested tuples, without docstrings and without what is empty: newer Pythons add empty
    fields to it."""
    if isinstance(node, list):
        return tuple(plain(part) for part in node)
    if not isinstance(node, ast.AST):
        return node
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:] or [ast.Pass()]
    return (type(node).__name__, *((name, plain(value)) for name, value in fields.items()))


def mentions(node, known):
    """The (module, name) that a statement mentions, by name or as an attribute of an imported module."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in known and known[part.id][1] is not None:
            found.add(known[part.id])
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            module, name = known.get(part.value.id, (None, ""))
            if name is None:
                found.add((module, part.attr))
    return found


@functools.lru_cache(maxsize=None)
def code_of(stage):
    """The code that the function stage_<stage> reaches -> {"module.name": checksum}"""
    table = definitions()
    todo = [key for key in table if key[1] == f"stage_{stage}"]
    seen = set(todo)
    reached = {}
    while todo:
        module, name = key = todo.pop()
        number, mentioned = table[key]
        if module in METHOD or name in COUNTED:
            reached[f"{module}.{name}"] = number
        fresh = {other for other in mentioned if other in table} - seen
        seen |= fresh
        todo += fresh
    return dict(sorted(reached.items()))
