"""
The activations of feed-forward layers

    gelu(x)           x Phi(x) in the tanh form, which is a sigmoid:  x sigma(2u),   u = sqrt(2 / pi) (x + 0.044715 x^3)
                      Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2
    bias_gelu(x, b)   gelu(x + b)
    swiglu(gate, up)  silu(gate) up,   silu(a) = a sigma(a)             Shazeer 2020, arXiv:2002.05202, eq. 6
    relu2glu(gate, up)   relu(gate)^2 up        So et al. 2021, arXiv:2109.08668 (squared ReLU); BitNet b1.58 2B4T

x, gate, up (..., F), b (F,) -> (..., F) in the dtype of the first argument: fp32, bf16 or fp16; b may be fp32 beside
16-bit x. Autocast changes nothing. Saved for backward: the inputs. Recomputed: all else, cheaper than to read it again.

Bytes, E per element, n elements: gelu and bias_gelu 2 E n forward and 3 E n backward, swiglu and relu2glu 3 E n and
5 E n: each input read once, each output written once, which is the floor. bias_gelu: b once more per program, and one
fp32 partial row of db per 64 rows or more, summed in a fixed order. Ten to thirty FLOPs an element: nothing beside the
bytes. gate and up may be the halves of one (..., 2F) tensor: they are not copied.

Plain form: F.gelu, whose autograd keeps x (or x + b in place of x). For swiglu and relu2glu autograd would keep more
than the inputs, so their backward is written by hand.
"""
import os

import torch
import torch.nn.functional as F

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


def gelu_ref(x):
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    u = (2 / torch.pi) ** 0.5 * (x32 + 0.044715 * x32**3)
    return (0.5 * x32 * (1 + torch.tanh(u))).to(x.dtype)


def bias_gelu_ref(x, b):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return gelu_ref(x.to(dtype) + b.to(dtype)).to(x.dtype)


def swiglu_ref(gate, up):
    a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (gate, up))
    return (a * torch.sigmoid(a) * b).to(gate.dtype)


def relu2glu_ref(gate, up):
    a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (gate, up))
    return (a.relu().square() * b).to(gate.dtype)


def gelu_torch(x):
    return F.gelu(x, approximate="tanh")


def bias_gelu_torch(x, b):
    return F.gelu(x + b.to(x.dtype), approximate="tanh")


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


def swiglu_torch(gate, up):
    return SwiGLU.apply(gate, up)


class ReLU2GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.relu(gate).mul_(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        r = F.relu(gate)
        dup = torch.mul(r, r).mul_(dy)
        return r.mul_(dy).mul_(up).mul_(2), dup


def relu2glu_torch(gate, up):
    return ReLU2GLU.apply(gate, up)


if triton is not None:
    # y = x s,   s = sigma(2u),   dy/dx = s + x s (1 - s) 2u',   2u' = 2 sqrt(2 / pi) (1 + 3 0.044715 x^2)
    @triton.jit
    def gelu_parts(x):
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))        # 2 sqrt(2 / pi)
        return x * s, s + x * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))

    @triton.jit
    def gelu_fwd_kernel(x, y, n, BLOCK: tl.constexpr):
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_y, _ = gelu_parts(tl.load(x + o, mask=o < n, other=0.0).to(tl.float32))
        tl.store(y + o, b_y, mask=o < n)

    @triton.jit
    def gelu_bwd_kernel(x, dy, dx, n, BLOCK: tl.constexpr):
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        _, b_d = gelu_parts(tl.load(x + o, mask=o < n, other=0.0).to(tl.float32))
        tl.store(dx + o, b_d * tl.load(dy + o, mask=o < n, other=0.0).to(tl.float32), mask=o < n)

    # A program of the bias kernels has BF columns and ROWS rows, so b is loaded once for all of them.
    @triton.jit
    def bias_gelu_fwd_kernel(x, b, y, N, n_cols, ROWS: tl.constexpr, BF: tl.constexpr):
        o_f = tl.program_id(1) * BF + tl.arange(0, BF)
        m_f = o_f < n_cols
        b_b = tl.load(b + o_f, mask=m_f, other=0.0).to(tl.float32)
        i0 = tl.program_id(0).to(tl.int64) * ROWS
        for i in range(i0, tl.minimum(i0 + ROWS, N)):
            b_y, _ = gelu_parts(tl.load(x + i * n_cols + o_f, mask=m_f, other=0.0).to(tl.float32) + b_b)
            tl.store(y + i * n_cols + o_f, b_y, mask=m_f)

    # dx = dy gelu'(x + b);   db = sum over rows of dx: a row of `part` per program, summed by PyTorch
    @triton.jit
    def bias_gelu_bwd_kernel(x, b, dy, dx, part, N, n_cols, ROWS: tl.constexpr, BF: tl.constexpr):
        o_f = tl.program_id(1) * BF + tl.arange(0, BF)
        m_f = o_f < n_cols
        b_b = tl.load(b + o_f, mask=m_f, other=0.0).to(tl.float32)
        b_db = tl.zeros((BF,), tl.float32)
        i0 = tl.program_id(0).to(tl.int64) * ROWS
        for i in range(i0, tl.minimum(i0 + ROWS, N)):
            _, b_d = gelu_parts(tl.load(x + i * n_cols + o_f, mask=m_f, other=0.0).to(tl.float32) + b_b)
            b_dx = b_d * tl.load(dy + i * n_cols + o_f, mask=m_f, other=0.0).to(tl.float32)
            tl.store(dx + i * n_cols + o_f, b_dx, mask=m_f)
            b_db += b_dx
        tl.store(part + tl.program_id(0).to(tl.int64) * n_cols + o_f, b_db, mask=m_f)

    # swiglu     y = a s u,   s = sigma(a);   da = dy u s (1 + a (1 - s)),   du = dy a s      (a = gate, u = up)
    # relu2glu   y = r r u,   r = relu(a);    da = dy u 2 r,                 du = dy r r
    @triton.jit
    def glu_fwd_kernel(gate, up, y, n_cols, stride_gate, stride_up, SQUARE: tl.constexpr, BF: tl.constexpr):
        i = tl.program_id(0).to(tl.int64)
        o_f = tl.program_id(1) * BF + tl.arange(0, BF)
        m_f = o_f < n_cols
        b_a = tl.load(gate + i * stride_gate + o_f, mask=m_f, other=0.0).to(tl.float32)
        b_u = tl.load(up + i * stride_up + o_f, mask=m_f, other=0.0).to(tl.float32)
        b_f = tl.maximum(b_a, 0.0) * b_a if SQUARE else b_a * tl.sigmoid(b_a)
        tl.store(y + i * n_cols + o_f, b_f * b_u, mask=m_f)

    @triton.jit
    def glu_bwd_kernel(gate, up, dy, dgate, dup, n_cols, stride_gate, stride_up, SQUARE: tl.constexpr,
                       BF: tl.constexpr):
        i = tl.program_id(0).to(tl.int64)
        o_f = tl.program_id(1) * BF + tl.arange(0, BF)
        m_f = o_f < n_cols
        b_a = tl.load(gate + i * stride_gate + o_f, mask=m_f, other=0.0).to(tl.float32)
        b_u = tl.load(up + i * stride_up + o_f, mask=m_f, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + i * n_cols + o_f, mask=m_f, other=0.0).to(tl.float32)
        if SQUARE:
            b_f = tl.maximum(b_a, 0.0) * b_a
            b_d = 2.0 * tl.maximum(b_a, 0.0)
        else:
            b_s = tl.sigmoid(b_a)
            b_f = b_a * b_s
            b_d = b_s * (1.0 + b_a * (1.0 - b_s))
        tl.store(dgate + i * n_cols + o_f, b_dy * b_u * b_d, mask=m_f)
        tl.store(dup + i * n_cols + o_f, b_dy * b_f, mask=m_f)

    BLOCK = 1024  # elements a program of 4 warps holds at once: 8 a thread, one 128-bit load in 16-bit types

    def columns(n_cols):
        """Elements of a row that a program takes, and how many programs a row needs."""
        bf = min(BLOCK, triton.next_power_of_2(n_cols))
        return bf, triton.cdiv(n_cols, bf)

    def bias_blocks(x):
        """Rows of a program: 64, or more so that at most 512 programs share a column; then its columns as above."""
        n_cols = x.shape[-1]
        N = x.numel() // max(1, n_cols)
        rows = max(64, triton.next_power_of_2(triton.cdiv(N, 512)))
        bf, blocks = columns(n_cols)
        return N, n_cols, (triton.cdiv(N, rows), blocks), dict(ROWS=rows, BF=bf)

    def rows_of(x):
        """(N, F) with stride 1 along F: a view where it can be, so halves of a larger tensor are not copied."""
        x = x.reshape(-1, x.shape[-1])
        return x if x.stride(1) == 1 else x.contiguous()

    @torch.library.custom_op("kernels::gelu", mutates_args=())
    def gelu_op(x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        gelu_fwd_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK)
        return y

    @torch.library.custom_op("kernels::gelu_bwd", mutates_args=())
    def gelu_bwd_op(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        x, dy = x.contiguous(), dy.contiguous()
        dx = torch.empty_like(x)
        gelu_bwd_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, dy, dx, x.numel(), BLOCK=BLOCK)
        return dx

    @torch.library.custom_op("kernels::bias_gelu", mutates_args=())
    def bias_gelu_op(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x, b = x.contiguous(), b.contiguous()
        y = torch.empty_like(x)
        N, n_cols, grid, how = bias_blocks(x)
        bias_gelu_fwd_kernel[grid](x, b, y, N, n_cols, **how)
        return y

    @torch.library.custom_op("kernels::bias_gelu_bwd", mutates_args=())
    def bias_gelu_bwd_op(x: torch.Tensor, b: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, b, dy = x.contiguous(), b.contiguous(), dy.contiguous()
        dx = torch.empty_like(x)
        N, n_cols, grid, how = bias_blocks(x)
        part = x.new_empty(grid[0], n_cols, dtype=torch.float32)
        bias_gelu_bwd_kernel[grid](x, b, dy, dx, part, N, n_cols, **how)
        return dx, part.sum(0).to(b.dtype)

    @torch.library.custom_op("kernels::glu", mutates_args=())
    def glu_op(gate: torch.Tensor, up: torch.Tensor, square: bool) -> torch.Tensor:
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        gate, up = rows_of(gate), rows_of(up)
        bf, blocks = columns(gate.shape[1])
        glu_fwd_kernel[(gate.shape[0], blocks)](
            gate, up, y, gate.shape[1], gate.stride(0), up.stride(0), SQUARE=square, BF=bf)
        return y

    @torch.library.custom_op("kernels::glu_bwd", mutates_args=())
    def glu_bwd_op(gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, square: bool
                   ) -> tuple[torch.Tensor, torch.Tensor]:
        dy = dy.contiguous()
        dgate, dup = torch.empty_like(dy), torch.empty_like(dy)
        gate, up = rows_of(gate), rows_of(up)
        bf, blocks = columns(gate.shape[1])
        glu_bwd_kernel[(gate.shape[0], blocks)](
            gate, up, dy, dgate, dup, gate.shape[1], gate.stride(0), up.stride(0), SQUARE=square, BF=bf)
        return dgate, dup

    dense = lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gelu_op.register_fake(dense)
    gelu_bwd_op.register_fake(lambda x, dy: dense(x))
    bias_gelu_op.register_fake(lambda x, b: dense(x))
    bias_gelu_bwd_op.register_fake(lambda x, b, dy: (dense(x), dense(b)))
    glu_op.register_fake(lambda gate, up, square: dense(gate))
    glu_bwd_op.register_fake(lambda gate, up, dy, square: (dense(dy), dense(dy)))

    save_inputs = lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    gelu_op.register_autograd(lambda ctx, dy: gelu_bwd_op(*ctx.saved_tensors, dy), setup_context=save_inputs)
    bias_gelu_op.register_autograd(lambda ctx, dy: bias_gelu_bwd_op(*ctx.saved_tensors, dy), setup_context=save_inputs)

    def save_glu(ctx, inputs, output):
        gate, up, ctx.square = inputs
        ctx.save_for_backward(gate, up)

    glu_op.register_autograd(lambda ctx, dy: (*glu_bwd_op(*ctx.saved_tensors, dy, ctx.square), None),
                             setup_context=save_glu)


def gelu(x):
    """Tanh-form GELU of x, any shape."""
    which = form(x)
    if which == "ref":
        return gelu_ref(x)
    return gelu_torch(x) if which == "torch" else gelu_op(x)


def bias_gelu(x, b):
    """gelu(x + b): x (..., F), b (F,) -> (..., F) in x's dtype."""
    if b.shape != x.shape[-1:]:
        raise ValueError(f"bias_gelu: b {tuple(b.shape)}, ({x.shape[-1]},) expected for x {tuple(x.shape)}")
    which = form(x)
    if which == "ref":
        return bias_gelu_ref(x, b)
    return bias_gelu_torch(x, b) if which == "torch" else bias_gelu_op(x, b)


def swiglu(gate, up):
    """silu(gate) up: two tensors of one shape and dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype} differ")
    which = form(gate)
    if which == "ref":
        return swiglu_ref(gate, up)
    return swiglu_torch(gate, up) if which == "torch" else glu_op(gate, up, False)


def relu2glu(gate, up):
    """relu(gate)^2 up: two tensors of one shape and dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"relu2glu: gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype} differ")
    which = form(gate)
    if which == "ref":
        return relu2glu_ref(gate, up)
    return relu2glu_torch(gate, up) if which == "torch" else glu_op(gate, up, True)
