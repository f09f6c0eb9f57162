"""Which products of 32 bits reach an address: 2^31 elements are fewer than a large tensor has.

Positions and sizes along one axis fit in 32 bits, as the sizes that a launch passes do; a product
of two of them, a row times a stride, need not. In 32 bits are right, on the way to an address:

- a position (of a program, a lane, a loop, from memory) times a constant of at most a tile's width;
- a size (of arguments and constants only) times such a constant, where a product in 64 bits takes
  it as a factor: a width padded to whole tiles;
- a quotient times its divisor, which is at most the dividend;
- a product of positions that is then divided: the index of a tile in a triangle.

All else must be widened first. The rule follows each offset back through Triton's IR, through
casts, sums, branches and loops.
"""

import re
from dataclasses import dataclass, field

TILE = 1024  # a larger constant is the width of a row, not of a tile

_DIVIDE = ("arith.divsi", "arith.divui", "arith.remsi", "arith.remui", "arith.shrsi", "arith.shrui")
_SAME = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "arith.extsi", "arith.extui")
_LEAVES = ("tt.load", "tt.descriptor_load", "arith.fptosi", "arith.fptoui", "arith.cmpi")


@dataclass(eq=False)
class _Value:
    """An SSA value: what computes it, from what, in how many bits where it is an integer."""

    op: str
    operands: list["_Value"] = field(default_factory=list)
    bits: int = 0
    line: str = ""


@dataclass
class _Region:
    """An open brace: its names, what leaves it and what comes round again."""

    op: str = ""
    names: dict[str, _Value] = field(default_factory=dict)
    results: list[_Value] = field(default_factory=list)
    carried: list[_Value] = field(default_factory=list)
    blocks: dict[tuple[str, int], _Value] = field(default_factory=dict)


def _bits(types: str) -> int:
    """The width of the last integer type in a line; 0 without one."""
    found = re.findall(r"(?:\btensor<[\dx]*x|(?<![\w.]))i(\d+)\b", types)
    return int(found[-1]) if found else 0


class _Reader:
    """Reads the functions of a module, in Triton's IR as it is printed."""

    def __init__(self, ttir: str) -> None:
        self.regions = [_Region()]
        self.offsets: list[_Value] = []
        for line in ttir.splitlines():
            if not line.startswith("#"):
                self._line(line)

    def _get(self, name: str) -> _Value:
        for region in reversed(self.regions):
            if name in region.names:
                return region.names[name]
        raise RuntimeError(f"{name} is used before it is defined")

    def _all(self, text: str) -> list[_Value]:
        return [self._get(name) for name in re.findall(r"%\w+(?:#\d+)?", text)]

    def _line(self, raw: str) -> None:
        line = raw.split(" loc(")[0].strip()
        if line.startswith("}"):
            closed = self.regions.pop()
            if line.endswith("{"):  # else, or the body of a while
                again = _Region(closed.op, {}, closed.results, closed.carried)
                self.regions.append(again)
        elif line.startswith("^bb"):
            self._block(raw.strip())
        elif re.match(r"tt\.func\b", line):
            names = re.findall(r"(%\w+): ([^{,)]*)", raw)
            arguments = {name: _Value("argument", bits=_bits(type)) for name, type in names}
            self.regions.append(_Region("tt.func", arguments))
        elif re.match(r"(?:scf|cf)\.(?:yield|condition|br|cond_br)\b", line):
            self._jump(line)
        elif match := re.match(r"(?:(%\w+)(?::(\d+))? = )?\"?([\w.]+)\"?(.*)", line):
            self._operation(line, *match.groups())

    def _operation(self, line: str, name: str | None, count: str, op: str, rest: str) -> None:
        body = rest.split(" : ")[0]
        opened = _Region(op) if line.endswith("{") else None
        many = int(count or 1) if name else 0
        if opened is not None and op.startswith("scf."):
            carried = re.findall(r"(%\w+) = (%\w+(?:#\d+)?)", body)
            bounds = re.match(r" (?:unsigned )?(%\w+) = (%\S+) to (%\S+) step (%\S+)", body)
            if bounds:
                inner, low, _, step = bounds.groups()
                opened.names[inner] = _Value("induction", [self._get(low), self._get(step)])
                carried = [pair for pair in carried if pair[0] != inner]
            opened.results = [_Value("merge") for _ in range(many)]
            opened.carried = (
                opened.results if op == "scf.for" else [_Value("merge") for _ in carried]
            )
            for value, (inner, initial) in zip(opened.carried, carried, strict=op != "scf.if"):
                value.operands.append(self._get(initial))
                opened.names[inner] = value
            results = opened.results
        else:
            value = _Value(op, self._all(body), _bits(line), line)
            results = [value] * many
            if op == "tt.addptr":
                self.offsets.append(value.operands[1])
        if name:
            names = [f"{name}#{i}" for i in range(many)] if count else [name]
            self.regions[-1].names |= dict(zip(names, results, strict=True))
        if opened is not None:
            self.regions.append(opened)

    def _jump(self, line: str) -> None:
        region = self.regions[-1]
        if line.startswith("cf."):
            for label, passed in re.findall(r"(\^bb\d+)(?:\(([^:)]*))?", line):
                for i, value in enumerate(self._all(passed)):
                    merge = region.blocks.setdefault((label, i), _Value("merge"))
                    merge.operands.append(value)
            return
        values = self._all(line.split(" : ")[0])
        into = region.results
        if line.startswith("scf.condition"):
            values = values[1:]
        elif region.op == "scf.while":
            into = region.carried
        for merge, value in zip(into, values, strict=bool(into)):
            merge.operands.append(value)

    def _block(self, line: str) -> None:
        region = self.regions[-1]
        label = line.split("(")[0].split(":")[0]
        for i, (name, type) in enumerate(re.findall(r"(%\w+): (\S+)", line)):
            if region.op == "scf.while":
                value = region.results[i]
            else:
                value = region.blocks.setdefault((label, i), _Value("merge"))
                value.bits = _bits(type)
            region.names[name] = value


def _plain(value: _Value) -> _Value:
    """The value before it was widened or spread over a tile."""
    while value.op in _SAME:
        value = value.operands[0]
    return value


def _constant(value: _Value) -> int | None:
    value = _plain(value)
    found = re.search(r"arith\.constant (?:dense<)?(-?\d+)>? :", value.line)
    return int(found.group(1)) if found else None


def _is_size(value: _Value, seen: set[_Value] | None = None) -> bool:
    """Whether it is made of arguments and constants, the same in every program and step."""
    seen = set() if seen is None else seen
    if value in seen:
        return True
    seen.add(value)
    if value.op in ("argument", "arith.constant"):
        return True
    if value.op in _LEAVES or value.op == "induction" or not value.operands:
        return False
    return all(_is_size(operand, seen) for operand in value.operands)


def _fits(product: _Value, factor: bool, divided: bool) -> bool:
    """Whether a product may be one of 32 bits; the rule at the top of this file."""
    left, right = product.operands
    pairs = ((left, right), (right, left))
    for one, other in pairs:
        quotient = _plain(other)
        if quotient.op in _DIVIDE[:2] and product.op == "arith.muli":
            divisor = _plain(quotient.operands[1])
            if divisor is _plain(one) or _constant(divisor) == (_constant(one) or 0):
                return True
    for one, other in pairs:
        number = _constant(one)
        if number is not None and product.op == "arith.shli":
            number = 1 << number if one is right else TILE + 1
        if number is not None:
            return abs(number) <= TILE and (factor or not _is_size(other))
    return divided and not _is_size(left) and not _is_size(right)


def narrow_products(ttir: str) -> list[str]:
    """The lines that multiply in 32 bits, on the way to an address, what might not fit."""
    wrong, seen = set(), set()
    # A value with: is it a factor of a product in 64 bits, divided later, cut to 32 bits later?
    waiting = [(offset, False, False, False) for offset in _Reader(ttir).offsets]
    while waiting:
        value, factor, divided, narrow = state = waiting.pop()
        if state in seen:
            continue
        seen.add(state)
        operands = value.operands
        if value.op in _LEAVES:
            continue
        if value.op in ("arith.muli", "arith.shli"):
            if value.bits == 64 and not narrow:
                factor = True
            elif not _fits(value, factor, divided):
                wrong.add(value)
        elif value.op in _DIVIDE:
            operands, divided = operands[:1], True
        elif value.op == "arith.select":
            operands = operands[1:]
        elif value.op == "arith.trunci":
            narrow = narrow or value.bits < 64
        waiting += [(operand, factor, divided, narrow) for operand in operands]
    return sorted(value.line for value in wrong)
