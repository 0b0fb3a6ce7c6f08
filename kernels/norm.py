"""
LayerNorm and RMSNorm, alone or fused with the residual add before them
    Ba, Kiros & Hinton 2016, arXiv:1607.06450 (eq. 4);  Zhang & Sennrich 2019, arXiv:1910.07467 (eq. 4)

    layer_norm       n = (x - mean(x)) rstd,   rstd = 1 / sqrt(mean((x - mean(x))^2) + eps),   y = n w + b
    rms_norm         n = x rstd,               rstd = 1 / sqrt(mean(x^2) + eps),               y = n w
    add_layer_norm,  s = x + r, then the same on s; returns (y, s): s is the residual stream, which goes on
    add_rms_norm
    backward         g = w dy;  dx = rstd (g - mean(g) - n mean(g n)) + ds;  dw = sum_rows dy n;  db = sum_rows dy
                     (rms_norm: no mean(g).  ds: what comes back along the stream.  dr = dx.)

Shapes: x, r (..., C), w, b (C,); C <= 8192. fp32, bf16 or fp16; w and b may be fp32 beside a 16-bit x. y and s have
the dtype of x (of x + r). All arithmetic is fp32 whatever the tensors are, so autocast changes nothing: a 16-bit x
gives a 16-bit y.

Saved for backward: x (or s), w and rstd (LayerNorm: mean too), 4 or 8 bytes a row. n is recomputed.
Bytes: forward reads x, w, b and writes y (add: reads r, writes s too) once, which is the floor, and w and b again for
each of at most 2 programs per multiprocessor. Backward reads dy, x (and ds) and writes dx once, and each program writes
its sums for dw and db, which PyTorch adds up in a fixed order: results repeat bit for bit. (1024, 768) in bf16 moves
1.04 (without b) to 1.09 times the floor forward, 1.05 to 1.10 backward; more rows, less.
FLOPs: about 8 an element forward, 12 backward: memory is the bound on every GPU.
"""
import os

import torch

# ----- dispatch (shared) -----
try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this machine: the plain-PyTorch form serves
    triton = tl = None

KERNELS = os.environ.get("KERNELS", "")  # ref | torch | triton forces one form; empty: the device decides


def form(x):
    """Which form of the op serves tensor x: "ref", "torch" or "triton"."""
    if KERNELS == "triton" and triton is None:
        raise RuntimeError("KERNELS=triton: Triton is not installed (pip install triton, Linux only)")
    return KERNELS or ("triton" if x.is_cuda and triton is not None else "torch")
# ----- end -----


def layer_norm_ref(x, w, b=None, eps=1e-5):
    """The definition; fp32 inside, fp64 for fp64."""
    h = x if x.dtype == torch.float64 else x.float()
    h = h - h.mean(-1, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * w
    return (y if b is None else y + b).to(x.dtype)


def rms_norm_ref(x, w, eps=1e-6):
    """The definition; fp32 inside, fp64 for fp64."""
    h = x if x.dtype == torch.float64 else x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * w).to(x.dtype)


def layer_norm_torch(x, w, b=None, eps=1e-5):
    if w.dtype == x.dtype:
        return torch.nn.functional.layer_norm(x, w.shape, w, b, eps).to(x.dtype)  # .to: under autocast it returns fp32
    b = None if b is None else b.float()
    return torch.nn.functional.layer_norm(x.float(), w.shape, w.float(), b, eps).to(x.dtype)


def rms_norm_torch(x, w, eps=1e-6):
    if w.dtype == x.dtype:
        return torch.nn.functional.rms_norm(x, w.shape, w, eps).to(x.dtype)
    return torch.nn.functional.rms_norm(x.float(), w.shape, w.float(), eps).to(x.dtype)


if triton is not None:
    # A program takes BM rows at a time (several when they are narrow) and strides over the matrix: it reads w once and
    # holds the sums for dw. num_stages: the next rows load while these are computed, so few programs keep memory busy.

    @triton.jit
    def norm_fwd_kernel(x, r, w, b, y, s, stats, M, C, eps, CENTER: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
                        STAGES: tl.constexpr):
        o_c = tl.arange(0, BC)[None, :]
        m_c = o_c < C
        b_w = tl.load(w + o_c, mask=m_c, other=0.0).to(tl.float32)  # [1, BC]
        if b is not None:
            b_b = tl.load(b + o_c, mask=m_c, other=0.0).to(tl.float32)
        for i in tl.range(tl.program_id(0), tl.cdiv(M, BM), tl.num_programs(0), num_stages=STAGES):
            o_m = (i * BM + tl.arange(0, BM)[:, None]).to(tl.int64)  # [BM, 1]; int64: row * C can pass 2^31
            m_m = o_m < M
            m = m_m & m_c
            o = o_m * C + o_c
            b_x = tl.load(x + o, mask=m, other=0.0).to(tl.float32)  # [BM, BC]
            if r is not None:
                b_x += tl.load(r + o, mask=m, other=0.0).to(tl.float32)
                b_x = b_x.to(s.dtype.element_ty).to(tl.float32)  # what backward will read
                tl.store(s + o, b_x, mask=m)
            if CENTER:
                mean = tl.sum(b_x, 1, keep_dims=True) / C  # [BM, 1]
                tl.store(stats + M + o_m, mean, mask=m_m)
                b_x = tl.where(m_c, b_x - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(b_x * b_x, 1, keep_dims=True) / C + eps)
            tl.store(stats + o_m, rstd, mask=m_m)
            b_y = b_x * rstd * b_w
            if b is not None:
                b_y += b_b
            tl.store(y + o, b_y, mask=m)

    # n = (x - mean) rstd, y = n w + b, g = w dy. The two means over the row come from d(rstd)/dx and d(mean)/dx:
    #   dx = rstd (g - mean(g) - n mean(g n)),   dw = sum over rows of dy n,   db = sum over rows of dy

    @triton.jit
    def norm_bwd_kernel(dy, ds, x, w, stats, dx, dw, db, M, C, CENTER: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
                        STAGES: tl.constexpr):
        o_c = tl.arange(0, BC)[None, :]
        m_c = o_c < C
        b_w = tl.load(w + o_c, mask=m_c, other=0.0).to(tl.float32)  # [1, BC]
        b_dw = tl.zeros((BM, BC), tl.float32)  # summed over BM after the loop
        b_db = tl.zeros((BM, BC), tl.float32)
        for i in tl.range(tl.program_id(0), tl.cdiv(M, BM), tl.num_programs(0), num_stages=STAGES):
            o_m = (i * BM + tl.arange(0, BM)[:, None]).to(tl.int64)  # [BM, 1]
            m_m = o_m < M
            m = m_m & m_c
            o = o_m * C + o_c
            b_dy = tl.load(dy + o, mask=m, other=0.0).to(tl.float32)  # [BM, BC]
            b_n = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
            rstd = tl.load(stats + o_m, mask=m_m, other=0.0)  # [BM, 1]
            if CENTER:
                b_n -= tl.load(stats + M + o_m, mask=m_m, other=0.0)
            b_n *= rstd  # past the row's end it is not zero; dy is
            b_dw += b_dy * b_n
            if db is not None:
                b_db += b_dy
            b_g = b_dy * b_w
            b_dx = b_g - b_n * (tl.sum(b_g * b_n, 1, keep_dims=True) / C)
            if CENTER:
                b_dx -= tl.sum(b_g, 1, keep_dims=True) / C
            b_dx *= rstd
            if ds is not None:
                b_dx += tl.load(ds + o, mask=m, other=0.0).to(tl.float32)
            tl.store(dx + o, b_dx, mask=m)
        o = tl.program_id(0) * C + tl.arange(0, BC)
        tl.store(dw + o, tl.sum(b_dw, 0), mask=tl.arange(0, BC) < C)
        if db is not None:
            tl.store(db + o, tl.sum(b_db, 0), mask=tl.arange(0, BC) < C)

    def launch_config(x, tensors, rows):
        """-> M, C, grid, constexprs for a kernel that loads so many tensors like x, at least so many rows a program."""
        M, C = x.numel() // max(1, x.shape[-1]), x.shape[-1]
        BC = triton.next_power_of_2(C)
        if BC > 8192:
            raise ValueError(f"norm: rows of {C} are too wide, at most 8192")
        BM = max(1, 1024 // BC)
        # 8 elements a thread, 16 at 8192: backward's five rows then stay in registers (sm_89: 128 of them, no spills)
        warps = 4 if BC <= 1024 else 8 if BC <= 2048 else 16
        # up to 3 tiles of each tensor on their way, within 48 KiB of shared memory (8192 wide: one tile is work enough)
        stages = max(1, min(4, 1 + 49152 // (tensors * BM * BC * 4)))
        # two programs per multiprocessor hide each other's reductions (46: an RTX 4070, for the interpreter on a CPU)
        sm = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 46
        grid = (max(1, min(2 * sm, triton.cdiv(M, max(rows, BM)))),)
        return M, C, grid, dict(BM=BM, BC=BC, STAGES=stages, num_warps=warps)

    @torch.library.custom_op("kernels::norm", mutates_args=())
    def norm_op(x: torch.Tensor, r: torch.Tensor | None, w: torch.Tensor, b: torch.Tensor | None, eps: float,
                center: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> y, s (empty without r), stats (rstd; with center also mean) for backward."""
        M, C, grid, config = launch_config(x, 1 if r is None else 2, 1)
        y = torch.empty_like(x, dtype=x.dtype if r is None else torch.promote_types(x.dtype, r.dtype))
        s = y.new_empty(0) if r is None else torch.empty_like(y)
        stats = torch.empty(1 + center, M, dtype=torch.float32, device=x.device)
        norm_fwd_kernel[grid](x, r, w, b, y, s, stats, M, C, eps, CENTER=center, **config)
        return y, s, stats

    @norm_op.register_fake
    def _(x, r, w, b, eps, center):
        y = torch.empty_like(x, dtype=x.dtype if r is None else torch.promote_types(x.dtype, r.dtype))
        return y, y.new_empty(0) if r is None else torch.empty_like(y), x.new_empty(
            1 + center, x.numel() // x.shape[-1], dtype=torch.float32)

    @torch.library.custom_op("kernels::norm_bwd", mutates_args=())
    def norm_bwd_op(dy: torch.Tensor, ds: torch.Tensor | None, x: torch.Tensor, w: torch.Tensor, stats: torch.Tensor,
                    bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """-> dx (x is s after an add), and dw with db below it: (1 or 2, C) fp32."""
        M, C, grid, config = launch_config(x, 2 if ds is None else 3, 32)  # 32: dw and db cost a program 3 rows' bytes
        dx = torch.empty_like(x)
        dw = torch.empty(1 + bias, grid[0], C, dtype=torch.float32, device=x.device)  # one row a program
        norm_bwd_kernel[grid](dy, ds, x, w, stats, dx, dw[0], dw[1] if bias else None, M, C,
                              CENTER=stats.shape[0] == 2, **config)
        return dx, dw.sum(1)

    @norm_bwd_op.register_fake
    def _(dy, ds, x, w, stats, bias):
        return torch.empty_like(x), x.new_empty(1 + bias, x.shape[-1], dtype=torch.float32)

    def save_for_backward(ctx, inputs, output):
        x, r, w, b, _, _ = inputs
        ctx.save_for_backward(x if r is None else output[1], w, output[2])
        ctx.x_dtype, ctx.r_dtype, ctx.b_dtype = x.dtype, r is not None and r.dtype, b is not None and b.dtype
        ctx.set_materialize_grads(False)  # an unused s brings no gradient: not a tensor of zeros to read

    def norm_backward(ctx, dy, ds, _):
        x, w, stats = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        ds = ds.contiguous() if ctx.r_dtype and ds is not None else None
        dx, dw = norm_bwd_op(dy, ds, x, w, stats, bool(ctx.b_dtype))
        dr = dx.to(ctx.r_dtype) if ctx.r_dtype else None
        return dx.to(ctx.x_dtype), dr, dw[0].to(w.dtype), dw[1].to(ctx.b_dtype) if ctx.b_dtype else None, None, None

    norm_op.register_autograd(norm_backward, setup_context=save_for_backward)

    def norm_triton(x, r, w, b, eps, center):
        if w.shape != x.shape[-1:] or b is not None and b.shape != w.shape or r is not None and r.shape != x.shape:
            shapes = [tuple(t.shape) for t in (x, r, w, b) if t is not None]
            raise ValueError(f"norm: shapes {shapes}, expected x, r (..., C) and w, b (C,)")
        return norm_op(x.contiguous(), None if r is None else r.contiguous(), w, b, eps, center)[:2]


def layer_norm(x, w, b=None, eps=1e-5):
    """x (..., C), w and b (C,) -> y (..., C) in x's dtype. ValueError: shapes that do not fit, C > 8192 (on a GPU)."""
    which = form(x)
    if which == "triton":
        return norm_triton(x, None, w, b, eps, True)[0]
    return layer_norm_ref(x, w, b, eps) if which == "ref" else layer_norm_torch(x, w, b, eps)


def rms_norm(x, w, eps=1e-6):
    """x (..., C), w (C,) -> y (..., C) in x's dtype. Errors as layer_norm."""
    which = form(x)
    if which == "triton":
        return norm_triton(x, None, w, None, eps, False)[0]
    return rms_norm_ref(x, w, eps) if which == "ref" else rms_norm_torch(x, w, eps)


def add_layer_norm(x, r, w, b=None, eps=1e-5):
    """x, r (..., C), w and b (C,) -> y = layer_norm(s), s = x + r, both in x + r's dtype. Errors as layer_norm."""
    if form(x) == "triton":
        return norm_triton(x, r, w, b, eps, True)
    s = x + r
    return layer_norm(s, w, b, eps), s


def add_rms_norm(x, r, w, eps=1e-6):
    """x, r (..., C), w (C,) -> y = rms_norm(s), s = x + r, both in x + r's dtype. Errors as layer_norm."""
    if form(x) == "triton":
        return norm_triton(x, r, w, None, eps, False)
    s = x + r
    return rms_norm(s, w, eps), s
