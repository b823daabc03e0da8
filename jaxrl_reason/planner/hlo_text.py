"""The text of a compiled program: computations, their instructions, and the shapes of arrays."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
NAME = re.compile(r"%([\w.\-]+)")
_TILE = re.compile(r"T\(([\d,*]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of a program: what it holds, how, and in which memory."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> float:
        """Bytes with the padding of its tiles."""
        return math.prod(self._padded()) * bits_of(self.dtype) / 8

    @property
    def is_in_memory(self) -> bool:
        """Whether it lies in the chip's main memory, not in a core's."""
        space = _SPACE.search(self.layout)
        return space is None or space[1] == "0"

    def _padded(self) -> list[int]:
        sizes, tile = list(self.dims), _TILE.search(self.layout)
        if tile is None or "*" in tile[1] or not sizes:
            return sizes
        order = [int(axis) for axis in self.layout.split(":")[0].split(",") if axis]
        for axis, size in zip(order, reversed([int(n) for n in tile[1].split(",")]), strict=False):
            sizes[axis] = -(-sizes[axis] // size) * size
        return sizes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    inside: str
    """What stands between the parentheses."""
    rest: str
    """Attributes."""
    is_root: bool

    @property
    def bytes(self) -> float:
        """Of its results in the chip's main memory."""
        return bytes_in_memory(self.shapes)

    def index(self) -> int:
        """Of a `get-tuple-element`."""
        found = re.search(r"\bindex=(\d+)", self.rest)
        assert found is not None, self.name
        return int(found[1])


class Computation:
    """Instructions in the order in which they are written."""

    def __init__(self, instructions: Sequence[Instruction]):
        self.by_name = {i.name: i for i in instructions}
        self.root = next((i for i in instructions if i.is_root), instructions[-1])
        self.parameters = {int(i.inside): i.name for i in instructions if i.opcode == "parameter"}

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.by_name.values())

    def users(self, name: str) -> list[Instruction]:
        """The instructions that read what an instruction makes."""
        return self._users.get(name, [])

    @functools.cached_property
    def _users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    def operand(self, instruction: Instruction, number: int) -> Instruction | None:
        """The instruction that makes an operand, if this computation has it."""
        return self.by_name.get(instruction.operands[number])

    def before_copies(self, name: str) -> Instruction:
        """What an instruction copies, or itself."""
        one = self.by_name[name]
        return self.before_copies(one.operands[0]) if one.opcode == "copy" else one

    def before_bitcasts(self, one: Instruction) -> str:
        """The name of what an instruction is another view of, or its own."""
        while one.opcode in ("bitcast", "reshape"):
            one = self.by_name[one.operands[0]]
        return one.name


def bits_of(dtype: str) -> int:
    """Bits of one element of an HLO type such as `bf16`."""
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    assert digits is not None, dtype
    return int(digits[0])


def parse_program(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the first one.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    lines: list[str] = []
    entry, name = None, None
    for line in text.splitlines():
        if name is None:
            head = re.match(r"(ENTRY )?%([\w.\-]+) \(", line)
            if head is not None and line.endswith("{"):
                name, lines = head[2], []
                entry = name if head[1] else entry
        elif line == "}" or line.startswith("}, "):  # , execution_thread="sparsecore"
            computations[name], name = Computation([_read_line(line) for line in lines]), None
        elif re.match(r"  (?:ROOT )?%\S+ = ", line):
            lines.append(line)
        elif lines:  # attributes of a kernel may go on for lines
            lines[-1] += line
    if entry is None:
        raise ValueError("the text of the program has no entry computation")
    return computations, entry


def _read_line(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    kind, call = right[:end], right[end:].lstrip()
    opened = call.index("(")
    closed = _closing(call, opened)
    inside = call[opened + 1 : closed]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        shapes=tuple(_shapes(kind)),
        opcode=call[:opened],
        operands=tuple(NAME.findall(inside)),
        inside=inside,
        rest=call[closed + 1 :],
        is_root=left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"a parenthesis is not closed in {text[start : start + 80]!r}")


def _shapes(kind: str) -> Iterator[Shape]:
    for dtype, dims, layout in _SHAPE.findall(kind):
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        yield Shape(dtype, sizes, layout)


def bytes_in_memory(shapes: Sequence[Shape]) -> float:
    """Of those arrays that lie in the chip's main memory."""
    return sum(shape.bytes for shape in shapes if shape.is_in_memory)
