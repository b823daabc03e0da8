"""What a compiled program costs, read from its optimised HLO, with loops as often as they run.

XLA's own `cost_analysis` counts the body of a loop once, and a model is a loop over its layers.
Where a loop ends as the data has it, the code says how often it turns, by the name of a scope
around it: `at_most_n`, or `evenly_n` if so often with tokens spread evenly over experts. Read here
are matrix products, the bytes that each instruction moves between memory and the cores, and what
chips send each other. Arithmetic outside of matrix products is left out: on the chips that matter
it hides behind the bytes it works on.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxrl_reason.planner.hlo_text import (
    NAME,
    Computation,
    Instruction,
    Shape,
    bytes_in_memory,
    parse_program,
)

_CALLED = re.compile(r"(?:calls|to_apply|called_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%([\w.\-]+))"
)
_KNOWN = re.compile(r'"?known_trip_count"?\s*:\s*\{"?n"?\s*:\s*"?(\d+)"?')
_AS_TOLD = re.compile(r'(?:at_most|evenly)_(\d+)\)*/while"')
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
    "domain",
)
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """What one collective instruction sends in one execution."""

    kind: str
    bytes: float
    """That a chip sends, by the best algorithm for a ring."""
    group: tuple[int, ...]
    """The chips of one of its groups, as numbers of the program's devices."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Per chip, of one execution."""

    flops: float = 0.0
    """Of matrix products, a multiplication with its addition as two."""
    memory_bytes: float = 0.0
    """Moved between main memory and cores."""
    collectives: Mapping[Collective, float] = dataclasses.field(default_factory=dict)
    """How often which collective is executed."""
    endless: tuple[str, ...] = ()
    """Loops whose number of turns is not in the program; they are counted once."""
    kernels: tuple[str, ...] = ()
    """Where custom kernels come from: names of scopes and functions. Bytes of their operands and
    results are counted, and no products."""

    def __add__(self, other: "Cost") -> "Cost":
        collectives = dict(self.collectives)
        for collective, times in other.collectives.items():
            collectives[collective] = collectives.get(collective, 0.0) + times
        return Cost(
            self.flops + other.flops,
            self.memory_bytes + other.memory_bytes,
            collectives,
            (*self.endless, *other.endless),
            (*self.kernels, *other.kernels),
        )

    def times(self, turns: float) -> "Cost":
        """Of so many executions."""
        return dataclasses.replace(
            self,
            flops=turns * self.flops,
            memory_bytes=turns * self.memory_bytes,
            collectives={c: turns * n for c, n in self.collectives.items()},
        )

    @property
    def collective_bytes(self) -> float:
        """Sent by a chip."""
        return sum(c.bytes * n for c, n in self.collectives.items())


class _Number(NamedTuple):
    value: int
    growth: int = 1
    """In each turn of the loop whose state it is a part of."""


def program_cost(text: str) -> Cost:
    """What one execution of a compiled program costs a chip.

    Args:
        text: of the optimised module, as `jax.stages.Compiled.as_text` gives it.

    Raises:
        ValueError: the text has no entry computation.
    """
    return _Program(text).cost()


class _Program:
    def __init__(self, text: str):
        self._computations, self._entry = parse_program(text)
        partitions = re.search(r"num_partitions=(\d+)", text)
        self._devices = int(partitions[1]) if partitions else 1
        self._known: dict[str, Cost] = {}

    def cost(self) -> Cost:
        return self._of(self._entry)

    def _of(self, name: str) -> Cost:
        if name not in self._known:
            computation = self._computations[name]
            total = Cost()
            for instruction in computation:
                total += self._instruction(computation, instruction)
            self._known[name] = total
        return self._known[name]

    def _instruction(self, computation: Computation, one: Instruction) -> Cost:
        opcode = one.opcode.removesuffix("-start")
        if one.opcode in _FREE or one.opcode.endswith("-done") or one.opcode == "async-update":
            return Cost()
        if opcode == "while":
            return self._loop(computation, one)
        if opcode == "conditional":
            return max(
                (self._of(name) for name in _branches(one)), key=lambda c: (c.flops, c.memory_bytes)
            )
        if opcode == "call" or one.opcode == "async-start":
            return sum((self._of(name) for name in _CALLED.findall(one.rest)), Cost())
        if opcode in _COLLECTIVES:
            moved = self._operands(computation, one) + bytes_in_memory(_results(computation, one))
            return Cost(memory_bytes=moved, collectives={self._collective(computation, one): 1.0})
        if opcode == "fusion":
            inner = self._inside(_CALLED.findall(one.rest))
            return inner + Cost(memory_bytes=self._fused_bytes(computation, one))
        if opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', one.rest)
            if target is not None and target[1] == "AllocateBuffer":
                return Cost()
            moved = self._operands(computation, one) + one.bytes
            name = re.search(r'op_name="([^"]*)"', one.rest)
            return Cost(memory_bytes=moved, kernels=(name[1] if name else one.name,))
        moved = _moved(computation, one) if opcode != "copy" else None
        if moved is None:
            written = one.shapes[:1] if one.opcode == "copy-start" else one.shapes
            moved = self._operands(computation, one) + bytes_in_memory(written)
        return Cost(flops=_flops(computation, one), memory_bytes=moved)

    def _inside(self, names: Sequence[str]) -> Cost:
        """Of fused computations: products and collectives, but no bytes of their own."""
        total = Cost()
        for name in names:
            computation = self._computations[name]
            for one in computation:
                opcode = one.opcode.removesuffix("-start")
                if opcode in _COLLECTIVES:
                    total += Cost(collectives={self._collective(computation, one): 1.0})
                elif opcode == "fusion":
                    total += self._inside(_CALLED.findall(one.rest))
                else:
                    total += Cost(flops=_flops(computation, one))
        return total

    def _operands(self, computation: Computation, one: Instruction) -> float:
        found = (computation.by_name.get(name) for name in one.operands)
        return sum(i.bytes for i in found if i is not None)

    # Fusions

    def _fused_bytes(self, computation: Computation, one: Instruction) -> float:
        (name,) = _CALLED.findall(one.rest)
        inner = self._computations[name]
        total = self._written(inner, inner.root, one.shapes)
        for number, operand in enumerate(one.operands):
            outer = computation.by_name.get(operand)
            if outer is None or not bytes_in_memory(outer.shapes):
                continue
            read = self._read(inner, inner.parameters[number])
            total += outer.bytes if read is None else min(outer.bytes, read)
        return total

    def _read(self, inner: Computation, name: str) -> float | None:
        """Bytes of a parameter that a fused computation reads; None: all."""
        if name == inner.root.name:
            return None
        total = 0.0
        for user in inner.users(name):
            if user.opcode in ("bitcast", "reshape"):
                read = self._read(inner, user.name)
            elif user.opcode == "fusion":
                read = self._read_nested(inner, user, name)
            elif user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
                read = sum(shape.bytes for shape in user.shapes)
            elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
                read = 0.0
            else:
                read = None
            if read is None:
                return None
            total += read
        return total

    def _read_nested(self, inner: Computation, user: Instruction, name: str) -> float | None:
        (called,) = _CALLED.findall(user.rest)
        nested = self._computations[called]
        parameters = [
            nested.parameters[n] for n, given in enumerate(user.operands) if given == name
        ]
        if parameters == [nested.before_bitcasts(nested.root)]:  # read by who uses the fusion
            return self._read(inner, user.name)
        parts = [self._read(nested, parameter) for parameter in parameters]
        return None if None in parts else sum(part for part in parts if part is not None)

    def _written(self, inner: Computation, root: Instruction, shapes: Sequence[Shape]) -> float:
        if root.opcode == "tuple":
            parts = [inner.by_name[name] for name in root.operands]
            pairs = zip(parts, shapes, strict=True)
            return sum(self._written(inner, part, [shape]) for part, shape in pairs)
        if not any(shape.is_in_memory for shape in shapes):
            return 0.0
        if root.opcode in ("bitcast", "reshape"):
            before = inner.operand(root, 0)
            return (
                bytes_in_memory(shapes) if before is None else self._written(inner, before, shapes)
            )
        if root.opcode == "fusion":
            (called,) = _CALLED.findall(root.rest)
            return self._written(
                self._computations[called], self._computations[called].root, shapes
            )
        if root.opcode in ("dynamic-update-slice", "scatter"):
            update = inner.operand(root, 1 if root.opcode == "dynamic-update-slice" else 2)
            if update is not None:
                return sum(shape.bytes for shape in update.shapes)
        return bytes_in_memory(shapes)

    # Loops

    def _loop(self, computation: Computation, one: Instruction) -> Cost:
        names = dict(re.findall(r"\b(condition|body)=%([\w.\-]+)", one.rest))
        body = self._of(names["body"])
        known = _KNOWN.search(one.rest)
        known = known or _AS_TOLD.search(one.rest)
        turns = int(known[1]) if known else self._turns(computation, one, **names)
        if turns is None:
            return body + Cost(endless=(one.name,))
        return body.times(turns)

    def _turns(
        self, computation: Computation, one: Instruction, condition: str, body: str
    ) -> int | None:
        """How often a loop runs whose counter grows from a constant to another, evenly."""

        def begin(index: int) -> _Number | None:
            value = self._number(computation, one.operands[0], index)
            return None if value is None else _Number(value, self._growth(body, index))

        inner = self._computations[condition]
        return self._bound(inner, inner.root, begin, {})

    def _growth(self, body: str, index: int) -> int:
        """By how much an element of a loop's state grows in a turn; 1 where that cannot be read."""
        inner = self._computations[body]
        if inner.root.opcode != "tuple":
            return 1
        one = inner.by_name[inner.root.operands[index]]
        if one.opcode != "add":
            return 1
        parts = [inner.before_copies(name) for name in one.operands]
        grows = any(p.opcode == "get-tuple-element" and p.index() == index for p in parts)
        by = [_integer(part) for part in parts if part.opcode == "constant"]
        return max(by[0] or 1, 1) if grows and by else 1

    def _bound(self, inner: Computation, root: Instruction, begin, given) -> int | None:
        """Most turns that a condition allows; of an `and`, by the part that is known.

        Args:
            inner: the computation of `root`.
            root: what is tested.
            begin: number of an element of the loop's state to its first value, if it is known.
            given: values of the parameters of `inner`, where it is fused, by name.
        """
        if root.opcode == "fusion":
            (called,) = _CALLED.findall(root.rest)
            fused = self._computations[called]
            given = {
                fused.parameters[n]: self._value(inner, name, begin, given)
                for n, name in enumerate(root.operands)
            }
            return self._bound(fused, fused.root, begin, given)
        if root.opcode == "and":
            parts = [inner.by_name[name] for name in root.operands]
            bounds = [self._bound(inner, part, begin, given) for part in parts]
            return min((bound for bound in bounds if bound is not None), default=None)
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        low, high = (self._value(inner, name, begin, given) for name in root.operands)
        if low is None or high is None:
            return None
        return max(math.ceil((high.value - low.value) / low.growth), 0)

    def _value(self, inner: Computation, name: str, begin, given) -> _Number | None:
        one = inner.by_name[name]
        if one.opcode in ("copy", "bitcast", "convert"):
            return self._value(inner, one.operands[0], begin, given)
        if one.opcode == "get-tuple-element":
            return begin(one.index())
        if one.opcode == "parameter":
            return given.get(name)
        value = _integer(one) if one.opcode == "constant" else None
        return None if value is None else _Number(value)

    def _number(self, computation: Computation, name: str, index: int | None) -> int | None:
        """The constant that an element of a tuple is, if it is one."""
        one = computation.by_name.get(name)
        if one is None:
            return None
        if one.opcode == "tuple" and index is not None:
            return self._number(computation, one.operands[index], None)
        if one.opcode in ("copy", "bitcast", "convert", "opt-barrier"):
            return self._number(computation, one.operands[0], index)
        return _integer(one) if one.opcode == "constant" and index is None else None

    # Collectives

    def _collective(self, computation: Computation, one: Instruction) -> Collective:
        kind = one.opcode.removesuffix("-start")
        operands = [computation.by_name[name] for name in one.operands]
        whole = sum(shape.bytes for operand in operands for shape in operand.shapes)
        if kind == "collective-permute":
            return Collective(kind, whole, _pair(one.rest))
        group = _group(one.rest, self._devices)
        n = len(group)
        if kind == "all-gather":  # the operand is a part
            sent = whole * (n - 1)
        elif kind == "all-reduce":
            sent = 2 * whole * (n - 1) / n
        else:
            sent = whole * (n - 1) / n
        return Collective(kind, sent, group)


def _results(computation: Computation, one: Instruction) -> Sequence[Shape]:
    """What a collective writes: some that have begun name what they read as well, before it."""
    if one.opcode not in ("all-gather-start", "collective-permute-start"):
        return one.shapes
    operands = (computation.by_name.get(name) for name in one.operands)
    return one.shapes[sum(len(i.shapes) for i in operands if i is not None) :]


def _branches(one: Instruction) -> list[str]:
    names: list[str] = []
    for many, single in _BRANCHES.findall(one.rest):
        names += NAME.findall(many) if many else [single]
    return names


def _integer(one: Instruction) -> int | None:
    return int(one.inside) if re.fullmatch(r"-?\d+", one.inside) else None


def _moved(computation: Computation, one: Instruction) -> float | None:
    """Bytes of instructions that touch a part of an operand; None for all others."""
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * one.bytes
    if one.opcode == "slice-start":  # of an operand, a slice of it and a context
        source, part = one.shapes[:2]
        return part.bytes * (source.is_in_memory + part.is_in_memory)
    if one.opcode in ("dynamic-update-slice", "scatter"):
        update = computation.operand(one, 1 if one.opcode == "dynamic-update-slice" else 2)
        return None if update is None else 2 * update.bytes
    return None


def _flops(computation: Computation, one: Instruction) -> float:
    if one.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (computation.by_name[name].shapes[0] for name in one.operands[:2])
    (out,) = one.shapes
    if one.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        contracted = [left.dims[int(axis)] for axis in axes[1].split(",") if axis] if axes else []
        return 2.0 * math.prod(out.dims) * math.prod(contracted)
    return _convolution_flops(left.dims, right.dims, out.dims, one.rest)


def _convolution_flops(
    left: Sequence[int], right: Sequence[int], out: Sequence[int], rest: str
) -> float:
    """Only products that meet an element are counted: padding and dilation hold batches apart."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    assert labels is not None, rest
    window = re.search(r"window=\{([^}]*)\}", rest)
    values = dict(pair.split("=") for pair in window[1].split()) if window else {}
    batches = re.search(r"batch_group_count=(\d+)", rest)
    spatial = sorted(label for label in labels[1] if label.isdigit())

    def read(key: str, default: int) -> list[int]:
        written = values.get(key)
        if not written:
            return [default] * len(spatial)
        return [int(part.split("_")[0]) for part in written.split("x")]

    size, stride, pads = read("size", 1), read("stride", 1), read("pad", 0)
    left_dilate, right_dilate = read("lhs_dilate", 1), read("rhs_dilate", 1)
    # The input features of a kernel are those of one group already.
    total = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")]
    total *= right[labels[2].index("i")]
    if batches is not None:
        total /= int(batches[1])
    for axis, label in enumerate(spatial):
        reach = left[labels[1].index(label)]
        places = 0
        for o in range(out[labels[3].index(label)]):
            for k in range(size[axis]):
                at = o * stride[axis] + k * right_dilate[axis] - pads[axis]
                places += at % left_dilate[axis] == 0 and 0 <= at // left_dilate[axis] < reach
        total *= places
    return total


def _pair(rest: str) -> tuple[int, ...]:
    pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
    return (int(pair[1]), int(pair[2])) if pair else ()


def _group(rest: str, devices: int) -> tuple[int, ...]:
    """The first group of chips that a collective joins."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed is not None:
        return tuple(int(n) for n in listed[1].split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota is not None:
        sizes = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else list(range(len(sizes)))
        return tuple(_transposed(sizes, order)[: int(iota[2])])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
    if mesh is not None:
        pairs = (part.split("=") for part in mesh[1].split(","))
        sizes = {name.strip("' "): int(size) for name, size in pairs}
        names, group = list(sizes), [0]
        for name in (part.strip("' ") for part in mesh[2].split(",")):
            stride = math.prod([sizes[after] for after in names[names.index(name) + 1 :]])
            group = [g + i * stride for g in group for i in range(sizes[name])]
        return tuple(group)
    return tuple(range(devices))


def _transposed(sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    numbers = [0]
    for axis in order:
        numbers = [n + i * strides[axis] for n in numbers for i in range(sizes[axis])]
    return numbers
