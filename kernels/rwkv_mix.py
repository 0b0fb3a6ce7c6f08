"""
What stands between the matrix products of RWKV-7, in one pass each
    Peng et al. 2025, arXiv:2503.14456v2, section 4

    token_shift(h, last, mus)        x_t = h_t + mu (h_{t-1} - h_t) for each mu; h_0 = last (0 without it)
    gates(k, w, a, k_k, k_a, N)      w' = -e^{-1/2} sigma(w), the log of a decay;   a' = sigma(a)
                                     kappa = k k_k of length 1 in each head of N;   k' = k (1 + (a' - 1) k_a)
                                     -> w', k', -kappa, a' kappa: what wkv7 takes
    readout(y, r, k, v, g, rho, weight, bias)  (norm(y) weight + bias + (sum r k rho) v) g, norm and sum over each head,
                                     norm(y) = (y - mean) / sqrt(var + 64e-5)
    squared_relu(k)                  max(k, 0)^2

Shapes: h, k, w, a, y, r, v, g (B, T, C), last (B, C) or None, mu, k_k, k_a (1, 1, C), rho (H, N), weight, bias (C,),
C = H N. fp32, bf16 or fp16; parameters may be fp32 beside 16-bit tensors. Results have the dtype of h, k or g;
arithmetic is fp32, so autocast changes nothing. All are memory-bound. Autograd would keep up to ten tensors (B, T, C)
for each of them; here the inputs are kept (most of them are what a product beside it keeps anyway), squared_relu keeps
its output, since 2 max(k, 0) = 2 sqrt(y).

Bytes, E per element, n = B T C: token_shift with M mixes reads n and writes M n forward (h_{t-1} is the row before, in
the cache); backward reads (1 + M) n and writes n; gates 7 and 10 n, readout 6 and 11 n, squared_relu 2 and 3 n: the
floor. Parameters' gradients: one fp32 row for every 128 tokens, summed in a fixed order.
"""
import math
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


FASTEST = -math.exp(-0.5)  # log of the smallest decay
EPS = 64e-5  # of the norm in readout


def wide(*tensors):
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def shifted(h, last):
    return F.pad(h, (0, 0, 1, -1)) if last is None else torch.cat([last[:, None].to(h.dtype), h[:, :-1]], 1)


def token_shift_ref(h, last, mus):
    x, before = wide(h, shifted(h, last))
    return [torch.lerp(x, before, mu.to(x.dtype)).to(h.dtype) for mu in mus]


def gates_ref(k, w, a, k_k, k_a, N):
    dtype, (k, w, a) = k.dtype, wide(k, w, a)
    a = torch.sigmoid(a)
    kappa = F.normalize((k * k_k).unflatten(-1, (-1, N)), dim=-1).flatten(-2)
    return [t.to(dtype) for t in (FASTEST * torch.sigmoid(w), torch.lerp(k, k * a, k_a.to(k.dtype)), -kappa, a * kappa)]


def readout_ref(y, r, k, v, g, rho, weight, bias):
    dtype, H = g.dtype, len(rho)
    y, r, k, v, g = wide(y, r, k, v, g)
    n = F.group_norm(y.flatten(0, 1), H, weight.to(y.dtype), bias.to(y.dtype), EPS).view_as(y)
    r, k, v = (t.unflatten(-1, rho.shape) for t in (r, k, v))  # (B, T, H, N)
    bonus = (r * k * rho).sum(-1, keepdim=True) * v
    return ((n + bonus.flatten(-2)) * g).to(dtype)


def squared_relu_ref(k):
    return torch.relu(k).square()


class TokenShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, last, *mus):
        ctx.save_for_backward(h, last, *mus)
        d = shifted(h, last).sub_(h)
        return tuple(torch.addcmul(h, d, mu.to(h.dtype)) for mu in mus)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dxs):
        h, last, *mus = ctx.saved_tensors
        d = shifted(h, last).sub_(h)
        dmus = [(dx * d).sum((0, 1), keepdim=True).to(mu.dtype) for dx, mu in zip(dxs, mus)]
        dh, before = dxs[0].clone(), dxs[0] * mus[0].to(h.dtype)  # before: what goes to h_{t-1}
        for dx, mu in zip(dxs[1:], mus[1:]):
            dh.add_(dx)
            before.addcmul_(dx, mu.to(h.dtype))
        dh.sub_(before)[:, :-1].add_(before[:, 1:])
        return dh, None if last is None else before[:, 0].to(last.dtype), *dmus


class Gates(torch.autograd.Function):
    @staticmethod
    def parts(k, a, k_k, N):
        k, a = wide(k, a)
        p = (k * k_k).unflatten(-1, (-1, N))  # (B, T, H, N)
        length = torch.linalg.vector_norm(p, dim=-1, keepdim=True).clamp_(min=1e-12)
        return k, a.sigmoid(), p.div_(length), length

    @staticmethod
    def forward(ctx, k, w, a, k_k, k_a, N):
        ctx.save_for_backward(k, w, a, k_k, k_a)
        ctx.N, dtype = N, k.dtype
        k, a, kappa, _ = Gates.parts(k, a, k_k, N)
        rate, kappa = (a - 1).mul_(k_a).add_(1), kappa.flatten(-2)
        w = wide(w)[0].sigmoid().mul_(FASTEST)
        return tuple(t.to(dtype) for t in (w, rate.mul_(k), -kappa, kappa.mul_(a)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dw, dk_out, dminus, db):
        k, w, a, k_k, k_a = ctx.saved_tensors
        dtype, (dw, dk_out, dminus, db) = k.dtype, wide(dw, dk_out, dminus, db)
        k, a, kappa, length = Gates.parts(k, a, k_k, ctx.N)
        dw = torch.ops.aten.sigmoid_backward(dw, wide(w)[0].sigmoid()).mul_(FASTEST)
        # kappa = p / |p|:   dp = (dkappa - kappa (kappa . dkappa)) / |p|
        dkappa = (db * a).sub_(dminus).unflatten(-1, (-1, ctx.N))
        dp = dkappa.addcmul_(kappa, (kappa * dkappa).sum(-1, keepdim=True), value=-1).div_(length).flatten(-2)
        dk_k = (dp * k).sum((0, 1), keepdim=True)
        g, rate = dk_out * k, a - 1
        da = (g * k_a).addcmul_(db, kappa.flatten(-2))
        dk_a = g.mul_(rate).sum((0, 1), keepdim=True)
        dk = dp.mul_(k_k).addcmul_(dk_out, rate.mul_(k_a).add_(1))
        da = torch.ops.aten.sigmoid_backward(da, a)
        return dk.to(dtype), dw.to(dtype), da.to(dtype), dk_k.to(k_k.dtype), dk_a.to(k_a.dtype), None


class Readout(torch.autograd.Function):
    @staticmethod
    def parts(y, r, k, v, g, rho):
        y, r, k, v, g = (t.unflatten(-1, rho.shape) for t in wide(y, r, k, v, g))  # (B, T, H, N)
        n = y - y.mean(-1, keepdim=True)
        rstd = torch.linalg.vector_norm(n, dim=-1, keepdim=True).square_().div_(n.shape[-1]).add_(EPS).rsqrt_()
        return n.mul_(rstd), rstd, r, k, v, g, (r * k).mul_(rho).sum(-1, keepdim=True)

    @staticmethod
    def forward(ctx, y, r, k, v, g, rho, weight, bias):
        ctx.save_for_backward(y, r, k, v, g, rho, weight, bias)
        n, _, _, _, v, gate, bonus = Readout.parts(y, r, k, v, g, rho)
        return n.mul_(weight.view_as(rho)).add_(bias.view_as(rho)).addcmul_(bonus, v).mul_(gate).flatten(-2).to(g.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        *ins, rho, weight, bias = ctx.saved_tensors
        n, rstd, r, k, v, g, bonus = Readout.parts(*ins, rho)
        w, dout = weight.view_as(rho), wide(dout)[0].unflatten(-1, rho.shape)
        dg = (n * w).add_(bias.view_as(rho)).addcmul_(bonus, v).mul_(dout)
        do = dout * g
        dbonus = (do * v).sum(-1, keepdim=True)  # (B, T, H, 1)
        dv, t = do * bonus, dbonus * rho
        dr, dk = t * k, t.mul_(r)
        drho = (r * k).mul_(dbonus).sum((0, 1))
        dbias, dweight = do.sum((0, 1)).flatten(), (do * n).sum((0, 1)).flatten()
        # n = (y - mean) rstd:   dy = rstd (dn - mean(dn) - n mean(dn n))
        dn = do.mul_(w)
        inner = (dn * n).mean(-1, keepdim=True)
        dy = dn.sub_(dn.mean(-1, keepdim=True)).addcmul_(n, inner, value=-1).mul_(rstd)
        grads = [t.flatten(-2).to(x.dtype) for t, x in zip((dy, dr, dk, dv, dg), ins)]
        return *grads, drho.to(rho.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype)


class SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k):
        y = torch.relu(k).square_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return torch.sqrt(y).mul_(dy).mul_(2)


if triton is not None:
    # token_shift: a program has ROWS tokens of one sequence and BC channels. The others: the channels of one head and
    # ROWS of the B T tokens, BM at a time, so that sums over a head are sums over a row. A parameter's gradient: each
    # program writes the sum over its tokens, PyTorch adds these up.

    @triton.jit
    def load(x, o, m):
        return tl.load(x + o, mask=m, other=0.0).to(tl.float32)

    @triton.jit
    def sigmoid(x):
        return 1.0 / (1.0 + tl.exp(-x))

    @triton.jit
    def shift_tile(h, last, T, C, ROWS: tl.constexpr, BC: tl.constexpr):
        """-> o_t, o_c, mask, offsets, h_t and h_{t-1} [ROWS, BC]."""
        i_b, o_t = tl.program_id(2).to(tl.int64), tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
        o_c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
        m, o = (o_t < T) & (o_c < C), (i_b * T + o_t) * C + o_c
        before = load(h, o - C, m & (o_t > 0))
        if last is not None:
            before += load(last, i_b * C + o_c, (o_c < C) & (o_t == 0))
        return o_t, o_c, m, o, load(h, o, m), before

    @triton.jit
    def shift_fwd_kernel(h, last, mus, xs, T, C, M: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr):
        o_t, o_c, m, o, x, before = shift_tile(h, last, T, C, ROWS, BC)
        for n in tl.static_range(M):
            tl.store(xs[n] + o, x + (before - x) * load(mus[n], o_c, o_c < C), mask=m)

    # dh_t = sum_mu dx_t (1 - mu) + dx_{t+1} mu,   dmu = sum_t dx_t (h_{t-1} - h_t)

    @triton.jit
    def shift_bwd_kernel(h, last, mus, dxs, dh, dmu, T, C, M: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr):
        """dmu: (M, programs of one mu's channels, C)."""
        o_t, o_c, m, o, x, before = shift_tile(h, last, T, C, ROWS, BC)
        n_p = tl.num_programs(1) * tl.num_programs(2)
        i_p = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        b_dh = tl.zeros([ROWS, BC], tl.float32)
        for n in tl.static_range(M):
            mu = load(mus[n], o_c, o_c < C)
            dx = load(dxs[n], o, m)
            b_dh += dx * (1 - mu) + load(dxs[n], o + C, m & (o_t < T - 1)) * mu
            tl.store(dmu + (n * n_p + i_p) * C + o_c, tl.sum(dx * (before - x), 0, keep_dims=True), mask=o_c < C)
        tl.store(dh + o, b_dh, mask=m)

    @triton.jit
    def head_tile(n, R, C, N, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        """-> offsets and mask [BM, BN] of the n-th tile of this program's tokens, in its head."""
        o_m, o_n = tl.program_id(1) * ROWS + n * BM + tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
        return o_m.to(tl.int64) * C + tl.program_id(0) * N + o_n, (o_m < R) & (o_n < N)

    @triton.jit
    def gates_fwd_kernel(k, w, a, k_k, k_a, w_out, k_out, minus, b, R, C, N: tl.constexpr, ROWS: tl.constexpr,
                         BM: tl.constexpr, BN: tl.constexpr, FASTEST: tl.constexpr):
        o_p = tl.program_id(0) * N + tl.arange(0, BN)[None, :]
        m_p = tl.arange(0, BN)[None, :] < N
        b_kk, b_ka = load(k_k, o_p, m_p), load(k_a, o_p, m_p)
        for n in range(0, ROWS // BM):
            o, m = head_tile(n, R, C, N, ROWS, BM, BN)
            b_k, b_a = load(k, o, m), sigmoid(load(a, o, m))
            p = b_k * b_kk
            kappa = p / tl.maximum(tl.sqrt(tl.sum(p * p, 1, keep_dims=True)), 1e-12)
            tl.store(w_out + o, FASTEST * sigmoid(load(w, o, m)), mask=m)
            tl.store(k_out + o, b_k * (1 + (b_a - 1) * b_ka), mask=m)
            tl.store(minus + o, -kappa, mask=m)
            tl.store(b + o, kappa * b_a, mask=m)

    # kappa = p / |p|, p = k k_k:   dp = (dkappa - kappa (kappa . dkappa)) / |p|,   dkappa = a db - dminus

    @triton.jit
    def gates_bwd_kernel(k, w, a, k_k, k_a, dw_out, dk_out, dminus, db, dk, dw, da, dparams, R, C, N: tl.constexpr,
                         ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FASTEST: tl.constexpr):
        """dparams: (2, programs of one head, C) for k_k and k_a."""
        o_p = tl.program_id(0) * N + tl.arange(0, BN)[None, :]
        m_p = tl.arange(0, BN)[None, :] < N
        b_kk, b_ka = load(k_k, o_p, m_p), load(k_a, o_p, m_p)
        dkk, dka = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
        for n in range(0, ROWS // BM):
            o, m = head_tile(n, R, C, N, ROWS, BM, BN)
            b_k, b_a = load(k, o, m), sigmoid(load(a, o, m))
            p = b_k * b_kk
            length = tl.maximum(tl.sqrt(tl.sum(p * p, 1, keep_dims=True)), 1e-12)
            kappa = p / length
            b_db, b_dk = load(db, o, m), load(dk_out, o, m)
            dkappa = b_db * b_a - load(dminus, o, m)
            dp = (dkappa - kappa * tl.sum(kappa * dkappa, 1, keep_dims=True)) / length
            dkk += dp * b_k
            dka += b_dk * b_k * (b_a - 1)
            tl.store(dk + o, dp * b_kk + b_dk * (1 + (b_a - 1) * b_ka), mask=m)
            tl.store(da + o, (b_dk * b_k * b_ka + b_db * kappa) * b_a * (1 - b_a), mask=m)
            s = sigmoid(load(w, o, m))
            tl.store(dw + o, load(dw_out, o, m) * FASTEST * s * (1 - s), mask=m)
        dparams += tl.program_id(1) * C + o_p
        tl.store(dparams, tl.sum(dkk, 0, keep_dims=True), mask=m_p)
        tl.store(dparams + tl.num_programs(1) * C, tl.sum(dka, 0, keep_dims=True), mask=m_p)

    @triton.jit
    def readout_tile(y, r, k, v, rho, o, m, N: tl.constexpr, EPS: tl.constexpr):
        """-> n = norm(y), 1 / its deviation, r, k, v, sum r k rho."""
        b_r, b_k, b_v, n = load(r, o, m), load(k, o, m), load(v, o, m), load(y, o, m)
        n = tl.where(m, n - tl.sum(n, 1, keep_dims=True) / N, 0.0)
        rstd = tl.rsqrt(tl.sum(n * n, 1, keep_dims=True) / N + EPS)
        return n * rstd, rstd, b_r, b_k, b_v, tl.sum(b_r * b_k * rho, 1, keep_dims=True)

    @triton.jit
    def readout_fwd_kernel(y, r, k, v, g, rho, weight, bias, out, R, C, N: tl.constexpr, ROWS: tl.constexpr,
                           BM: tl.constexpr, BN: tl.constexpr, EPS: tl.constexpr):
        o_p = tl.program_id(0) * N + tl.arange(0, BN)[None, :]
        m_p = tl.arange(0, BN)[None, :] < N
        b_rho, b_weight, b_bias = load(rho, o_p, m_p), load(weight, o_p, m_p), load(bias, o_p, m_p)
        for i in range(0, ROWS // BM):
            o, m = head_tile(i, R, C, N, ROWS, BM, BN)
            n, rstd, b_r, b_k, b_v, bonus = readout_tile(y, r, k, v, b_rho, o, m, N, EPS)
            tl.store(out + o, (n * b_weight + b_bias + bonus * b_v) * load(g, o, m), mask=m)

    # n = (y - mean) rstd:   dy = rstd (dn - mean(dn) - n mean(dn n));   s = sum r k rho: ds = sum do v

    @triton.jit
    def readout_bwd_kernel(y, r, k, v, g, rho, weight, bias, dout, dy, dr, dk, dv, dg, dparams, R, C, N: tl.constexpr,
                           ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EPS: tl.constexpr):
        """dparams: (3, programs of one head, C) for rho, weight and bias."""
        o_p = tl.program_id(0) * N + tl.arange(0, BN)[None, :]
        m_p = tl.arange(0, BN)[None, :] < N
        b_rho, b_weight, b_bias = load(rho, o_p, m_p), load(weight, o_p, m_p), load(bias, o_p, m_p)
        drho, dweight, dbias = (tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32),
                                tl.zeros([BM, BN], tl.float32))
        for i in range(0, ROWS // BM):
            o, m = head_tile(i, R, C, N, ROWS, BM, BN)
            n, rstd, b_r, b_k, b_v, bonus = readout_tile(y, r, k, v, b_rho, o, m, N, EPS)
            b_do = load(dout, o, m)
            tl.store(dg + o, b_do * (n * b_weight + b_bias + bonus * b_v), mask=m)
            b_do *= load(g, o, m)
            ds = tl.sum(b_do * b_v, 1, keep_dims=True)
            tl.store(dv + o, b_do * bonus, mask=m)
            tl.store(dr + o, ds * b_rho * b_k, mask=m)
            tl.store(dk + o, ds * b_rho * b_r, mask=m)
            drho += ds * b_r * b_k
            dbias += b_do
            dweight += b_do * n
            dn = b_do * b_weight
            tl.store(dy + o, rstd * (dn - tl.sum(dn, 1, keep_dims=True) / N
                                     - n * (tl.sum(dn * n, 1, keep_dims=True) / N)), mask=m)
        dparams += tl.program_id(1) * C + o_p
        tl.store(dparams, tl.sum(drho, 0, keep_dims=True), mask=m_p)
        tl.store(dparams + tl.num_programs(1) * C, tl.sum(dweight, 0, keep_dims=True), mask=m_p)
        tl.store(dparams + 2 * tl.num_programs(1) * C, tl.sum(dbias, 0, keep_dims=True), mask=m_p)

    @triton.jit
    def relu2_kernel(x, dy, out, n, BLOCK: tl.constexpr):
        """max(x, 0)^2 or, with dy, the gradient: x is then that square."""
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_x = load(x, o, o < n)
        if dy is None:
            b_x = tl.maximum(b_x, 0.0)
            b_x *= b_x
        else:
            b_x = 2 * tl.sqrt(b_x) * load(dy, o, o < n)
        tl.store(out + o, b_x, mask=o < n)

    def shift_grid(h):
        (B, T, C), how = h.shape, dict(ROWS=16, BC=128, num_warps=4)
        return (triton.cdiv(C, how["BC"]), triton.cdiv(T, how["ROWS"]), B), how

    def head_grid(x, N):
        """BM x BN is 1024 elements, 8 a thread: up to 14 of these tiles are alive at once."""
        BN = max(2, triton.next_power_of_2(N))
        BM = max(1, 1024 // BN)
        rows = max(128, BM)
        R, C = x.numel() // x.shape[-1], x.shape[-1]
        return (C // N, triton.cdiv(R, rows)), (R, C), dict(N=N, ROWS=rows, BM=BM, BN=BN, num_warps=4)

    Tensors = list[torch.Tensor]

    @torch.library.custom_op("kernels::token_shift", mutates_args=())
    def token_shift_op(h: torch.Tensor, last: torch.Tensor | None, mus: Tensors) -> Tensors:
        grid, how = shift_grid(h)
        xs = [h.new_empty(h.shape) for _ in mus]
        shift_fwd_kernel[grid](h, last, tuple(mus), tuple(xs), *h.shape[1:], M=len(mus), **how)
        return xs

    @torch.library.custom_op("kernels::token_shift_bwd", mutates_args=())
    def token_shift_bwd_op(h: torch.Tensor, last: torch.Tensor | None, mus: Tensors, dxs: Tensors) -> Tensors:
        """-> dh, and (M, C) of all mus."""
        grid, how = shift_grid(h)
        dh, dmu = h.new_empty(h.shape), h.new_empty(len(mus), grid[1] * grid[2], h.shape[2], dtype=torch.float32)
        shift_bwd_kernel[grid](h, last, tuple(mus), tuple(dxs), dh, dmu, *h.shape[1:], M=len(mus), **how)
        return [dh, dmu.sum(1)]

    @torch.library.custom_op("kernels::rwkv_gates", mutates_args=())
    def gates_op(k: torch.Tensor, w: torch.Tensor, a: torch.Tensor, k_k: torch.Tensor, k_a: torch.Tensor,
                 N: int) -> Tensors:
        grid, sizes, how = head_grid(k, N)
        outs = [k.new_empty(k.shape) for _ in range(4)]
        gates_fwd_kernel[grid](k, w, a, k_k, k_a, *outs, *sizes, FASTEST=FASTEST, **how)
        return outs

    @torch.library.custom_op("kernels::rwkv_gates_bwd", mutates_args=())
    def gates_bwd_op(k: torch.Tensor, w: torch.Tensor, a: torch.Tensor, k_k: torch.Tensor, k_a: torch.Tensor, N: int,
                     douts: Tensors) -> Tensors:
        """-> dk, dw, da, and (2, C) for k_k and k_a."""
        grid, (R, C), how = head_grid(k, N)
        grads, dparams = [k.new_empty(k.shape) for _ in range(3)], k.new_empty(2, grid[1], C, dtype=torch.float32)
        gates_bwd_kernel[grid](k, w, a, k_k, k_a, *douts, *grads, dparams, R, C, FASTEST=FASTEST, **how)
        return [*grads, dparams.sum(1)]

    @torch.library.custom_op("kernels::rwkv_readout", mutates_args=())
    def readout_op(y: torch.Tensor, r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
                   rho: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        grid, sizes, how = head_grid(g, rho.shape[1])
        out = g.new_empty(g.shape)
        readout_fwd_kernel[grid](y, r, k, v, g, rho, weight, bias, out, *sizes, EPS=EPS, **how)
        return out

    @torch.library.custom_op("kernels::rwkv_readout_bwd", mutates_args=())
    def readout_bwd_op(y: torch.Tensor, r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
                       rho: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dout: torch.Tensor) -> Tensors:
        """-> dy, dr, dk, dv, dg, and (3, C) for rho, weight and bias."""
        grid, (R, C), how = head_grid(g, rho.shape[1])
        grads, dparams = ([x.new_empty(x.shape) for x in (y, r, k, v, g)],
                          g.new_empty(3, grid[1], C, dtype=torch.float32))
        readout_bwd_kernel[grid](y, r, k, v, g, rho, weight, bias, dout, *grads, dparams, R, C, EPS=EPS, **how)
        return [*grads, dparams.sum(1)]

    @torch.library.custom_op("kernels::squared_relu", mutates_args=())
    def squared_relu_op(x: torch.Tensor, dy: torch.Tensor | None) -> torch.Tensor:
        """max(x, 0)^2; with dy, x being that square: the gradient of what it is the square of."""
        out = x.new_empty(x.shape)
        relu2_kernel[(triton.cdiv(x.numel(), 1024),)](x, dy, out, x.numel(), BLOCK=1024, num_warps=4)
        return out

    like = lambda *ts: [t.new_empty(t.shape) for t in ts]
    fp32 = lambda x, n: x.new_empty(n, x.shape[-1], dtype=torch.float32)
    token_shift_op.register_fake(lambda h, last, mus: like(*[h] * len(mus)))
    token_shift_bwd_op.register_fake(lambda h, last, mus, dxs: [*like(h), fp32(h, len(mus))])
    gates_op.register_fake(lambda k, *_: like(k, k, k, k))
    gates_bwd_op.register_fake(lambda k, *_: [*like(k, k, k), fp32(k, 2)])
    readout_op.register_fake(lambda y, r, k, v, g, *_: g.new_empty(g.shape))
    readout_bwd_op.register_fake(lambda y, r, k, v, g, *_: [*like(y, r, k, v, g), fp32(g, 3)])
    squared_relu_op.register_fake(lambda x, dy: x.new_empty(x.shape))

    def save_inputs(ctx, inputs, output):
        *first, final = inputs  # token_shift's mus are a list
        ctx.save_for_backward(*first, *(final if isinstance(final, (list, tuple)) else [final]))

    def token_shift_backward(ctx, dxs):
        h, last, *mus = ctx.saved_tensors
        dh, dmu = token_shift_bwd_op(h, last, mus, [dx.contiguous() for dx in dxs])
        dlast = None
        if last is not None:
            dlast = sum(dx[:, 0].float() * mu[0] for dx, mu in zip(dxs, mus)).to(last.dtype)
        return dh, dlast, [d.view(mu.shape).to(mu.dtype) for d, mu in zip(dmu, mus)]

    def save_gates(ctx, inputs, output):
        *tensors, ctx.N = inputs
        ctx.save_for_backward(*tensors)

    def gates_backward(ctx, douts):
        *tensors, k_k, k_a = ctx.saved_tensors  # one look: activation checkpointing makes them again at each
        dk, dw, da, dparams = gates_bwd_op(*tensors, k_k, k_a, ctx.N, [d.contiguous() for d in douts])
        return dk, dw, da, dparams[0].view(k_k.shape).to(k_k.dtype), dparams[1].view(k_a.shape).to(k_a.dtype), None

    def readout_backward(ctx, dout):
        *tensors, rho, weight, bias = ctx.saved_tensors
        *grads, dparams = readout_bwd_op(*tensors, rho, weight, bias, dout.contiguous())
        return *grads, *(d.view(p.shape).to(p.dtype) for d, p in zip(dparams, (rho, weight, bias)))

    token_shift_op.register_autograd(token_shift_backward, setup_context=save_inputs)
    gates_op.register_autograd(gates_backward, setup_context=save_gates)
    readout_op.register_autograd(readout_backward, setup_context=save_inputs)
    squared_relu_op.register_autograd(
        lambda ctx, dy: (squared_relu_op(ctx.saved_tensors[0], dy.contiguous()), None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output))


def token_shift(h, last, mus):
    """h (B, T, C), last (B, C) or None, mus: some (1, 1, C) -> as many mixes (B, T, C)."""
    which = form(h)
    if which == "triton":
        return token_shift_op(h.contiguous(), None if last is None else last.contiguous(), list(mus))
    return token_shift_ref(h, last, mus) if which == "ref" or h.shape[1] == 1 else TokenShift.apply(h, last, *mus)


def gates(k, w, a, k_k, k_a, N):
    """k, w, a (B, T, C), k_k, k_a (1, 1, C), heads of N -> w', k', -kappa, a' kappa (B, T, C)."""
    which = form(k)
    if which == "triton":
        return gates_op(k.contiguous(), w.contiguous(), a.contiguous(), k_k, k_a, N)
    return gates_ref(k, w, a, k_k, k_a, N) if which == "ref" or k.shape[1] == 1 else Gates.apply(k, w, a, k_k, k_a, N)


def readout(y, r, k, v, g, rho, weight, bias):
    """y, r, k, v, g (B, T, C), rho (H, N), weight, bias (C,) -> (B, T, C) in g's dtype."""
    which = form(g)
    if which == "triton":
        return readout_op(*(x.contiguous() for x in (y, r, k, v, g)), rho, weight, bias)
    op = readout_ref if which == "ref" or g.shape[1] == 1 else Readout.apply
    return op(y, r, k, v, g, rho, weight, bias)


def squared_relu(k):
    """max(k, 0)^2."""
    which = form(k)
    if which == "triton":
        return squared_relu_op(k.contiguous(), None)
    return squared_relu_ref(k) if which == "ref" else SquaredReLU.apply(k)
