"""
Rotary position embedding: each pair of channels of a query or key is turned by an angle that grows with its position
    Su et al. 2021, arXiv:2104.09864v5, eq. 34

    (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin)      for the D/2 pairs (x1, x2) of a head, cos and sin of the position
    pairs        half-split: x1 = x[:D/2], x2 = x[D/2:] (Llama, "rotate_half");
                 interleaved: x1 = x[::2], x2 = x[1::2] (the paper)
    backward     the inverse turn, dx = rope(dy, cos, -sin);  cos and sin take no gradient

Shapes: x (B, T, H, D), any strides (the kernel copies only where the last dimension is not contiguous); cos, sin
(T, D/2), or (T, H, D/2) where they differ by head -> y (B, T, H, D), contiguous, in x's dtype. A factor on the tables
(RetNet's 1 / sqrt(K), YaRN's temperature) is a factor on y, and is there in backward too. fp32 arithmetic.
Saved for backward: the tables. Bytes: x, y and the tables once when T has blocks enough to fill the GPU, which is the
floor; else the tables once for each of the programs that share out the batch. FLOPs: 3 an element: memory is the bound.
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


def rope_ref(x, cos, sin, interleaved=False):
    """The definition; fp32 inside, fp64 for fp64."""
    cos, sin = (t if t.ndim == 3 else t[:, None] for t in (cos, sin))  # (T, 1 or H, D/2)
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    x1, x2 = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)  # (B, T, H, D/2) each
    y = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return (torch.stack(y, -1).flatten(-2) if interleaved else torch.cat(y, -1)).to(x.dtype)


class Rope(torch.autograd.Function):
    """One pass over x: neighbours are a complex number times cos + i sin, halves go straight to their places."""

    @staticmethod
    def turn(x, cos, sin, interleaved):
        if interleaved:
            wide = torch.promote_types(x.dtype, torch.float32)
            h = torch.view_as_complex(x.to(wide).contiguous().unflatten(-1, (-1, 2)))
            return torch.view_as_real(h * torch.complex(cos.to(wide), sin.to(wide))).flatten(-2).to(x.dtype)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        (x1, x2), (y1, y2) = x.chunk(2, -1), y.chunk(2, -1)
        y1.copy_(x1 * cos).addcmul_(x2, sin, value=-1)
        y2.copy_(x2 * cos).addcmul_(x1, sin)
        return y

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        cos, sin = (t if t.ndim == 3 else t[:, None] for t in (cos, sin))
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return Rope.turn(x, cos, sin, interleaved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return Rope.turn(dy, cos, -sin, ctx.interleaved), None, None, None


if triton is not None:

    @triton.jit
    def rope_kernel(x, cos, sin, y, sx, B, T, H, D2, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, BT: tl.constexpr,
                    BH: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
        """sx: strides (batch, time, head). A program holds BT tokens' angles and turns all heads of its sequences."""
        o_t, o_h = tl.program_id(0) * BT + tl.arange(0, BT)[:, None, None], tl.arange(0, BH)[None, :, None]
        o_c, o_d = tl.arange(0, BC)[None, :, None], tl.arange(0, BD)[None, None, :]  # BC: 1 row of angles or one a head
        o = (o_t.to(tl.int64) * (1 if BC == 1 else H) + o_c) * D2 + o_d  # [BT, BC, BD]
        m = (o_t < T) & (o_c < H) & (o_d < D2)
        b_cos = tl.load(cos + o, mask=m, other=0.0).to(tl.float32)
        b_sin = tl.load(sin + o, mask=m, other=0.0).to(tl.float32)
        if INVERSE:
            b_sin = -b_sin
        m = (o_t < T) & (o_h < H)
        for i in range(tl.program_id(1), B, tl.num_programs(1)):
            i_b = i.to(tl.int64)
            p_x = x + i_b * sx[0] + o_t.to(tl.int64) * sx[1] + o_h * sx[2]  # [BT, BH, 1]
            p_y = y + ((i_b * T + o_t) * H + o_h) * (2 * D2)
            if INTERLEAVED:
                o_p = tl.arange(0, 2 * BD)[None, None, :]
                b_x = tl.load(p_x + o_p, mask=m & (o_p < 2 * D2), other=0.0).to(tl.float32)  # [BT, BH, 2 BD]
                b_1, b_2 = tl.split(tl.reshape(b_x, (BT, BH, BD, 2)))
                b_y = tl.join(b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin)
                tl.store(p_y + o_p, tl.reshape(b_y, (BT, BH, 2 * BD)), mask=m & (o_p < 2 * D2))
            else:
                b_1 = tl.load(p_x + o_d, mask=m & (o_d < D2), other=0.0).to(tl.float32)  # [BT, BH, BD]
                b_2 = tl.load(p_x + D2 + o_d, mask=m & (o_d < D2), other=0.0).to(tl.float32)
                tl.store(p_y + o_d, b_1 * b_cos - b_2 * b_sin, mask=m & (o_d < D2))
                tl.store(p_y + D2 + o_d, b_2 * b_cos + b_1 * b_sin, mask=m & (o_d < D2))

    @torch.library.custom_op("kernels::rope", mutates_args=())
    def rope_op(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool,
                inverse: bool) -> torch.Tensor:
        x = x if x.stride(3) == 1 else x.contiguous()
        (B, T, H, D), y = x.shape, x.new_empty(x.shape)
        BH, BD = triton.next_power_of_2(H), triton.next_power_of_2(D // 2)
        BT = max(1, 2048 // (BH * BD))
        n_t = triton.cdiv(T, BT)
        n_b = max(1, min(B, 2 * 46 // n_t))  # > 1 if T alone does not give each multiprocessor (46: an RTX 4070) two
        rope_kernel[(n_t, n_b)](
            x, cos.contiguous(), sin.contiguous(), y, x.stride()[:3], B, T, H, D // 2, INVERSE=inverse,
            INTERLEAVED=interleaved, BT=BT, BH=BH, BC=1 if cos.ndim == 2 else BH, BD=BD, num_warps=4)
        return y

    @rope_op.register_fake
    def _(x, cos, sin, interleaved, inverse):
        return x.new_empty(x.shape)

    def save_for_backward(ctx, inputs, output):
        _, cos, sin, ctx.interleaved, ctx.inverse = inputs
        ctx.save_for_backward(cos, sin)

    def rope_backward(ctx, dy):
        return rope_op(dy, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None

    rope_op.register_autograd(rope_backward, setup_context=save_for_backward)


def rope(x, cos, sin, interleaved=False):
    """x (B, T, H, D), cos and sin (T, D/2) or (T, H, D/2) -> y like x. ValueError: shapes that do not fit."""
    B, T, H, D = x.shape
    if cos.shape != sin.shape or cos.shape not in ((T, D // 2), (T, H, D // 2)) or D % 2:
        raise ValueError(f"rope: shapes {[tuple(t.shape) for t in (x, cos, sin)]}; expected x (B, T, H, D), D even, "
                         "and cos, sin (T, D/2) or (T, H, D/2)")
    which = form(x)
    if which == "triton":
        return rope_op(x, cos, sin, interleaved, False)
    return rope_ref(x, cos, sin, interleaved) if which == "ref" else Rope.apply(x, cos, sin, interleaved)
