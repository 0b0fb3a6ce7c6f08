"""
Selective scan: the recurrence of Mamba-1
    Gu & Dao 2023, arXiv:2312.00752v2, eq. 2a, 2b and algorithm 2

    d_t = softplus(dt_t + dt_bias),  a_t = exp(d_t A)                      (E,) and (E, N): a decay for each channel and state
    s_t = a_t s_{t-1} + d_t u_t B_t                                        (E, N)
    y_t = (sum_n C_tn s_tn + D u_t) silu(z_t)                              D, z, dt_bias, initial: None leaves them out
    backward, with o = dy silu(z) and g_t = dL/ds_t = C_t o_t + a_{t+1} g_{t+1}  (after the last: dfinal), w_t = g_t a_t s_{t-1}:
    dC_t = sum_e o_t s_t,   dB_t = sum_e d_t u_t g_t,   q_t = sum_n B_t g_t,   du_t = d_t q_t + D o_t,   dD = sum o u
    dd_t = u_t q_t + sum_n A w_t,   ddt_t = dd_t (1 - exp(-d_t)),   dA = sum_t d_t w_t,   dz = dy silu'(z) (y before the gate)

Shapes: u, dt, z (B, T, E), A (E, N), B, C (B, T, N), D, dt_bias (E,), initial (B, E, N) -> y (B, T, E) in u's dtype, final
(B, E, N) fp32 (fp64 for fp64). fp32, bf16 or fp16, A, D and dt_bias may be fp32 beside 16-bit tensors; u, dt, z, B and C may be
columns of wider tensors, as those of a projection are. State and arithmetic are fp32.

The state of all tokens, (B, T, E, N), is never held: it is made 8 tokens at a time, and again in backward, from the states
before each 8 tokens, which are kept. There is no Triton form yet: a GPU runs the same plain PyTorch.
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


def selective_scan_ref(u, dt, A, B, C, D=None, z=None, dt_bias=None, initial=None):
    """The definition, one step of time after the other; fp32 inside, fp64 for fp64."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, dt, A, B, C = (t.to(dtype) for t in (u, dt, A, B, C))
    delta = torch.nn.functional.softplus(dt if dt_bias is None else dt + dt_bias)  # (B, T, E)
    s = x.new_zeros(x.shape[0], *A.shape) if initial is None else initial.to(dtype)  # (B, E, N)
    y = []
    for t in range(x.shape[1]):
        s = torch.exp(delta[:, t, :, None] * A) * s + (delta[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        y.append((s * C[:, t, None, :]).sum(2))  # (B, E)
    y = torch.stack(y, 1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(dtype))
    return y.to(u.dtype), s


LOG2E = 1.4426950408889634
CHUNK = 8  # steps of time at once in the form below


class SelectiveScan(torch.autograd.Function):
    """The fast plain-PyTorch form. What does not depend on the state is computed for CHUNK steps at once, in buffers
    that stay in the cache; one multiply-add a step is left. Kept: the state at the start of each chunk. Backward takes
    the chunks from the last to the first, runs each again, then backwards. States are (B, N, E) here: with E innermost
    a product with B_t or C_t is a row times a matrix."""

    @staticmethod
    def chunk(x, d, b, A2, a, s):
        """a_t = exp(d_t A) and s_t = a_t s_{t-1} + d_t x_t B_t for each step of a chunk that starts with state s[0]."""
        torch.mul(d[:, :, None], A2, out=a).exp2_()  # (Q, B, N, E)
        torch.mul((d * x)[:, :, None], b[..., None], out=s[1:])
        before, *after = s.unbind(0)
        for a_t, s_t in zip(a.unbind(0), after):
            s_t.addcmul_(a_t, before)
            before = s_t

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, z, dt_bias, initial):
        (batch, T, E), N = u.shape, A.shape[1]
        dtype = torch.promote_types(u.dtype, torch.float32)
        dt = dt.to(dtype)
        delta = torch.nn.functional.softplus(dt if dt_bias is None else dt + dt_bias)  # (B, T, E)
        A2 = A.to(dtype).t().contiguous() * LOG2E  # (N, E); exp(x) = exp2(x log2 e): PyTorch's exp2 is the faster
        a, s = delta.new_empty(CHUNK, batch, N, E), delta.new_empty(CHUNK + 1, batch, N, E)
        states = delta.new_empty(-(-T // CHUNK), batch, N, E)
        s[0] = 0 if initial is None else initial.transpose(1, 2)
        y, Q = torch.empty_like(u), 0
        with torch.autocast(u.device.type, enabled=False):
            for i in range(0, T, CHUNK):
                d, x, b, c, g = (None if v is None else v[:, i:i + CHUNK].transpose(0, 1).to(dtype)
                                 for v in (delta, u, B, C, z))  # (Q, B, E) and (Q, B, N)
                states[i // CHUNK] = s[0] = s[Q]
                Q = len(d)
                SelectiveScan.chunk(x, d, b, A2, a[:Q], s[:Q + 1])
                out = torch.matmul(c[:, :, None], s[1:Q + 1])[:, :, 0]  # (Q, B, E)
                if D is not None:
                    out.addcmul_(x, D)
                if z is not None:
                    out.mul_(torch.nn.functional.silu(g))
                y[:, i:i + CHUNK] = out.transpose(0, 1)
        ctx.save_for_backward(u, delta, A, B, C, D, z, states)
        ctx.optional = dt_bias is not None, initial is not None
        ctx.set_materialize_grads(False)  # an unused final brings no gradient
        return y, s[Q].transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal):
        u, delta, A, B, C, D, z, states = ctx.saved_tensors
        (_, batch, N, E), T, dtype = states.shape, u.shape[1], delta.dtype
        At = A.to(dtype).t().contiguous()  # (N, E)
        A2 = At * LOG2E
        a, s, h = (delta.new_empty(CHUNK + n, batch, N, E) for n in (0, 1, 0))
        dA, dD, G = delta.new_zeros(N, E), delta.new_zeros(E), torch.zeros_like(states[0])
        if dfinal is not None:
            G.copy_(dfinal.transpose(1, 2))
        dy = torch.zeros_like(u) if dy is None else dy
        du, ddt, dz = (None if v is None else torch.empty_like(v) for v in (u, delta, z))
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        with torch.autocast(u.device.type, enabled=False):
            for i in reversed(range(0, T, CHUNK)):
                d, x, b, c, g, do = (None if v is None else v[:, i:i + CHUNK].transpose(0, 1).to(dtype)
                                     for v in (delta, u, B, C, z, dy))
                Q = len(d)
                a_, s_, h_ = a[:Q], s[:Q + 1], h[:Q]
                s_[0] = states[i // CHUNK]
                SelectiveScan.chunk(x, d, b, A2, a_, s_)
                if z is not None:
                    out = torch.matmul(c[:, :, None], s_[1:])[:, :, 0]  # (Q, B, E)
                    if D is not None:
                        out.addcmul_(x, D)
                    dz[:, i:i + CHUNK] = torch.ops.aten.silu_backward(out.mul_(do), g).transpose(0, 1)
                    do = do * torch.nn.functional.silu(g)
                # g_t = dL/ds_t = C_t dy_t + a_{t+1} g_{t+1}, here in h
                torch.mul(do[:, :, None], c[..., None], out=h_)
                *before, after = h_.unbind(0)
                after += G
                for a_t, h_t in zip(reversed(a_.unbind(0)), reversed(before)):
                    h_t.addcmul_(a_t, after)
                    after = h_t
                torch.mul(a_[0], h_[0], out=G)
                dC[:, i:i + CHUNK] = torch.matmul(do[:, :, None], s_[1:].transpose(2, 3))[:, :, 0].transpose(0, 1)
                dB[:, i:i + CHUNK] = torch.matmul((d * x)[:, :, None], h_.transpose(2, 3))[:, :, 0].transpose(0, 1)
                dx = torch.matmul(b[:, :, None], h_)[:, :, 0]  # of d x: (Q, B, E)
                # dL/d(d_t A) = g_t a_t s_{t-1}
                h_.mul_(a_).mul_(s_[:-1])
                dd = torch.mul(h_, At, out=a_).sum(2).addcmul_(dx, x)
                # softplus'(v) = sigmoid(v) = 1 - exp(-softplus(v)), and d is the softplus
                dd.mul_(torch.expm1(-d).neg_())
                dA += torch.mul(h_, d[:, :, None], out=a_).sum((0, 1))
                dx *= d
                if D is not None:
                    dx.addcmul_(do, D)
                    dD += (do * x).sum((0, 1))
                du[:, i:i + CHUNK] = dx.transpose(0, 1)
                ddt[:, i:i + CHUNK] = dd.transpose(0, 1)
        bias, initial = ctx.optional
        return (du, ddt, dA.t(), dB, dC, dD if D is not None else None, dz, ddt.sum((0, 1)) if bias else None,
                G.transpose(1, 2) if initial else None)


def selective_scan(u, dt, A, B, C, D=None, z=None, dt_bias=None, initial=None):
    """u, dt, z (B, T, E), A (E, N), B and C (B, T, N), D and dt_bias (E,), initial (B, E, N): the state before the first token, or zeros
    -> y (B, T, E) in u's dtype, final (B, E, N) in fp32. ValueError: shapes that do not fit."""
    (batch, T, E), N = u.shape, A.shape[-1]
    want = [(batch, T, E), (batch, T, E), (E, N), (batch, T, N), (batch, T, N), (E,), (batch, T, E), (E,), (batch, E, N)]
    found = [None if t is None else tuple(t.shape) for t in (u, dt, A, B, C, D, z, dt_bias, initial)]
    if any(f not in (None, w) for f, w in zip(found, want)):
        raise ValueError(f"selective_scan: shapes {found}; expected u, dt, z (B, T, E), A (E, N), B, C (B, T, N), D, dt_bias (E,), "
                         "initial (B, E, N)")
    return (selective_scan_ref if form(u) == "ref" else SelectiveScan.apply)(u, dt, A, B, C, D, z, dt_bias, initial)
