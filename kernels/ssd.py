"""
State space duality: the recurrence of Mamba-2, chunk by chunk with matrix products
    Dao & Gu 2024, arXiv:2405.21060v1, section 6 and listing 1

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,   y_t = S_t C_t + D x_t           per head: S (P, N), dt_t, A, D numbers
    in a chunk of Q tokens, after the state S, with c_i = (dt_1 + ... + dt_i) A from the chunk's start, v_j = dt_j x_j,
    e_i = exp(c_i), w_j = exp(c_Q - c_j), L_ij = exp(c_i - c_j) for i >= j, else 0:
    y_i = sum_j L_ij (C_i . B_j) v_j + e_i S C_i + D x_i,    S' = e_Q S + sum_j w_j v_j B_j^T
    backward, with o = dy, R = dL/dS' of the state that the chunk leaves (after the last: dfinal), X_ij = L_ij (o_i . v_j):
    dC_i = sum_j X_ij B_j + e_i S^T o_i,      dB_j = sum_i X_ij C_i + w_j R^T v_j                (summed over the group's heads)
    dv_j = sum_i L_ij (C_i . B_j) o_i + w_j R B_j,      R' = e_Q R + sum_i e_i o_i C_i^T,        dx_j = dt_j dv_j + D o_j
    c: with W_ij = X_ij (C_i . B_j), i > j:   dL/dc_i = sum_j W_ij - sum_j W_ji + e_i o_i . S C_i - w_i v_i . R B_i
    dt_t counts in c_i of all i >= t, also beyond its chunk:  dL/d(dt_t A) = sum_{i >= t} dL/dc_i + dfinal . final
    ddt_t = A dL/d(dt_t A) + x_t . dv_t,   dA = sum_t dt_t dL/d(dt_t A),   dD = sum_t o_t . x_t

Every exponent is a difference of sums within one chunk and at most 0, so nothing overflows however small a decay is.

Shapes: x (B, T, H, P), dt (B, T, H), A, D (H,), B, C (B, T, G, N), initial (B, H, P, N) -> y (B, T, H, P) in x's dtype, final
(B, H, P, N) fp32 (fp64 for fp64). Head h has B and C of group h G / H. x, B and C of one dtype, fp32, bf16 or fp16, and of any
strides but the last, as columns of a projection are; dt > 0 (after its softplus), A < 0 and D fp32.
Sums and the state are fp32; a matrix is rounded to the inputs' dtype to be multiplied.

Kept for backward: the state before each chunk of 64 tokens. There is no Triton form yet: a GPU runs the same plain PyTorch.
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


def ssd_ref(x, dt, A, B, C, D=None, initial=None):
    """The definition, one step of time after the other; fp32 inside, fp64 for fp64."""
    dtype, heads = torch.promote_types(x.dtype, torch.float32), x.shape[2] // B.shape[2]
    v, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
    B, C = B.repeat_interleave(heads, 2), C.repeat_interleave(heads, 2)  # (B, T, H, N)
    S = v.new_zeros(*v[:, 0].shape, B.shape[3]) if initial is None else initial.to(dtype)  # (B, H, P, N)
    y = []
    for t in range(x.shape[1]):
        S = torch.exp(dt[:, t] * A)[..., None, None] * S + (dt[:, t, :, None] * v[:, t])[..., None] * B[:, t, :, None]
        y.append((S * C[:, t, :, None]).sum(3))  # (B, H, P)
    y = torch.stack(y, 1)
    return (y if D is None else y + D[:, None] * v).to(x.dtype), S


CHUNK = 64  # steps of time in one set of matrix products, in the form below


def by_group(x, G):
    """(B, Q, H, P) -> (B, G, Q, H / G * P): the heads of a group share B and C, and so a matrix product."""
    return x.reshape(*x.shape[:2], G, -1).transpose(1, 2)


def by_head(x, H):
    """(B, G, Q, H / G * P) -> (B, Q, H, P)"""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], H, -1)


class SSD(torch.autograd.Function):
    """The fast plain-PyTorch form. Kept: the state S at the start of each chunk, as (B, G, H / G * P, N)."""

    @staticmethod
    def chunk(now, x, dt, A, B, C, dtype):
        """What forward and backward compute alike for the steps `now`."""
        x, B, C = x[:, now].to(dtype), B[:, now].to(dtype).transpose(1, 2), C[:, now].to(dtype).transpose(1, 2)
        dt = dt[:, now]
        v = x * dt[..., None]  # (B, Q, H, P)
        c = (dt * A).cumsum(1)  # (B, Q, H)
        ch = c.transpose(1, 2)
        L = (ch[..., :, None] - ch[..., None, :]).clamp_(max=0).exp_()  # (B, H, Q, Q); right for j <= i
        CB = (C @ B.mT).tril_()  # (B, G, Q, Q)
        return x, dt, B, C, v, c.exp(), (c[:, -1:] - c).exp(), L.unflatten(1, (B.shape[1], -1)), CB

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial):
        (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
        dtype = torch.promote_types(x.dtype, torch.float32)
        dt, A = dt.to(dtype), A.to(dtype)
        states = dt.new_empty(-(-T // CHUNK) + 1, batch, G, H // G * P, N)  # before each chunk, and after the last
        states[0] = 0 if initial is None else initial.reshape(states.shape[1:])
        y = torch.empty_like(x)
        with torch.autocast(x.device.type, enabled=False):
            for k in range(len(states) - 1):
                now = slice(k * CHUNK, (k + 1) * CHUNK)
                X, _, b, c, v, e, w, L, CB = SSD.chunk(now, x, dt, A, B, C, dtype)
                M = (L * CB[:, :, None]).flatten(1, 2)  # (B, H, Q, Q)
                out = by_head(c @ states[k].mT, H) * e[..., None]
                out += (M @ v.transpose(1, 2)).transpose(1, 2)  # (B, Q, H, P)
                if D is not None:
                    out.addcmul_(X, D[:, None])
                y[:, now] = out
                S = states[k].view(batch, H, -1) * e[:, -1, :, None]  # (B, H, P N)
                torch.add(S.view(states[k].shape), by_group(v * w[..., None], G).mT @ b, out=states[k + 1])
        ctx.save_for_backward(x, dt, A, B, C, D, states)
        ctx.initial = initial is not None
        ctx.set_materialize_grads(False)  # an unused final brings no gradient
        return y, states[-1].reshape(batch, H, P, N).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal):
        x, dt, A, B, C, D, states = ctx.saved_tensors
        (batch, _, H, P), G, dtype = x.shape, B.shape[2], dt.dtype
        dx, ddt, dB, dC = (torch.empty_like(t) for t in (x, dt, B, C))
        dA, dD = dt.new_zeros(H), dt.new_zeros(H)
        dS = torch.zeros_like(states[0]) if dfinal is None else dfinal.to(dtype).reshape(states.shape[1:])
        dy = torch.zeros_like(x) if dy is None else dy
        with torch.autocast(x.device.type, enabled=False):
            for k in reversed(range(len(states) - 1)):
                now, S = slice(k * CHUNK, (k + 1) * CHUNK), states[k]
                X, d, b, c, v, e, w, L, CB = SSD.chunk(now, x, dt, A, B, C, dtype)
                do = dy[:, now].to(dtype)
                vh, doh = (t.transpose(1, 2).contiguous() for t in (v, do))  # (B, H, Q, P)
                M = (L * CB[:, :, None]).flatten(1, 2)
                dM = doh @ vh.mT  # (B, H, Q, Q)
                dCB = L.mul_(dM.view(L.shape)).sum(2).tril_()  # (B, G, Q, Q)
                dv = (M.mT @ doh).transpose(1, 2)  # (B, Q, H, P)
                W = M.mul_(dM)  # M_ij dL/dM_ij: what c_i gains and c_j loses
                W.diagonal(dim1=2, dim2=3).zero_()
                dc = (W.sum(3) - W.sum(2)).transpose(1, 2)  # (B, Q, H)
                # y_i = e_i S C_i
                doe = do * e[..., None]
                dc += (doe * by_head(c @ S.mT, H)).sum(3)
                doe = by_group(doe, G)
                dC[:, now] = (doe @ S + dCB @ b).transpose(1, 2)
                # S' = e_Q S + sum_j w_j v_j B_j^T
                dvs = by_head(b @ dS.mT, H) * w[..., None]  # (B, Q, H, P)
                dB[:, now] = (by_group(v * w[..., None], G) @ dS + dCB.mT @ c).transpose(1, 2)
                ds = (dvs * v).sum(3)  # c_j loses this, c_Q gains it
                # la_t = dt_t A counts in c_i for all i >= t
                carry = (dS * S).view(batch, H, -1).sum(2) * e[:, -1]  # (B, H)
                dla = dc.flip(1).cumsum(1).flip(1) + (ds.cumsum(1) - ds) + carry[:, None]
                dS = (dS.view(batch, H, -1) * e[:, -1, :, None]).view(S.shape) + doe.mT @ c
                dv = dv + dvs
                ddt[:, now] = (dv * X).sum(3) + dla * A
                dA += (dla * d).sum((0, 1))
                dX = dv * d[..., None]
                if D is not None:
                    dX.addcmul_(do, D[:, None])
                    dD += (do * X).sum((0, 1, 3))
                dx[:, now] = dX
        return dx, ddt, dA, dB, dC, dD if D is not None else None, dS.view(batch, H, P, -1) if ctx.initial else None


def ssd(x, dt, A, B, C, D=None, initial=None):
    """x (B, T, H, P), dt (B, T, H), A and D (H,), B and C (B, T, G, N), initial (B, H, P, N): the state before the first token, or zeros
    -> y (B, T, H, P) in x's dtype, final (B, H, P, N) in fp32. ValueError: shapes that do not fit."""
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    want = [(batch, T, H, P), (batch, T, H), (H,), (batch, T, G, N), (batch, T, G, N), (H,), (batch, H, P, N)]
    found = [None if t is None else tuple(t.shape) for t in (x, dt, A, B, C, D, initial)]
    if H % G or any(f not in (None, w) for f, w in zip(found, want)):
        raise ValueError(f"ssd: shapes {found}; expected x (B, T, H, P), dt (B, T, H), A (H,), B, C (B, T, G, N), D (H,), "
                         "initial (B, H, P, N), H divisible by G")
    return (ssd_ref if form(x) == "ref" else SSD.apply)(x, dt, A, B, C, D, initial)
