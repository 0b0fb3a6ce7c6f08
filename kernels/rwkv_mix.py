"""
What stands between the matrix products of RWKV-7, in one pass each
    Peng et al. 2025, arXiv:2503.14456v2, section 4

    token_shift(h, last, mus)        x_t = h_t + mu (h_{t-1} - h_t) for each mu; h_0 = last (0 without it)
    gates(k, w, a, k_k, k_a, N)      w' = -e^{-1/2} sigma(w), the log of a decay;   a' = sigma(a)
                                     kappa = k k_k of length 1 in each head of N;   k' = k (1 + (a' - 1) k_a)
                                     -> w', k', -kappa, a' kappa: what wkv7 takes
    readout(y, r, k, v, g, rho, weight, bias)   (norm(y) weight + bias + (sum r k rho) v) g,   norm and sum over each head,
                                     norm(y) = (y - mean) / sqrt(var + 64e-5)
    squared_relu(k)                  max(k, 0)^2

Shapes: h, k, w, a, y, r, v, g (B, T, C), last (B, C) or None, mu, k_k, k_a (1, 1, C), rho (H, N), weight, bias (C,), C = H N.
fp32, bf16 or fp16; parameters may be fp32 beside 16-bit tensors. Results have the dtype of h, k or g; arithmetic is fp32, so
autocast changes nothing. All are memory-bound. Autograd would keep up to ten tensors (B, T, C) for each of them; here the inputs
are kept (most of them are what a product beside it keeps anyway), squared_relu keeps its output, since 2 max(k, 0) = 2 sqrt(y).

Bytes, E per element, n = B T C: token_shift with M mixes reads n and writes M n forward (h_{t-1} is the row before, in the
cache); backward reads (1 + M) n and writes n; gates 7 and 10 n, readout 6 and 11 n, squared_relu 2 and 3 n: the floor. Parameters'
gradients: one fp32 row for every 128 tokens, summed in a fixed order.
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
    x, d = wide(h, shifted(h, last))
    return [(x + (d - x) * mu).to(h.dtype) for mu in mus]


def gates_ref(k, w, a, k_k, k_a, N):
    dtype, (k, w, a) = k.dtype, wide(k, w, a)
    a = torch.sigmoid(a)
    kappa = F.normalize((k * k_k).unflatten(-1, (-1, N)), dim=-1).flatten(-2)
    return [t.to(dtype) for t in (FASTEST * torch.sigmoid(w), k * (1 + (a - 1) * k_a), -kappa, a * kappa)]


def readout_ref(y, r, k, v, g, rho, weight, bias):
    dtype = g.dtype
    y, r, k, v, g = (t.unflatten(-1, rho.shape) for t in wide(y, r, k, v, g))  # (B, T, H, N)
    n = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, correction=0, keepdim=True) + EPS)
    o = n * weight.view_as(rho) + bias.view_as(rho) + (r * k * rho).sum(-1, keepdim=True) * v
    return (o * g).flatten(-2).to(dtype)


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


def token_shift(h, last, mus):
    """h (B, T, C), last (B, C) or None, mus: some (1, 1, C) -> as many mixes (B, T, C)."""
    which = form(h)
    return token_shift_ref(h, last, mus) if which == "ref" or h.shape[1] == 1 else TokenShift.apply(h, last, *mus)


def gates(k, w, a, k_k, k_a, N):
    """k, w, a (B, T, C), k_k, k_a (1, 1, C), heads of N -> w', k', -kappa, a' kappa (B, T, C)."""
    which = form(k)
    return gates_ref(k, w, a, k_k, k_a, N) if which == "ref" or k.shape[1] == 1 else Gates.apply(k, w, a, k_k, k_a, N)


def readout(y, r, k, v, g, rho, weight, bias):
    """y, r, k, v, g (B, T, C), rho (H, N), weight, bias (C,) -> (B, T, C) in g's dtype."""
    which = form(g)
    op = readout_ref if which == "ref" or g.shape[1] == 1 else Readout.apply
    return op(y, r, k, v, g, rho, weight, bias)


def squared_relu(k):
    """max(k, 0)^2."""
    return squared_relu_ref(k) if form(k) == "ref" else SquaredReLU.apply(k)
