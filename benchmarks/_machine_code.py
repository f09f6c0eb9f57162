"""What the compiler made of a kernel, read without a GPU: machine code, resources, Triton's IR.

Machine code is judged as text of nvdisasm, which Triton ships. Its loops are those of the control
flow, not of the listing: waits on a barrier stand after the last instruction and branch back.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator

from triton import knobs

MATRIX = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"}  # opcodes, by architecture
LOCAL = re.compile(r"(?:LDL|STL)\b")
DESCRIPTOR = re.compile(r"UTMALDG\b")
# At least 16 bytes a thread, or a tile through a descriptor, in machine code or in PTX.
READS = re.compile(
    r"\b(?:LDG|LDGSTS)\.\S*(?:128|256)|\bUTMALDG"
    r"|\bld\.global\S*\.(?:v[48]\.[bf]32|v[24]\.[bf]64)|\bcp\.async\.c\w\.\S+ .*, (?:0x10|16)\b"
    r"|\bcp\.async\.bulk\.tensor\S*global"
)
WRITES = re.compile(
    r"\bSTG\.\S*(?:128|256)|\bUTMASTG|\bst\.global\S*\.(?:v[48]\.[bf]32|v[24]\.[bf]64)"
)


def _tool(name: str, cubin: bytes, *options: str) -> str:
    """What cuobjdump or nvdisasm of Triton's wheel prints about a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, name).path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory."""
    text = _tool("cuobjdump", cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resources: {text[:200]!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def disassemble(cubin: bytes) -> str:
    """The machine code, one instruction or label a line."""
    return _tool("nvdisasm", cubin, "-c")


def sections(sass: str) -> Iterator[list[str]]:
    """The instructions and labels (".L_x_0:") of each function."""
    for section in re.split(r"^\.text\..*:$", sass, flags=re.MULTILINE)[1:]:
        found = re.findall(r"^(\.L\w+:)|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", section, re.MULTILINE)
        yield [label or instruction for label, instruction in found]


def opcodes(lines: Iterable[str]) -> list[str]:
    """Instructions without their predicates."""
    return [re.sub(r"^@!?U?P\w+\s+", "", line) for line in lines if not line.endswith(":")]


def _blocks(lines: list[str]) -> tuple[list[list[str]], list[set[int]]]:
    """Basic blocks of a function and, of each, the blocks that may follow."""
    blocks: list[list[str]] = [[]]
    at: dict[str, int] = {}
    jumps: dict[int, str] = {}
    ends = set()  # blocks that never run on into the next one
    for line in lines:
        if line.endswith(":"):
            if blocks[-1]:
                blocks.append([])
            at[line[:-1]] = len(blocks) - 1
            continue
        here = len(blocks) - 1
        blocks[-1].append(line)
        target = re.search(r"`\((\.L\w+)\)", line)
        if target is not None and not re.search(r"\b(?:CALL|BSSY)", line):
            jumps[here] = target.group(1)
        # `BRA.U UP0, ...` and `@P0 BRA ...` go on where the condition does not hold.
        final = re.match(r"BRA\S*\s+`\(|EXIT|RET|BRX|JMP", line) is not None
        if final:
            ends.add(here)
        if here in jumps or final:
            blocks.append([])
    after = [
        ({i + 1} if i not in ends and i + 1 < len(blocks) else set())
        | ({at[jumps[i]]} if jumps.get(i) in at else set())
        for i in range(len(blocks))
    ]
    return blocks, after


def _cycles(nodes: set[int], after: list[set[int]]) -> list[set[int]]:
    """The largest sets of blocks, within `nodes`, that all lead to each other."""
    reach = {i: after[i] & nodes for i in nodes}
    for via in nodes:
        for i in nodes:
            if via in reach[i]:
                reach[i] = reach[i] | reach[via]
    found, seen = [], set()
    for i in sorted(nodes):
        if i in reach[i] and i not in seen:
            cycle = {j for j in reach[i] if i in reach[j]}
            seen |= cycle
            found.append(cycle)
    return found


def matrix_loops(sass: str, arch: int) -> list[list[str]]:
    """The instructions of each innermost loop that holds a matrix instruction of `arch`.

    What a loop around it does once a tile, such as to store the tile, is not among them.
    """
    matrix = re.compile(MATRIX[arch])

    def holds(blocks: list[list[str]], loop: set[int]) -> bool:
        return any(matrix.match(line) for i in loop for line in opcodes(blocks[i]))

    def innermost(
        blocks: list[list[str]], after: list[set[int]], nodes: set[int]
    ) -> Iterator[set[int]]:
        for loop in _cycles(nodes, after):
            if holds(blocks, loop):
                entered = {i for o in set(range(len(blocks))) - loop for i in after[o] & loop}
                heads = entered & loop or {min(loop)}
                within = list(innermost(blocks, after, loop - heads))
                yield from within or [loop]

    found = []
    for lines in sections(sass):
        blocks, after = _blocks(lines)
        for loop in innermost(blocks, after, set(range(len(blocks)))):
            found.append([line for i in sorted(loop) for line in opcodes(blocks[i])])
    return found
