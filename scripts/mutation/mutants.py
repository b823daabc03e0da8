"""Wrong versions of the library's source files, each of which differs from it in one place.

What is mutated is arithmetic. Checks of arguments, messages of errors, annotations, axes, indices
and sizes stay as they are, and so does a number that only stands in where nobody reads it, like
the 1 of ``x / jnp.where(x > 0, x, 1)``.
"""

import ast
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from syntax import definitions, is_text, last, of_sizes, parts

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jaxrl_reason"
HANDFUL = 4
"""Mutants of a function, unless it admits more kinds than that."""

FLIPPED = {ast.Add: ("+", "-"), ast.Sub: ("-", "+")}
SCALED = {ast.Mult: ("*", "/"), ast.Div: ("/", "*")}
COMPARED = {
    ast.Lt: ("<", ">="),
    ast.GtE: (">=", "<"),
    ast.Gt: (">", "<="),
    ast.LtE: ("<=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
}
EXTREMA = {
    "minimum": "maximum",
    "min": "max",
    "argmin": "argmax",
    "cummin": "cummax",
    "reduce_min": "reduce_max",
}
EXTREMA |= {high: low for low, high in EXTREMA.items()}

SIZED_CALLS = {
    *("reshape", "broadcast_to", "zeros", "ones", "arange", "eye", "moveaxis", "swapaxes", "range"),
    *("expand_dims", "squeeze", "transpose", "tile", "pad", "product", "tuple", "one_hot", "full"),
    *("broadcasted_iota", "isinstance", "split", "dynamic_slice_in_dim", "take_along_axis"),
}
"""Calls whose numbers are shapes and axes; those of other calls are only so after the first."""
REDUCTIONS = {
    *("sum", "mean", "max", "min", "all", "any", "prod", "cumsum", "argmax", "argmin", "stack"),
    *("concatenate", "flip", "roll", "logsumexp", "softmax", "log_softmax", "sort", "argsort"),
}
UNDEFINED_AT_ZERO = {"log", "sqrt", "rsqrt", "reciprocal", "divide"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One edit of one file."""

    module: str
    """Of the package, as in `losses.policy`."""
    function: str
    """The function, the method as in `WeightedMean.mean`, or the constant of the module."""
    kind: str
    """The operator of mutation."""
    before: str
    """The expression around the edit, on one line."""
    after: str
    """The same in the mutant."""
    line: int
    start: int
    """First byte of the file that is replaced."""
    end: int
    text: str
    """What stands there instead."""

    @property
    def name(self) -> str:
        """Where and what, in one line."""
        return f"{self.module}:{self.function} | {self.kind} | {self.before} => {self.after}"

    @property
    def rank(self) -> str:
        """A fixed order that has nothing to do with that in the file."""
        return hashlib.sha256(f"{self.name}{self.start}".encode()).hexdigest()

    def apply(self, source: str) -> str:
        """The file with the edit."""
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.end :]).decode()


def modules() -> list[str]:
    """The modules that are mutated."""
    single = ["arrays", "advantages", "logprobs"]
    folders = [
        f"{folder}.{file.stem}"
        for folder in ("losses", "objectives")
        for file in sorted((PACKAGE / folder).glob("*.py"))
        if file.stem != "__init__"
    ]
    return single + folders


def path_of(module: str) -> Path:
    """The file of a module, relative to the package."""
    return Path(*module.split(".")).with_suffix(".py")


def mutants_of(module: str, *, every: bool = False) -> list[Mutant]:
    """A handful of mutants for each function of a module, or all that there are."""
    sites = sites_of(module, (PACKAGE / path_of(module)).read_text())
    if every:
        return sites
    chosen = []
    for _, group in itertools.groupby(sites, key=lambda mutant: mutant.function):
        chosen += _handful(list(group))
    return sorted(chosen, key=lambda mutant: (mutant.start, mutant.kind))


def sites_of(module: str, source: str) -> list[Mutant]:
    """All mutants of a source file."""
    return list(_Sites(module, source).all())


def _handful(sites: list[Mutant]) -> list[Mutant]:
    """One of each kind, then second ones of each kind, and so on up to a handful."""
    kinds: dict[str, list[Mutant]] = {}
    for mutant in sorted(sites, key=lambda mutant: mutant.rank):
        kinds.setdefault(mutant.kind, []).append(mutant)
    rounds = itertools.zip_longest(*(kinds[kind] for kind in sorted(kinds)))
    ordered = [mutant for mutant in itertools.chain(*rounds) if mutant is not None]
    return ordered[: max(HANDFUL, len(kinds))]


class _Sites:
    """Finds all places of a file where a mutation applies."""

    def __init__(self, module: str, source: str):
        self.module = module
        self.data = source.encode()
        self.tree = ast.parse(source)
        lines = self.data.split(b"\n")
        self.starts = list(itertools.accumulate((len(line) + 1 for line in lines), initial=0))
        self.parents = {
            child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)
        }

    def all(self) -> Iterator[Mutant]:
        found = list(definitions(self.tree))
        read = {last(part) for _, node in found for part in parts(node)}
        for name, node in found:
            # A constant that only checks of arguments read is part of these checks.
            if isinstance(node, ast.FunctionDef) or name in read or not name.isupper():
                self.function = name
                for part in parts(node):
                    yield from self.here(part)

    def here(self, node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, (ast.BinOp, ast.AugAssign)):
            yield from self.arithmetic(node)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            if not self.sized(node):
                start, _ = self.span(node)
                yield self.edit("sign", node, start, start + 1, "")
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from self.comparison(node)
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield from self.constant(node)
        elif isinstance(node, ast.Call):
            yield from self.called(node)
        elif last(node) == "stop_gradient" and not self.is_called(node):
            yield self.edit("detach", node, *self.span(node), "(lambda tree: tree)")

    def arithmetic(self, node) -> Iterator[Mutant]:
        left, right = (
            (node.target, node.value)
            if isinstance(node, ast.AugAssign)
            else (node.left, node.right)
        )
        operator = type(node.op)
        if any(
            isinstance(side, (ast.List, ast.Tuple, ast.JoinedStr)) or is_text(side)
            for side in (left, right)
        ):
            return
        if operator in FLIPPED and not (of_sizes(left) or of_sizes(right) or self.sized(node)):
            yield self.swap_operator("sign", node, left, right, *FLIPPED[operator])
            if operator is ast.Sub and isinstance(node, ast.BinOp):
                swapped = f"(({self.text(right)}) - ({self.text(left)}))"
                yield self.edit("operands", node, *self.span(node), swapped)
        if operator in SCALED and not self.sized(node):
            yield self.swap_operator("scale", node, left, right, *SCALED[operator])

    def comparison(self, node: ast.Compare) -> Iterator[Mutant]:
        left, operator, right = node.left, type(node.ops[0]), node.comparators[0]
        if operator in COMPARED and not any(is_text(x) or of_sizes(x) for x in (left, right)):
            yield self.swap_operator("comparison", node, left, right, *COMPARED[operator])

    def constant(self, node: ast.Constant) -> Iterator[Mutant]:
        if self.sized(node) or self.stands_in(node) or any(map(of_sizes, self.siblings(node))):
            return
        value = node.value
        text = str(value + 1) if isinstance(value, int) else repr(2 * value or 1.0)
        yield self.edit("constant", self.around(node), *self.span(node), text)

    def called(self, node: ast.Call) -> Iterator[Mutant]:
        name = last(node.func)
        if name == "stop_gradient" and len(node.args) == 1:
            yield self.edit("detach", node, *self.span(node), f"({self.text(node.args[0])})")
        elif name == "where" and len(node.args) == 3:
            yield self.swap_arguments("branch", node, *node.args[1:])
        elif name == "clip":
            bounds = [*node.args[1:], *(word.value for word in node.keywords)]
            if len(bounds) == 2:
                yield self.swap_arguments("extremum", node, *bounds)
        elif name in EXTREMA:
            _, end = self.span(node.func)
            yield self.edit("extremum", node, end - len(name), end, EXTREMA[name])
        elif name == "accumulate" and last(node.func.value) in EXTREMA:
            inner = last(node.func.value)
            _, end = self.span(node.func.value)
            yield self.edit("extremum", node, end - len(inner), end, EXTREMA[inner])

    def swap_operator(self, kind, node, left, right, old, new) -> Mutant:
        begin, stop = self.span(left)[1], self.span(right)[0]
        place = begin + self.data[begin:stop].index(old.encode())
        return self.edit(kind, node, place, place + len(old), new)

    def swap_arguments(self, kind, node, first, second) -> Mutant:
        (a, b), (c, d) = self.span(first), self.span(second)
        text = self.data[c:d] + self.data[b:c] + self.data[a:b]
        return self.edit(kind, node, a, d, text.decode())

    def edit(self, kind, around, start, end, text) -> Mutant:
        begin, stop = self.span(around)
        begin, stop = min(begin, start), max(stop, end)
        before = self.data[begin:stop].decode()
        after = (self.data[begin:start] + text.encode() + self.data[end:stop]).decode()
        line = self.data[:start].count(b"\n") + 1
        flat = [" ".join(x.split()) for x in (before, after)]
        return Mutant(self.module, self.function, kind, *flat, line, start, end, text)

    def span(self, node) -> tuple[int, int]:
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def text(self, node) -> str:
        start, end = self.span(node)
        return self.data[start:end].decode()

    def is_called(self, node) -> bool:
        above = self.parents.get(node)
        return isinstance(above, ast.Call) and above.func is node

    def around(self, node) -> ast.AST:
        """The expression of a number; of a default, the argument that it is the default of."""
        above = self.parents[node]
        if isinstance(above, ast.arguments):
            named = [*above.args, *above.kwonlyargs]
            return max((x for x in named if self.span(x)[0] < self.span(node)[0]), key=self.span)
        return above if hasattr(above, "lineno") else node

    def siblings(self, node) -> list[ast.AST]:
        above = self.parents[node]
        binary = isinstance(above, (ast.BinOp, ast.Compare))
        return [other for other in ast.iter_child_nodes(above) if other is not node] * binary

    def sized(self, node) -> bool:
        """Whether a number is a shape or an axis by where it stands as an argument."""
        while isinstance(
            above := self.parents.get(node), (ast.UnaryOp, ast.Tuple, ast.List, ast.Starred)
        ):
            node = above
        if not isinstance(above, ast.Call) or node is above.func:
            return False
        name = last(above.func)
        return name in SIZED_CALLS or (name in REDUCTIONS and node in above.args[1:])

    def stands_in(self, node) -> bool:
        """Whether a number replaces what is not read, to keep a quotient or a logarithm finite."""
        where = self.parents[node]
        is_where = isinstance(where, ast.Call) and last(where.func) == "where"
        if not is_where or node.value not in (0, 1):
            return False
        while isinstance(above := self.parents[where], ast.BinOp):
            if isinstance(above.op, ast.Div) and above.right is where:
                return True
            where = above
        return isinstance(above, ast.Call) and last(above.func) in UNDEFINED_AT_ZERO
