"""Machine code of a CUDA kernel, and the issue slots that its work takes on the path that it takes most.

NVIDIA's disassembler (``nvidia-cuda-nvdisasm``) gives instructions. They are cut into basic blocks and loops. Which way
a branch goes is not written in machine code, so the path is found by what it must do: of all ways through one turn of a
loop, the one with the fewest instructions that moves the bytes, and does the tensor products and the arithmetic, that a
turn has to. Paths for edges and special values (a block that is not full, a division whose quotient is subnormal) take
more instructions, or do less, and so are never it.

A warp issues an instruction whether or not its lanes are predicated off, so every instruction is one slot of a warp.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^\s*(\.L_x_\d+|\.L_\d+):")
_TARGET = re.compile(r"`\((\.L[\w]+)\)")
LANES = 32  # of a warp
_CALL = 40  # slots of a call: a routine for special values, which no hot path should take; under a guard it is passed
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}

KINDS = {  # by the first part of the opcode; what is not here is integer
    "memory": "LDG STG LDGSTS LDGDEPBAR RED ATOM ATOMG LDC LDCU ULDC LD ST LDL STL UTMALDG UTMASTG CCTL",
    "shared": "LDS STS LDSM STSM ATOMS",
    "float": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 FMNMX FMNMX3 FSEL FSET FSETP FCHK FSWZADD DADD DMUL DFMA DSETP "
    "HADD2 HFMA2 HMUL2 HMNMX2 HSETP2 HSET2",
    "special": "MUFU F2F F2FP F2I I2F I2FP F2IP I2IP FRND POPC FLO BREV",
    "tensor": "IMMA HMMA QMMA DMMA IGMMA HGMMA QGMMA UTCIMMA UTCHMMA",
    "control": "BRA BSSY BSYNC EXIT CALL RET WARPSYNC BAR NOP YIELD BREAK BMOV DEPBAR MEMBAR SHFL REDUX VOTE CREDUX "
    "R2UR S2R S2UR CS2R ELECT NANOSLEEP WARPGROUP SYNCS BRX ERRBAR ENDCOLLECTIVE VOTEU",
}
_KIND = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Instruction:
    """``address`` in bytes; ``opcode`` with its modifiers (``LDG.E.128``); ``guard``: ``@P0``, or empty."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        return _KIND.get(self.opcode.partition(".")[0], "integer")

    @property
    def alu(self) -> bool:
        """Whether the arithmetic-logic unit does it, which has half the lanes of the units that multiply: logic,
        shifts, comparisons, selections, additions of integers. Integers are multiplied, and often moved, beside
        floats."""
        name = self.opcode.partition(".")[0]
        if self.kind == "integer":
            return not name.startswith(("IMAD", "U"))
        return name in ("FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "FCHK")

    @property
    def global_bytes(self) -> int:
        """Bytes of global memory that one lane moves."""
        name, *modifiers = self.opcode.split(".")
        if name not in ("LDG", "STG", "LDGSTS", "LD", "ST"):
            return 0
        return next((width for word, width in _WIDTHS.items() if word in modifiers), 4)

    @property
    def is_load(self) -> bool:
        return self.opcode.split(".")[0] in ("LDG", "LDGSTS", "LD")

    @property
    def shared_turns(self) -> float:
        """Turns of shared memory, 128 bytes for a warp, if no banks conflict."""
        name, *modifiers = self.opcode.split(".")
        if name == "LDSM":
            return int(self.opcode[-1])  # matrices of 8 rows of 16 bytes
        if name == "LDGSTS":
            return self.global_bytes / 4
        if name not in ("LDS", "STS", "ATOMS"):
            return 0
        return max(4, next((width for word, width in _WIDTHS.items() if word in modifiers), 4)) / 4

    @property
    def tensor(self) -> int:
        return int(self.kind == "tensor")

    @property
    def arithmetic(self) -> int:
        """Whether it adds or multiplies floats."""
        return int(self.opcode.partition(".")[0] in ("FADD", "FMUL", "FFMA"))


@dataclass
class Block:
    """A basic block. ``next``: where control may go on, by index."""

    instructions: list[Instruction]
    labels: tuple[str, ...] = ()
    next: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Turn:
    """The cheapest way through one turn: its instructions in order of issue."""

    instructions: tuple[Instruction, ...]

    @property
    def slots(self) -> int:
        calls = sum(i.opcode.startswith("CALL") and not i.guard for i in self.instructions)
        return len(self.instructions) + _CALL * calls

    def kinds(self) -> Counter[str]:
        return Counter(i.kind for i in self.instructions)

    @property
    def loaded_bytes(self) -> int:
        return sum(i.global_bytes for i in self.instructions if i.is_load)

    @property
    def stored_bytes(self) -> int:
        return sum(i.global_bytes for i in self.instructions if not i.is_load)

    @property
    def alu(self) -> int:
        return sum(i.alu for i in self.instructions)

    @property
    def shared_turns(self) -> float:
        return sum(i.shared_turns for i in self.instructions)

    @property
    def tensor(self) -> int:
        return sum(i.tensor for i in self.instructions)

    @property
    def arithmetic(self) -> int:
        return sum(i.arithmetic for i in self.instructions)

    @property
    def local(self) -> int:
        """Accesses to local memory: spilled registers."""
        return sum(i.opcode.startswith(("LDL", "STL")) for i in self.instructions)


@cache
def disassembler() -> str:
    """Where nvdisasm is.

    Raises:
        FileNotFoundError: if the wheel ``nvidia-cuda-nvdisasm`` is not installed.
    """
    import nvidia

    for root in nvidia.__path__:
        for found in sorted(Path(root).glob("**/bin/nvdisasm")):
            return str(found)
    raise FileNotFoundError("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")


def disassemble(cubin: bytes) -> dict[str, list[Block]]:
    """The basic blocks of each kernel of a cubin, entry first; routines that kernels call are left out."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([disassembler(), "-c", file.name], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for section in text.split("\t.section\t.text.")[1:]:
        name = section.partition(",")[0]
        kernels[name] = blocks_of(section)
    return kernels


def blocks_of(text: str) -> list[Block]:
    """The basic blocks of one kernel's disassembly."""
    blocks = [Block([])]
    for line in text.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].instructions:
                blocks.append(Block([]))
            blocks[-1].labels += (label[1],)
        elif line.startswith("$__internal"):  # a routine of the compiler's, after the kernel's own code
            break
        elif found := _LINE.search(line):
            instruction = Instruction(int(found[1], 16), found[2] or "", found[3], found[4].strip())
            blocks[-1].instructions.append(instruction)
            if instruction.opcode.partition(".")[0] in ("BRA", "EXIT", "BRX", "RET"):
                blocks.append(Block([]))
    blocks = [block for block in blocks if block.instructions]
    _connect(blocks)
    return blocks


def _connect(blocks: list[Block]) -> None:
    at = {label: number for number, block in enumerate(blocks) for label in block.labels}
    for number, block in enumerate(blocks):
        last = block.instructions[-1]
        falls = number + 1 if number + 1 < len(blocks) else None
        name = last.opcode.partition(".")[0]
        target = _TARGET.search(last.operands)
        # A branch by two predicates has one before and one among its operands.
        conditional = bool(last.guard) or (name == "BRA" and "," in last.operands) or ".DIV" in last.opcode
        if name == "BRA" and target and target[1] in at and ".DIV" not in last.opcode:
            block.next.append(at[target[1]])
        if falls is not None and (conditional or name not in ("BRA", "EXIT", "RET", "BRX")):
            block.next.append(falls)


def loops(blocks: list[Block]) -> list[tuple[int, frozenset[int]]]:
    """Natural loops: (head, blocks), the inner ones first."""
    order, back = _search(blocks)
    before: dict[int, set[int]] = {n: set() for n in order}
    for n in order:
        for m in blocks[n].next:
            before[m].add(n)
    bodies: dict[int, set[int]] = {}
    for source, head in back:
        body, todo = {head}, [source]
        while todo:
            n = todo.pop()
            if n not in body:
                body.add(n)
                todo += before[n]
        bodies.setdefault(head, set()).update(body)
    return sorted(((head, frozenset(body)) for head, body in bodies.items()), key=lambda one: len(one[1]))


def _search(blocks: list[Block]) -> tuple[list[int], set[tuple[int, int]]]:
    """Reverse postorder from the entry, and the edges that go back to a block on the way to itself."""
    done: list[int] = []
    state: dict[int, str] = {0: "open"}
    back: set[tuple[int, int]] = set()
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(blocks[0].next))]
    while stack:
        number, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            state[number] = "done"
            done.append(number)
            stack.pop()
        elif following not in state:
            state[following] = "open"
            stack.append((following, iter(blocks[following].next)))
        elif state[following] == "open":
            back.add((number, following))
    return done[::-1], back


Work = tuple[int, int, int, int]
"""What a lane has done so far: bytes loaded from global memory, bytes stored there, tensor products, sums and products
of floats."""


def turn(
    blocks: list[Block],
    body: frozenset[int] | None = None,
    head: int = 0,
    *,
    loads: int = 0,
    stores: int = 0,
    tensor: int = 0,
    arithmetic: int = 0,
) -> Turn | None:
    """The path with the fewest slots through one turn of a loop, or through the kernel where ``body`` is None, on which
    a lane does at least what is asked, and stores no more: loads ``loads`` bytes of global memory, stores ``stores``
    there, takes part in ``tensor`` tensor products, adds or multiplies floats ``arithmetic`` times. Inner loops are
    entered at most once. None: there is no such path."""
    wanted: Work = (loads, stores, tensor, arithmetic)
    order, back = _search(blocks)
    inside = frozenset(order) if body is None else body
    # best[block][work so far] = (slots before the block, the block before it and the work then)
    best: dict[int, dict[Work, tuple[int, tuple[int, Work] | None]]] = {head: {(0, 0, 0, 0): (0, None)}}
    found: tuple[int, int, Work] | None = None
    for number in (n for n in order if n in inside):
        block = blocks[number]
        part = Turn(tuple(block.instructions))
        ends = [head] if body is not None and head in block.next else []
        if body is None and _exits(block):
            ends = [_OUT]
        for reached, slots in _worth(best.get(number, {})):
            cost = slots + part.slots
            for following in (*block.next, *ends):
                done = _after(reached, _on_the_way(block, following))
                now: Work = (min(done[0], loads), done[1], min(done[2], tensor), min(done[3], arithmetic))
                if done[1] > stores:
                    continue
                if following in ends:
                    if now == wanted and (found is None or cost < found[0]):
                        found = (cost, number, reached)
                elif following in inside and (number, following) not in back:
                    known = best.setdefault(following, {}).get(now)
                    if known is None or cost < known[0]:
                        best[following][now] = (cost, (number, reached))
    if found is None:
        return None
    chosen: list[Instruction] = []
    at: tuple[int, Work] | None = (found[1], found[2])
    while at is not None:
        chosen[:0] = blocks[at[0]].instructions
        at = best[at[0]][at[1]][1]
    return Turn(tuple(chosen))


_OUT = -1  # what follows the last block of a kernel


def _worth(reached: dict[Work, tuple[int, tuple[int, Work] | None]]) -> list[tuple[Work, int]]:
    """The ways to a block, with their slots, but for those that do no more than another in no fewer slots."""
    kept: list[tuple[Work, int]] = []
    for work, (slots, _) in sorted(reached.items(), key=lambda way: (way[1][0], [-done for done in way[0]])):
        loads, stores, tensor, arithmetic = work
        if not any(w[0] >= loads and w[1] == stores and w[2] >= tensor and w[3] >= arithmetic for w, _ in kept):
            kept.append((work, slots))
    return kept


def _after(work: Work, more: Turn) -> Work:
    done = more.loaded_bytes, more.stored_bytes, more.tensor, more.arithmetic
    return (work[0] + done[0], work[1] + done[1], work[2] + done[2], work[3] + done[3])


def _on_the_way(block: Block, following: int) -> Turn:
    """What a block does when control goes on to ``following``: not what the guard of its branch, or of its exit, says
    is done only on the other way."""
    last = block.instructions[-1]
    if not last.guard or "," in last.operands or len(block.next) + _exits(block) < 2:
        return Turn(tuple(block.instructions))
    leaves = following != block.next[-1]  # the last is the next block in memory
    contrary = last.guard.replace("@!", "@") if last.guard.startswith("@!") else last.guard.replace("@", "@!")
    undone = contrary if leaves else last.guard
    done: list[Instruction] = [last]
    rest = block.instructions[:-1]
    while rest and last.guard.strip("@!") not in re.findall(r"\w+", rest[-1].operands):  # where it is written
        one = rest.pop()
        if one.guard != undone:
            done.append(one)
    return Turn((*rest, *reversed(done)))


def _exits(block: Block) -> bool:
    return block.instructions[-1].opcode.startswith("EXIT")
