"""Launchers of the trial: forward with states kept each EACH tokens, backward with a thread for a channel and all its states."""
import torch, triton
from kernels.scans import selective_scan_fixed, selective_scan_fours, selective_scan_twofold, selective_scan_columns, selective_scan_launch as launch
from kernels.between.parts_triton import add_parts

import triton.language as tl
from kernels._entry import entry

@entry(do_not_specialize=("n_parts",))
def sum_kernel(first, second, first_out, second_out, n_parts, columns, BC: tl.constexpr, AT_ONCE: tl.constexpr):
    """Sums over parts [S, C] of one tensor or the other."""
    which, c = tl.program_id(0) % 2, tl.program_id(0) // 2 * BC + tl.arange(0, BC)
    s, inside = tl.arange(0, AT_ONCE), c < columns
    total = tl.zeros([BC], tl.float32)
    source = first if which == 0 else second
    target = first_out if which == 0 else second_out
    for at in range(0, n_parts, AT_ONCE):
        place = (at + s).to(tl.int64)[:, None] * columns + c[None, :]
        part = tl.load(source + place, mask=(at + s < n_parts)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(part.to(tl.float32), 0)
    tl.store(target + c, total.to(target.dtype.element_ty), mask=inside)

def forward(x, dt, rate, b, c, each, dtype, warps=2, limit=None):
    batch, length, width = x.shape
    n_tiles = -(-length // 16)
    states = x.new_empty(batch, n_tiles * (16 // each) + 1, width, 16, dtype=dtype)
    final = x.new_empty(batch, width, 16, dtype=torch.float32)
    y = torch.empty_like(x)
    channels = warps * 32
    selective_scan_fixed.forward_fixed[(batch * -(-width // channels),)](
        x, dt, rate, b, c, x, x, x, final, y, states, final,
        0, length, n_tiles, batch // rate.shape[0],
        GATED=False, START=False, KEEP=True, N=16, C=channels, L=16, WARPS=warps, EACH=each, width=width, n_states=16, num_warps=warps, **({} if limit is None else {'maxnreg': limit}),
    )
    return y, final, states

def backward(dy, dfinal, x, dt, rate, b, c, states, *, L=8, kept=0, stored=0, sub=None, ask=False, omit=0, ahead=False, sums='own', maxnreg=168, even=None, kernel=None, more=None):
    batch, length, width = x.shape
    members, n_tiles = rate.shape[0], states.shape[1] - 1
    if kernel == "fours" or sub == 4:
        n_tiles //= L // 4
    n_blocks = -(-width // 32)
    new = x.new_empty
    dx, ddt, dstart = torch.empty_like(x), torch.empty_like(dt), new(batch, width, 16, dtype=torch.float32)
    drate_parts = new(batch, 16, width, dtype=torch.float32)
    db_parts, dc_parts = (new(n_blocks, batch, length, 16, dtype=torch.bfloat16) for _ in range(2))
    even = length % L == 0 and n_tiles * L == length if even is None else even
    limit = {} if maxnreg is None else {"maxnreg": maxnreg}
    kernel = {None: selective_scan_columns.columns_backward, "twofold": selective_scan_twofold.twofold_backward, "fours": selective_scan_fours.fours_backward}.get(kernel, kernel)
    kernel[(batch * n_blocks,)](
        dy, x, dt, rate, b, c, states, dstart if dfinal is None else dfinal, dx, ddt, drate_parts, db_parts, dc_parts, dstart,
        length, n_tiles, batch, batch // members,
        WIDTH=width, EVEN=even, FINAL=dfinal is not None, L=L, KEPT=kept, STORED=stored, ASK=ask, OMIT=omit, AHEAD=ahead, **(more or {}), num_warps=1, **limit,
    )
    drate, db, dc = (t.new_empty(t.shape) for t in (rate, b, c))
    each = batch // members
    add_parts((drate_parts,), (drate,), (16 * width, each * 16 * width), each)
    if sums == "own":
        many = batch * length * 16
        sum_kernel[(2 * -(-many // 1024),)](db_parts, dc_parts, db, dc, n_blocks, many, BC=1024, AT_ONCE=8, num_warps=4)
    elif sums == "torch":
        for found, out in ((db_parts, db), (dc_parts, dc)):
            out.copy_(found.sum(0, dtype=torch.float32))
    return dx, ddt, drate, db, dc, dstart
