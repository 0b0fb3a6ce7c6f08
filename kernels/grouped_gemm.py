"""
The experts of a mixture-of-experts layer: grouped matrix products over tokens sorted by expert, none padded or dropped
    Gale et al. 2022, MegaBlocks, arXiv:2211.15841 (dropless); Shazeer 2020, arXiv:2002.05202 (gated linear units)

    y_n      = sum_k p_nk w2_e h_nk,   h_nk = act(w1_e x_n) * (w3_e x_n),   e = chosen_nk   act: silu or tanh-form gelu
    backward, a choice:   d = w2_e^T dy_n;  dp_nk = d . h_nk;  dh = p_nk d;  da = dh w3 x act'(w1 x);  db = dh act(w1 x)
              an expert:  dw2_e = sum dy_n (p h)^T,   dw13_e = sum (da, db) x_n^T;   dx_n = sum_k w13_e^T (da, db)

Shapes: x (N, C), w13 (E, 2F, C): w1 above w3, w2 (E, C, F), chosen (N, K) int64 in [0, E), weights p (N, K) -> y (N, C)
in x's dtype. x, w13, w2 share a dtype, fp32, bf16 or fp16 (under autocast they are cast to it); p is better fp32.
E <= 1024. An expert may have any number of tokens, also none: its gradients are then zeros. All sums are fp32.

The N K choices are sorted by expert (a stable sort, so results repeat), and each expert's products run over its rows;
the sorted order exists as indices only, x and dy are gathered where a product reads them. Saved: x, the weights, what
the products w1 x and w3 x gave (N K 2F values), and the order; h is computed again, and w2 h is not needed: dp is taken
on the other side of w2.
FLOPs: 6 N K C F forward, 12 backward. None is spent on rows that are not there but in the last tile of each expert.

Triton form: no sizes are read back. The grid has ceil(N K / BM) + E row tiles, the most that E groups can need; each
program finds its expert and rows from the E group ends, or ends at once. The five products are two kernels: rows times
an expert's matrix (forward with the gated unit in its epilogue), and for the weights' gradients a loop over an expert's
rows, so there are no atomics.
Bytes: a tile of rows reads its BM rows once per column tile, mostly from L2; device memory sees each expert's weights
once per product and the rows about once: with many tokens per expert (N K / E above some 300 in bf16) the tensor cores
are the limit, below that the weights.

Plain form: the same on a CPU, a loop over the experts with products written into views of one tensor, gradients too, so
that what lies between two products of an expert stays in the cache. The sizes are read back, which costs nothing there.
The gated unit is kernels/activation.py's. w2 h is saved too, N K C values: dp from it, and p applied to dy instead of h
and d, spare four passes over N K F values where bandwidth is scarce.
"""
import functools
import os

import torch
import torch.nn.functional as F

from .activation import glu, glu_grad

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
    kernels = x.is_cuda and triton is not None and x.dtype != torch.float64  # which compute in fp32
    return KERNELS or ("triton" if kernels else "torch")


def custom_op(name, mutates_args=()):
    """torch.library.custom_op, run on the GPU of its first tensor: Triton launches on whichever is the current one."""
    def register(f):
        @functools.wraps(f)
        def run(*args):
            flat = (t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if torch.is_tensor(t))
            with torch.cuda.device_of(next(flat)):
                return f(*args)

        return torch.library.custom_op(name, run, mutates_args=mutates_args)

    return register
# ----- end -----


# ----- product (shared) -----
# A CPU's products in fp32 are MKL's, which makes no use of AVX-512 on AMD's CPUs; oneDNN does (bench/RESULTS.md).
CPU = getattr(torch.cpu, "get_capabilities", dict)()
MKL_IS_SLOW = (torch.backends.mkldnn.is_available() and CPU.get("cpu_name", "").startswith("AMD")
               and CPU.get("avx512_f", False))


def product(x, w, out=None, add=False):
    """x w^T, x (M, K), w (N, K) -> (M, N): a new tensor, or into out, or added to it. For use in autograd.Functions."""
    slow = MKL_IS_SLOW and x.is_cpu and x.dtype == w.dtype == torch.float32 and x.numel()
    if slow and not torch.compiler.is_compiling():  # Inductor chooses among its own
        y = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        return y if out is None else out.add_(y) if add else out.copy_(y)
    return out.addmm_(x, w.t()) if add else torch.mm(x, w.t(), out=out)
# ----- end -----


def expert_mlp_ref(x, w13, w2, chosen, weights, act="silu"):
    """The definition, one token at a time; fp32 inside, fp64 for fp64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = []
    for x_n, e_n, p_n in zip(x.to(dtype), chosen.tolist(), weights.to(dtype)):
        y = torch.zeros_like(x_n)
        for e, p in zip(e_n, p_n):
            gate, up = (w13[e].to(dtype) @ x_n).chunk(2)
            h = (F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")) * up
            y = y + p * (w2[e].to(dtype) @ h)
        rows.append(y)
    return torch.stack(rows).to(x.dtype)


class ExpertMLP(torch.autograd.Function):
    """The plain form: per expert two products forward and four backward, on views of the sorted rows. In 16 bits, and
    where fp32 is oneDNN's, each expert's rows are filled up to a multiple of 32: oneDNN compiles a product for each new
    shape, which takes longer than the product."""

    @staticmethod
    def forward(ctx, x, w13, w2, chosen, weights, act):
        (N, K), (E, C, f), unit = chosen.shape, w2.shape, 1 if x.dtype.itemsize > 2 and not MKL_IS_SLOW else 32
        counts = uneven(N * K, E) if fake(chosen) else chosen.flatten().bincount(minlength=E).tolist()
        sizes = [-(-n // unit) * unit for n in counts]
        starts = [sum(sizes[:e]) for e in range(E)]
        at = torch.cat([torch.arange(i, i + n, device=x.device) for i, n in zip(starts, counts)])  # (NK,) sorted -> row
        order = chosen.flatten().argsort(stable=True)                       # (NK,)  sorted choice -> choice
        place = torch.empty_like(order).scatter_(0, order, at).view(N, K)   # choice -> row
        token = order.new_zeros(sum(sizes)).scatter_(0, at, order // K)     # row -> token; fillers read token 0
        gu, y = x.new_empty(len(token), 2 * f), x.new_empty(len(token), C)
        for e, (rows, gu_e, y_e) in enumerate(zip(*(t.split(sizes) for t in (token, gu, y)))):
            if sizes[e]:
                product(x.index_select(0, rows), w13[e], out=gu_e)
                product(glu(gu_e[:, :f], gu_e[:, f:], act), w2[e], out=y_e)
        ctx.save_for_backward(x, w13, w2, weights, token, place, gu, y)
        ctx.sizes, ctx.act = sizes, act
        return combine_torch(y, place, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, w13, w2, weights, token, place, gu, y = ctx.saved_tensors
        f = w2.shape[2]
        p = x.new_zeros(len(token)).scatter_(0, place.flatten(), weights.flatten().to(x.dtype))[:, None]  # (rows, 1)
        dw13, dw2, dx, dp = torch.empty_like(w13), torch.empty_like(w2), torch.empty_like(y), y.new_empty(len(y))
        parts = [t.split(ctx.sizes) for t in (token, gu, y, p, dx, dp)]
        for e, (rows, gu_e, y_e, p_e, dx_e, dp_e) in enumerate(zip(*parts)):
            if not ctx.sizes[e]:
                dw13[e].zero_(), dw2[e].zero_()
                continue
            d, gate, up = dout.index_select(0, rows), gu_e[:, :f], gu_e[:, f:]
            torch.sum(d * y_e, 1, out=dp_e)
            d *= p_e                                                        # 0 where rows only fill up
            torch.mm(d.t(), glu(gate, up, ctx.act), out=dw2[e])
            dgu, dh = torch.empty_like(gu_e), product(d, w2[e].t())                    # (n, 2F), (n, F)
            glu_grad(gate, up, dh, dgu[:, :f], dgu[:, f:], ctx.act)
            torch.mm(dgu.t(), x.index_select(0, rows), out=dw13[e])
            product(dgu, w13[e].t(), out=dx_e)
        return combine_torch(dx, place, None), dw13, dw2, None, dp[place].to(weights.dtype), None


def combine_torch(y, place, weights):
    """y (NK, C) -> sum_k weights_nk y[place_nk] (N, C): gathered and summed in one pass, without a (N, K, C)."""
    weights = torch.ones_like(place, dtype=y.dtype) if weights is None else weights.to(y.dtype)
    return F.embedding_bag(place, y, mode="sum", per_sample_weights=weights)


def fake(t):
    return t.is_meta or isinstance(t, torch._subclasses.FakeTensor)


def uneven(n, E):
    """Tokens an expert where nothing is computed: twice a fair share for the first, so memory plans allow for skew."""
    first = min(n, 2 * n // E)
    return [first] + [(n - first) // max(1, E - 1) + (e < (n - first) % max(1, E - 1)) for e in range(E - 1)]


if triton is not None:

    @triton.jit
    def group_of(ends, t, E, BM: tl.constexpr, BE: tl.constexpr):
        """Row tile t -> its expert (E: there is no such tile), its first row, the end of its expert's rows."""
        o_e = tl.arange(0, BE)
        end = tl.load(ends + o_e, mask=o_e < E, other=0)
        start = tl.load(ends + o_e - 1, mask=(o_e > 0) & (o_e < E), other=0)
        n = tl.where(o_e < E, (end - start + BM - 1) // BM, 0)  # tiles of each expert
        upto = tl.cumsum(n, 0)
        i_e = tl.sum(((upto <= t) & (o_e < E)).to(tl.int32), 0)
        here = o_e == i_e
        first = tl.sum(tl.where(here, start + (t - upto + n) * BM, 0), 0)
        return i_e, first, tl.sum(tl.where(here, end, 0), 0)

    @triton.jit
    def sigmoid_of(a, GELU: tl.constexpr):
        """act(a) = a s: s, and its argument's derivative. silu: s = sigma(a); gelu: s = sigma(2u) (activation.py)."""
        if GELU:
            return (tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a)),
                    1.5957691216057308 * (1.0 + 0.134145 * a * a))
        else:
            return tl.sigmoid(a), 1.0

    # C[r] = W[e] A[src(r)] for the rows r of expert e. src: the sorted rows themselves, or (order given) the token of
    # choice order[r].
    # GLU: W[e] has 2N rows; C gets all of them (None: nobody wants them back) and H[r] = act(first half) * second half.
    @triton.jit
    def rows_kernel(A, order, W, C, H, ends, E, N, K, topk, sw_e, sw_n, sw_k, GLU: tl.constexpr, GELU: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr):
        n_n = tl.cdiv(N, BN)
        n_t = tl.num_programs(0) // n_n
        first_t = tl.program_id(0) // (8 * n_n) * 8  # 8 row tiles at a time, so that they share W's columns in L2
        high = min(n_t - first_t, 8)
        t = first_t + tl.program_id(0) % (8 * n_n) % high
        i_n = tl.program_id(0) % (8 * n_n) // high
        i_e, first, end = group_of(ends, t, E, BM, BE)
        if i_e < E:
            o_r = first + tl.arange(0, BM).to(tl.int64)
            o_n = i_n * BN + tl.arange(0, BN)
            o_k = tl.arange(0, BK)
            m_r, m_n = o_r < end, o_n < N
            o_a = o_r
            if order is not None:
                o_a = tl.load(order + o_r, mask=m_r, other=0) // topk
            p_a = A + o_a[:, None] * K + o_k[None, :]  # [BM, BK]
            p_w = W + i_e.to(tl.int64) * sw_e + o_n[None, :].to(tl.int64) * sw_n + o_k[:, None] * sw_k  # [BK, BN]
            acc = tl.zeros((BM, BN), tl.float32)
            if GLU:
                acc3 = tl.zeros((BM, BN), tl.float32)
            for k in range(0, tl.cdiv(K, BK)):
                m_k = o_k < K - k * BK
                b_a = tl.load(p_a, mask=m_r[:, None] & m_k[None, :], other=0.0)
                b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
                acc = tl.dot(b_a, b_w, acc, input_precision="ieee")
                if GLU:
                    b_w = tl.load(p_w + tl.cast(N, tl.int64) * sw_n, mask=m_k[:, None] & m_n[None, :], other=0.0)
                    acc3 = tl.dot(b_a, b_w, acc3, input_precision="ieee")
                p_a += BK
                p_w += BK * sw_k
            m = m_r[:, None] & m_n[None, :]
            if GLU:
                if C is not None:
                    p_c = C + o_r[:, None] * (2 * N) + o_n[None, :]
                    tl.store(p_c, acc, mask=m)
                    tl.store(p_c + N, acc3, mask=m)
                s, _ = sigmoid_of(acc, GELU)
                tl.store(H + o_r[:, None] * N + o_n[None, :], acc * s * acc3, mask=m)
            else:
                tl.store(C + o_r[:, None] * N + o_n[None, :], acc, mask=m)

    # DW[e] (M, N) = sum over the rows r of expert e of D[r] A[r]^T. One of the two is gathered: GATHER_D says which.
    @triton.jit
    def weights_kernel(D, A, order, DW, ends, M, N, topk, GATHER_D: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
        n_m, n_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
        i_e = tl.program_id(0) // (n_m * n_n)
        i_m, i_n = tl.program_id(0) % (n_m * n_n) // n_n, tl.program_id(0) % n_n
        start = tl.where(i_e > 0, tl.load(ends + tl.maximum(i_e - 1, 0)), 0)
        end = tl.load(ends + i_e)
        o_m, o_n, o_k = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BK)
        m_m, m_n = o_m < M, o_n < N
        acc = tl.zeros((BM, BN), tl.float32)
        for r in range(start, end, BK):
            o_r = r + o_k.to(tl.int64)
            m_r = o_r < end
            o_t = tl.load(order + o_r, mask=m_r, other=0) // topk
            o_d, o_a = o_r, o_t
            if GATHER_D:
                o_d, o_a = o_t, o_r
            b_d = tl.load(D + o_d[None, :] * M + o_m[:, None], mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BM, BK]
            b_a = tl.load(A + o_a[:, None] * N + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0)  # [BK, BN]
            acc = tl.dot(b_d, b_a, acc, input_precision="ieee")
        o = (i_e.to(tl.int64) * M + o_m[:, None]) * N + o_n[None, :]
        tl.store(DW + o, acc, mask=m_m[:, None] & m_n[None, :])

    # act(a) = a s:   act'(a) = s + a s (1 - s) slope
    @triton.jit
    def glu_bwd_kernel(DH, GU, P, order, DGU, H, DP, F, GELU: tl.constexpr, BF: tl.constexpr):
        """A row: d -> the gradients of w1 x and w3 x (DGU), p h (H), and DP[choice] = d . h."""
        r = tl.program_id(0).to(tl.int64)
        choice = tl.load(order + r)
        p = tl.load(P + choice).to(tl.float32)
        total = tl.zeros((BF,), tl.float32)
        for f in range(0, F, BF):
            o_f = f + tl.arange(0, BF)
            m_f = o_f < F
            b_d = tl.load(DH + r * F + o_f, mask=m_f, other=0.0).to(tl.float32)
            b_a = tl.load(GU + r * 2 * F + o_f, mask=m_f, other=0.0).to(tl.float32)
            b_b = tl.load(GU + r * 2 * F + F + o_f, mask=m_f, other=0.0).to(tl.float32)
            s, slope = sigmoid_of(b_a, GELU)
            act = b_a * s
            total += b_d * act * b_b
            tl.store(H + r * F + o_f, p * act * b_b, mask=m_f)
            tl.store(DGU + r * 2 * F + o_f, p * b_d * b_b * (s + act * (1.0 - s) * slope), mask=m_f)
            tl.store(DGU + r * 2 * F + F + o_f, p * b_d * act, mask=m_f)
        tl.store(DP + choice, tl.sum(total, 0))

    @triton.jit
    def combine_kernel(Y, place, P, OUT, C, topk, BC: tl.constexpr):
        """OUT[n] = sum_k P[n, k] Y[place[n, k]]; without P the plain sum."""
        n = tl.program_id(0).to(tl.int64)
        o_c = tl.program_id(1) * BC + tl.arange(0, BC)
        m_c = o_c < C
        acc = tl.zeros((BC,), tl.float32)
        for k in range(0, topk):
            r = tl.load(place + n * topk + k)
            b_y = tl.load(Y + r * C + o_c, mask=m_c, other=0.0).to(tl.float32)
            if P is not None:
                b_y *= tl.load(P + n * topk + k).to(tl.float32)
            acc += b_y
        tl.store(OUT + n * C + o_c, acc, mask=m_c)

    # BM, BN, BK, warps, stages. 64 rows: an expert's last tile is half empty on average, so wide tiles waste more with
    # few tokens. fp32 goes without tensor cores, all of it in registers. GLU holds two sums. Widths that 16 does not
    # divide are loaded element by element, each with its own address: small tiles then, or the addresses spill.
    def tiles(dtype, glu=False, aligned=True):
        if dtype == torch.float32:
            return (dict(BM=32, BN=32, BK=16, num_warps=4, num_stages=2) if glu else
                    dict(BM=64, BN=64, BK=16, num_warps=4, num_stages=2))
        if not aligned:
            return dict(BM=32, BN=32, BK=32, num_warps=4, num_stages=2)
        return dict(BM=64, BN=64 if glu else 128, BK=32, num_warps=4, num_stages=3)

    def rows_product(a, order, w, c, ends, topk, h=None, gelu=False):
        """w (E, N, K) of any strides (with h (E, 2N, K), dense) into c (NK, N), or c (NK, 2N) or None and h (NK, N)."""
        E, N, K = w.shape[0], w.shape[1] // (1 if h is None else 2), w.shape[2]
        how = tiles(a.dtype, h is not None, N % 16 == K % 16 == 0)
        R = (c if h is None else h).shape[0]
        grid = ((triton.cdiv(R, how["BM"]) + E) * triton.cdiv(N, how["BN"]),)
        rows_kernel[grid](a, order, w, c, h, ends, E, N, K, topk, *w.stride(), GLU=h is not None, GELU=gelu,
                          BE=max(16, triton.next_power_of_2(E)), **how)

    def weights_product(d, a, order, ends, topk, gather_d, E):
        M, N = d.shape[1], a.shape[1]
        how = tiles(a.dtype, aligned=M % 16 == N % 16 == 0)
        dw = torch.empty(E, M, N, dtype=a.dtype, device=a.device)
        grid = (E * triton.cdiv(M, how["BM"]) * triton.cdiv(N, how["BN"]),)
        weights_kernel[grid](d, a, order, dw, ends, M, N, topk, GATHER_D=gather_d, **how)
        return dw

    def combine(y, place, p):
        (N, K), C = place.shape, y.shape[1]
        out, BC = y.new_empty(N, C), min(1024, triton.next_power_of_2(C))
        combine_kernel[(N, triton.cdiv(C, BC))](y, place, p, out, C, K, BC=BC, num_warps=max(1, BC // 256))
        return out

    @custom_op("kernels::expert_mlp", mutates_args=())
    def expert_mlp_op(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor,
                      act: str, save: bool
                      ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> y, then for backward: w1 x and w3 x (empty without save), order (sorted row -> choice), place (the
        inverse), ends (of the experts' rows)."""
        (N, K), (E, C, f) = chosen.shape, w2.shape
        x, w13, w2, weights = (t.contiguous() for t in (x, w13, w2, weights))
        by_expert, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(by_expert, torch.arange(E, device=x.device), right=True, out_int32=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(N * K, device=x.device)).view(N, K)
        gu, h, y = x.new_empty(N * K if save else 0, 2 * f), x.new_empty(N * K, f), x.new_empty(N * K, C)
        if N:
            rows_product(x, order, w13, gu if save else None, ends, K, h, act == "gelu")
            rows_product(h, None, w2, y, ends, K)
        return combine(y, place, weights) if N else torch.empty_like(x), gu, order, place, ends

    @expert_mlp_op.register_fake
    def _(x, w13, w2, chosen, weights, act, save):
        (N, K), f = chosen.shape, w2.shape[2]
        index = chosen.new_empty(N * K)
        return (x.new_empty(x.shape), x.new_empty(N * K if save else 0, 2 * f), index, index.new_empty(N, K),
                index.new_empty(w2.shape[0], dtype=torch.int32))

    @custom_op("kernels::expert_mlp_bwd", mutates_args=())
    def expert_mlp_bwd_op(dy: torch.Tensor, x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor,
                          gu: torch.Tensor, order: torch.Tensor, place: torch.Tensor, ends: torch.Tensor,
                          act: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> dx, dw13, dw2, dp."""
        (N, K), (E, C, f) = place.shape, w2.shape
        dy, x, w13, w2, weights = (t.contiguous() for t in (dy, x, w13, w2, weights))
        if not N:
            return torch.zeros_like(x), torch.zeros_like(w13), torch.zeros_like(w2), torch.zeros_like(weights)
        dh, dgu, h, dp = x.new_empty(N * K, f), torch.empty_like(gu), x.new_empty(N * K, f), torch.empty_like(weights)
        rows_product(dy, order, w2.mT, dh, ends, K)
        glu_bwd_kernel[(N * K,)](dh, gu, weights, order, dgu, h, dp, f, GELU=act == "gelu",
                                 BF=min(1024, triton.next_power_of_2(f)), num_warps=4)
        dw2 = weights_product(dy, h, order, ends, K, True, E)
        dw13 = weights_product(dgu, x, order, ends, K, False, E)
        dx = h.new_empty(N * K, C)
        rows_product(dgu, None, w13.mT, dx, ends, K)
        return combine(dx, place, None), dw13, dw2, dp

    @expert_mlp_bwd_op.register_fake
    def _(dy, x, w13, w2, weights, gu, order, place, ends, act):
        return tuple(t.new_empty(t.shape) for t in (x, w13, w2, weights))

    def save_for_backward(ctx, inputs, output):
        x, w13, w2, _, weights, ctx.act, _ = inputs
        ctx.save_for_backward(x, w13, w2, weights, *output[1:])
        ctx.set_materialize_grads(False)

    def expert_mlp_backward(ctx, dy, *_):
        dx, dw13, dw2, dp = expert_mlp_bwd_op(dy, *ctx.saved_tensors, ctx.act)
        return dx, dw13, dw2, None, dp, None, None

    expert_mlp_op.register_autograd(expert_mlp_backward, setup_context=save_for_backward)


def expert_mlp(x, w13, w2, chosen, weights, act="silu"):
    """x (N, C), w13 (E, 2F, C), w2 (E, C, F), chosen (N, K) int64, weights (N, K) -> (N, C) in x's (or autocast's)
    dtype. ValueError: shapes, dtypes or an act that do not fit."""
    N, C, E, f = *x.shape, w2.shape[0], w2.shape[2]
    if (w13.shape != (E, 2 * f, C) or w2.shape != (E, C, f) or chosen.shape != weights.shape or len(chosen) != N
            or act not in ("silu", "gelu")):
        raise ValueError(f"expert_mlp: shapes {[tuple(t.shape) for t in (x, w13, w2, chosen, weights)]}, act {act!r}; "
                         "expected (N, C), (E, 2F, C), (E, C, F), twice (N, K), and silu or gelu")
    which = form(x)
    if which == "ref":
        return expert_mlp_ref(x, w13, w2, chosen, weights, act)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w13, w2 = (t.to(dtype) for t in (x, w13, w2))
    if not x.dtype == w13.dtype == w2.dtype:
        raise ValueError(f"expert_mlp: x {x.dtype}, w13 {w13.dtype}, w2 {w2.dtype}; expected one dtype for all")
    if which == "torch":
        return ExpertMLP.apply(x, w13, w2, chosen, weights, act)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w13, w2, weights))
    return expert_mlp_op(x, w13, w2, chosen, weights, act, save)[0]
