"""Which functions can show a change of another one, by who reads whose name."""

import ast
import collections
import functools

from mutants import PACKAGE, modules, path_of

Definition = tuple[str, str]
"""Module and name."""


def reached(module: str, function: str) -> set[str]:
    """Names of all definitions that use one of a module, directly or not, and its own."""
    start = (module, function.split(".")[0])
    found, waiting = {start}, [start]
    while waiting:
        for user in users()[waiting.pop()]:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return {name for _, name in found}


@functools.cache
def users() -> dict[Definition, set[Definition]]:
    """For each definition those that read it."""
    found: dict[Definition, set[Definition]] = collections.defaultdict(set)
    for module in modules():
        tree = ast.parse((PACKAGE / path_of(module)).read_text())
        defined, origins = {}, {}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxrl_reason."):
                home = node.module.removeprefix("jaxrl_reason.")
                origins |= {alias.asname or alias.name: (home, alias.name) for alias in node.names}
            defined |= dict.fromkeys(_names(node), node)
        origins |= {name: (module, name) for name in defined}
        # A call as a statement, such as f.defvjp(forward, backward), belongs to its first name.
        calls = [
            (_read(node)[0], node)
            for node in tree.body
            if isinstance(node, ast.Expr) and _read(node)
        ]
        for name, node in [*defined.items(), *calls]:
            for inner in _read(node):
                if inner in origins:
                    found[origins[inner]].add((module, name))
    return found


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    return [ast.unparse(node.target)] if isinstance(node, ast.AnnAssign) else []


def _read(node: ast.AST) -> list[str]:
    return [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)]
