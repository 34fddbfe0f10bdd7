"""Reads the machine code of a kernel for two faults of the assembler (docs/kernels.md, The assembler).

`unwritten`: operands that are stored or multiplied from registers which nothing has written. ptxas of CUDA 13.3 to 13.5 makes
such code where a product's left operand has elements that are zero at compile time: the zeros are written after the operand was
stored. `unwaited`: fences that may still run when a barrier is passed. An instruction that takes long counts on one of a warp's
six scoreboards, and whoever needs its end waits for that; on the way back to the top of a loop ptxas 13.5 forgets it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

INSTRUCTION = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;]*);")
REGISTER = re.compile(r"\bR(\d+)\b")
ENCODED = re.compile(r"\*/\s+(?P<text>[^;/]*?)\s*;.*\n\s*/\* 0x(?P<high>[0-9a-f]{16}) \*/|^(?P<label>\.L_x_\d+):", re.MULTILINE)
BRANCH = re.compile(r"^(?P<condition>@!?U?P\d+ )?BRA.*`\((?P<label>\.L_x_\d+)\)")
MEETING = re.compile(r"(@!?U?P\d+ )?(BAR\.|SYNCS\.ARRIVE|UTMASTG)")
PRODUCT = re.compile(r"(@!?U?P\d+ )?HG?MMA")
NO_SCOREBOARD = 7
WRITES_NOTHING = ("ST", "RED", "BAR", "ISETP", "FSETP", "R2UR", "R2P", "PLOP3", "LDGSTS", "WARPGROUP")


def disassembled(ptx: str, assembler: Path) -> tuple[str, str]:
    """SASS for sm_90a of one kernel with its encoding, in listing order, and what the assembler said."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [str(assembler), "--gpu-name=sm_90a", str(source), "-o", str(binary)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        reader = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        return subprocess.run([str(reader), "-c", "-hex", str(binary)], check=True, capture_output=True, text=True).stdout, said


def unwritten(listing: str) -> list[str]:
    """Stores to shared memory and products that read registers before anything in the listing wrote them."""
    written: set[int] = set()
    found = []
    for name, operands in _instructions(listing):
        if set(_data(name, operands)) - written:
            found.append(f"{name} {','.join(operands)}")
        if operands and not name.startswith(WRITES_NOTHING) and (first := REGISTER.match(operands[0])):
            written.update(range(int(first[1]), int(first[1]) + _width(name)))
    return found


def _instructions(listing: str) -> Iterator[tuple[str, list[str]]]:
    for line in listing.splitlines():
        if match := INSTRUCTION.search(line):
            yield match["name"], [operand.strip() for operand in match["operands"].split(",")]


def _data(name: str, operands: list[str]) -> range:
    """Registers of what is stored to shared memory, or of a product's left operand."""
    if name.startswith(("STS", "HGMMA")) and len(operands) > 1 and (first := REGISTER.match(operands[1])):
        return range(int(first[1]), int(first[1]) + (4 if name.startswith("HGMMA") else _width(name)))
    return range(0)


def _width(name: str) -> int:
    """Registers of an instruction's data operand."""
    if name.startswith("HGMMA"):
        return int(name.split("x")[1]) // 2
    if "WIDE" in name or ".64" in name or name.startswith("CS2R") or "88.2" in name:
        return 2
    return 4 if ".128" in name or "88.4" in name else 1


def unwaited(listing: str) -> list[str]:
    """Barriers, signals and copies that a fence for accelerators may still run at, as nothing on the way waits for its end."""
    code, labels = _code(listing)
    found = []
    for start, (text, scoreboard, _) in enumerate(code):
        if not text.startswith("FENCE.VIEW.ASYNC"):
            continue
        assert scoreboard != NO_SCOREBOARD, text
        todo, seen = _after(code[start][0], start, labels), set()
        while todo:
            at = todo.pop()
            if at in seen or at >= len(code) or code[at][2] >> scoreboard & 1:
                continue
            seen.add(at)
            if MEETING.match(code[at][0]):
                found.append(code[at][0])
            else:
                todo += _after(code[at][0], at, labels)
    return found


def reread(listing: str) -> int:
    """Instructions that read spilled registers in a loop with products that has no other such loop inside: in every turn."""
    code, labels = _code(listing)
    texts = [text for text, *_ in code]
    ends = [(labels[match["label"]], at) for at, text in enumerate(texts) if (match := BRANCH.match(text))]
    loops = [(start, end) for start, end in ends if any(PRODUCT.match(text) for text in texts[start : end + 1])]
    inner = [one for one in loops if not any(one[0] <= start and end <= one[1] and one != (start, end) for start, end in loops)]
    return sum(text.startswith("LDL") and any(start <= at <= end for start, end in inner) for at, text in enumerate(texts))


def _code(listing: str) -> tuple[list[tuple[str, int, int]], dict[str, int]]:
    """Each instruction with the scoreboard that it counts on and those that it waits for, as bits; where labels are."""
    code: list[tuple[str, int, int]] = []
    labels: dict[str, int] = {}
    for match in ENCODED.finditer(listing):
        if match["label"]:
            labels[match["label"]] = len(code)
            continue
        control = int(match["high"], 16) >> 41
        code.append((match["text"], control >> 5 & 7, control >> 11 & 63))
    return code, labels


def _after(text: str, at: int, labels: dict[str, int]) -> list[int]:
    """Where an instruction may lead."""
    if match := BRANCH.match(text):
        return [labels[match["label"]], *([at + 1] if match["condition"] else [])]
    return [] if text.startswith("EXIT") else [at + 1]
