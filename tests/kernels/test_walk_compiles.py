"""What the shipped configurations of the walks take on sm_90, found by the compiler without a GPU."""

import pytest
import torch
import triton.language as tl

from kernels import walk
from kernels.walk_gradients_triton import backward_kernel
from kernels.walk_triton import forward_kernel, segment_kernel
from tests.kernels.offline import compile_sm90

POINTERS = ("q", "k", "v", "b", "c", "o", "do", "dq", "dk", "dv")
DTYPES = {torch.bfloat16: ("*bf16+", tl.bfloat16), torch.float16: ("*fp16+", tl.float16), torch.float32: ("*fp32+", tl.float32)}
SMEM = 227 * 1024
WHOLE, SEQUENCES, SEGMENTS = range(3)


def compile_walk(kernel, config, widths, gate, dtype, pieces=WHOLE):
    """One kernel; gate is 0, 1 or 2."""
    pointer, dot = DTYPES[dtype]
    runtime = {p.name: p.annotation_type or "*fp32+" for p in kernel.params if not p.is_constexpr}
    (k_dim, v_dim), tile = widths, config.tile
    tiles = {name: walk.tile_of(config, width, dtype) for name, width in (("TK", k_dim), ("TV", v_dim))}
    value_block = walk.padded(v_dim) if kernel is backward_kernel else tiles["TV"]
    constants = {"K": k_dim, "V": v_dim, "BK": walk.padded(k_dim), "BV": value_block, "UNIT": 8, "PIECES": pieces, **tiles}
    constants |= {"C": config.chunk, "GATE": gate, "FIRST": False, "LAST": False, "DLAST": False, "GATE_GRAD": gate == 2}
    constants |= {"DOT": dot, "PRECISION": tl.constexpr(walk._precision(dtype)), "STAGES": config.stages}
    constants |= {"TOGETHER": config.together, "REVERSE": True}
    starts = {"starts": "*i64"} if pieces == SEQUENCES else {}
    arguments = runtime | dict.fromkeys(POINTERS, pointer) | constants | starts
    assert tile >= 16
    return compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=config.warps)


if __name__ == "__main__":
    import sys

    for widths in ((64, 64), (128, 64), (128, 128)):
        for gate in (0, 2):
            for pieces in (0, 2):
                for kernel, config in (
                    (forward_kernel, walk.forward_config(widths[0], torch.bfloat16)),
                    (segment_kernel, walk.SEGMENT_16[widths[0]]),
                    (
                        backward_kernel,
                        walk.Config(64, 64, 4, 2, True) if widths != (128, 128) else walk.backward_config(*widths, torch.bfloat16),
                    ),
                ):
                    u = compile_walk(kernel, config, widths, gate, torch.bfloat16, pieces)
                    print(kernel.__name__, widths, gate, pieces, config, u.registers, u.spilled, u.shared, flush=True)
