"""The reader of machine code itself, and the assembler whose code it has to watch."""

from __future__ import annotations

import pytest

from kernels.assembler import SAFE, version_of
from tests.kernels.offline import newest_assembler
from tests.kernels.sass import NO_SCOREBOARD, reread, unwaited, unwritten

LISTING = """
        /*0060*/                   MOV R93, RZ ;
        /*0070*/                   F2FP.F16.F32.PACK_AB R92, R132, R153 ;
        /*0080*/                   F2FP.F16.F32.PACK_AB R95, R140, R151 ;
        /*0090*/                   {}
        /*00a0*/                   {}
        /*00b0*/                   HGMMA.64x64x16.F32 R24, R92, gdesc[UR8].tnspB, RZ, !UPT ;
"""
STORE, ZERO = "STSM.16.M88.4 [R80], R92 ;", "MOV R94, RZ ;"


@pytest.mark.parametrize(("lines", "found"), [((ZERO, STORE), []), ((STORE, ZERO), ["STSM.16.M88.4 [R80],R92"])])
def test_a_store_before_its_zero_is_found(lines: tuple[str, str], found: list[str]) -> None:
    assert unwritten(LISTING.format(*lines)) == found


def test_a_product_of_an_unwritten_register_is_found() -> None:
    assert [line.split()[0] for line in unwritten(LISTING.format("NOP ;", "NOP ;"))] == ["HGMMA.64x64x16.F32"]


def test_compilations_are_read_with_an_assembler_that_users_get() -> None:
    assert (version_of(newest_assembler()) or (0, 0)) >= SAFE


def instruction(text: str, *, counts_on: int = NO_SCOREBOARD, waits_for: int = 0) -> str:
    """One line of a listing and its encoding, of which only the scoreboards matter."""
    control = counts_on << 5 | waits_for << 11
    return f"        /*0000*/ {text} ; /* 0x0 */\n /* 0x{control << 41:016x} */"


FENCE, BARRIER, BACK = instruction("FENCE.VIEW.ASYNC.S", counts_on=4), "BAR.SYNC.DEFER_BLOCKING 0x0", "@P4 BRA `(.L_x_8)"
WAITS = {"waits_for": 1 << 4}


@pytest.mark.parametrize(
    ("top", "end", "found"),
    [
        (instruction(BARRIER, **WAITS), instruction(BACK), []),
        (instruction(BARRIER), instruction(BACK, **WAITS), []),
        (instruction(BARRIER), instruction(BACK), [BARRIER]),
        (instruction(BARRIER, waits_for=1 << 3), instruction(BACK), [BARRIER]),
    ],
)
def test_a_fence_that_no_barrier_waits_for_is_found(top: str, end: str, found: list[str]) -> None:
    """It ends a loop; behind the loop somebody waits."""
    after = [instruction(BARRIER, **WAITS), instruction("EXIT")]
    assert unwaited("\n".join([".L_x_8:", top, instruction("NOP"), FENCE, end, *after])) == found


def test_spilled_registers_that_loops_with_products_read_are_counted() -> None:
    """Not those before the loop, nor in a loop that waits, nor in one around it."""
    read, product = instruction("LDL R3, [R1+0x90]"), instruction("HMMA.16816.F32 R32, R48, R28, RZ")
    wait = [".L_x_1:", read, instruction("@P4 BRA `(.L_x_1)")]
    inner = [".L_x_2:", read, product, read, instruction("@P4 BRA `(.L_x_2)")]
    assert reread("\n".join([".L_x_0:", read, *wait, *inner, instruction("@P4 BRA `(.L_x_0)"), read])) == 2
