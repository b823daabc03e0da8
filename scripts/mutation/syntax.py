"""Which parts of a source file compute, and what they are."""

import ast
from collections.abc import Iterator

SIZE_KEYWORDS = {"axis", "axes", "keepdims", "in_axes", "out_axes", "dtype", "length", "unroll"}


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Functions, methods and constants of a module that are no checks of arguments."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner
        elif isinstance(node, ast.FunctionDef) and not checks(node.name):
            yield node.name, node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            yield ast.unparse(target), node.value


def parts(node: ast.AST) -> Iterator[ast.AST]:
    """A node and everything in it that computes."""
    yield node
    for child in children(node):
        yield from parts(child)


def children(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node that compute."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)):
        return
    if isinstance(node, ast.Call) and checks(last(node.func)):
        return
    if isinstance(node, ast.FunctionDef):
        yield from (x for x in (*node.args.defaults, *node.args.kw_defaults) if x is not None)
        yield from node.body
    elif isinstance(node, ast.Lambda):
        yield node.body
    elif isinstance(node, ast.AnnAssign):
        yield from filter(None, [node.value])
    elif isinstance(node, ast.Subscript):
        yield node.value
    elif isinstance(node, ast.If) and all(isinstance(x, ast.Raise) for x in node.body):
        yield from node.orelse
    elif isinstance(node, ast.keyword):
        if node.arg not in SIZE_KEYWORDS:
            yield node.value
    else:
        yield from ast.iter_child_nodes(node)


def last(node: ast.AST) -> str:
    """The last part of a dotted name."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def checks(name: str) -> bool:
    """Whether a function of this name only checks arguments."""
    return name.lstrip("_").startswith("check_")


def is_text(node: ast.AST) -> bool:
    """Whether an expression is a string."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def of_sizes(node: ast.AST) -> bool:
    """Whether an expression reads the shape of an array or the length of a list."""
    sizes = {"shape", "ndim", "size"}
    return any(
        (isinstance(inner, ast.Attribute) and inner.attr in sizes) or last(inner) == "len"
        for inner in ast.walk(node)
    )
