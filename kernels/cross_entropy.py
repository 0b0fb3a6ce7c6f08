"""
Cross-entropy, and cross-entropy fused with the linear layer before it (the head of a language model)

    lse_i   = log sum_v exp z_iv                            z = logits (N, V), or z = x w^T, which is never whole
    loss_i  = lse_i - z_i,t(i) + z_loss lse_i^2             z-loss: PaLM, arXiv:2204.02311, section 5
    loss    = sum of loss_i where t(i) != ignore_index      "sum"; "mean" divides by their number, by 1 if there is none
    dz_iv   = (exp(z_iv - lse_i) (1 + 2 z_loss lse_i) - [v = t(i)]) g
                                                            g = incoming gradient / number; 0 in an ignored row

cross_entropy(logits, targets)          logits (..., V)         -> scalar, fp32
linear_cross_entropy(x, w, targets)     x (..., C), w (V, C)    -> scalar, fp32;    targets (...) int64
    fp32, bf16 or fp16; w may be fp32 beside 16-bit x, it is then cast once, and dw comes in w's dtype from fp32 sums.
    Under autocast x is cast as F.linear would cast it.
    A target that is neither ignore_index nor in [0, V) is an error in the plain form on a CPU and makes the loss NaN
    in the Triton form (which does not wait for the GPU to find out).

Plain form: rows in chunks of CHUNK logits, worked on in place. Where a gradient is needed, dx and dw are computed with
the loss, while the chunk is at hand; backward only multiplies them by the gradient of the scalar. 6 NVC FLOPs in all.
Saved: dx, dw. Up to WHOLE logits, where calls cost more than memory, F.linear and F.cross_entropy serve.

Triton form: a tile of logits lives in registers only, in the manner of cut cross-entropy (Wijmans et al. 2024,
arXiv:2411.09009), but exact, and without locks. Saved: x, w, targets, lse (N).
    forward     each tile leaves one fp32 per row, its own lse (N V / 128 in all); a second kernel joins them.
                2 NVC FLOPs
    backward    for each slice of the vocabulary: dz of all rows, recomputed into one 16-bit buffer (N, slice), then
                dw[slice] = dz^T x, whole and written once, and dx += dz w[slice] in fp32.
                6 NVC FLOPs
    So 8 NVC where 6 would do with the logits kept. Slices of the vocabulary, not chunks of rows as in Liger: dw then
    needs no fp32 accumulator of its own size and no second pass to scale it, nothing but lse is held between forward
    and backward, an evaluation pays for its own product only, and each product has enough tiles to fill a card.
Bytes, with E bytes an element: tiles of 128 x 128 load 2 E NVC / 128 through L2 for each of the four products. What
must be in device memory: x, w read and N V / 128 fp32 written and read (forward); x, w read twice, dx, dw written, dz
written once and read twice (backward). On an RTX 4070 all four products are bound by its tensor cores, not by this.
cross_entropy: logits read once forward; read once, dlogits written once backward, which is the floor.
"""
import functools
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


CHUNK = 2**24  # logits that exist at once in the plain form: 64 MB in fp32, 333 rows of GPT-2's vocabulary
WHOLE = 2**18  # logits up to which the plain form is F.cross_entropy(F.linear): 1 MB, where the two cross on a CPU
SLICE = 2**25  # dlogits that exist at once in the Triton form: 64 MB in bf16


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def row_count(targets, ignore_index, reduction):
    """What the sum of losses is divided by, without a sync."""
    return (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1


def cross_entropy_ref(logits, targets, ignore_index=-1, z_loss=0.0, reduction="mean"):
    z, t = at_least_fp32(logits.reshape(-1, logits.shape[-1])), targets.reshape(-1)     # (N, V), (N,)
    live = t != ignore_index
    lse = z.logsumexp(1)                                                                # (N,)
    loss = lse - z.gather(1, t.where(live, 0)[:, None])[:, 0] + z_loss * lse.square()
    return loss.where(live, 0).sum() / row_count(t, ignore_index, reduction)


def linear_cross_entropy_ref(x, w, targets, ignore_index=-1, z_loss=0.0, reduction="mean"):
    return cross_entropy_ref(F.linear(x, w.to(x.dtype)), targets, ignore_index, z_loss, reduction)


def cross_entropy_torch(logits, targets, ignore_index=-1, z_loss=0.0, reduction="mean"):
    z, t = at_least_fp32(logits.reshape(-1, logits.shape[-1])), targets.reshape(-1)
    loss = F.cross_entropy(z, t, ignore_index=ignore_index, reduction="sum")
    if z_loss:
        loss = loss + z_loss * z.logsumexp(1).square().where(t != ignore_index, 0).sum()
    return loss / row_count(t, ignore_index, reduction)


def chunked_loss(x, w, targets, ignore_index, z_loss, reduction, need_dx, need_dw):
    """loss, dx, dw (None where not needed) of x (N, C), w (V, C). A chunk's logits become its dlogits in place."""
    (V, C), dtype = w.shape, torch.promote_types(x.dtype, torch.float32)
    w16, rows = w.to(x.dtype), max(1, CHUNK // w.shape[0])
    live = (targets != ignore_index)[:, None]                               # (N, 1)
    picked = targets[:, None] * live                                        # (N, 1): 0 in an ignored row
    share = live.sum(dtype=dtype).clamp_(min=1).reciprocal_() if reduction == "mean" else None
    weight = live.to(dtype) if share is None else live * share              # (N, 1): of a row in the loss
    late = x.dtype == torch.float16 and share is not None                   # dlogits / N would underflow: scale dx, dw
    unit = live.to(dtype) if late else weight
    dx = torch.empty_like(x) if need_dx else None
    dw = torch.zeros(V, C, dtype=dtype, device=x.device) if need_dw else None
    loss = 0
    for i in range(0, len(x), rows):
        x_c, t_c, unit_c = x[i:i + rows], picked[i:i + rows], unit[i:i + rows]
        z = product(x_c, w16).to(dtype)                                     # (n, V)
        top = z.amax(1, keepdim=True)                                       # (n, 1)
        z_t = z.sub_(top).gather(1, t_c)                                    # (n, 1): the target's logit, less top
        total = z.exp_().sum(1, keepdim=True)                               # (n, 1)
        loss_c = total.log() - z_t                                          # (n, 1): lse - z_t, where top cancels
        scale = unit_c / total                                              # (n, 1): softmax = z / total
        if z_loss:
            lse = loss_c + z_t + top
            loss_c += z_loss * lse.square()
            scale *= 1 + 2 * z_loss * lse
        loss = loss + (loss_c * weight[i:i + rows]).sum()
        if need_dx or need_dw:
            d = z.mul_(scale).scatter_add_(1, t_c, -unit_c).to(x.dtype)
        if need_dx:
            product(d, w16.T, out=dx[i:i + rows])
        if need_dw and d.dtype == dtype:
            dw.addmm_(d.T, x_c)
        elif need_dw:
            dw += d.T @ x_c
    if late:
        dx, dw = (None if grad is None else grad.mul_(share) for grad in (dx, dw))
    return loss, dx, None if dw is None else dw.to(w.dtype)


class ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, targets, ignore_index, z_loss, reduction):
        loss, dx, dw = chunked_loss(x, w, targets, ignore_index, z_loss, reduction, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        dx, dw = ctx.saved_tensors
        # Reading g costs nothing on a CPU and spares a pass over dx for a plain loss.backward(). dw is always new:
        # it becomes a parameter's .grad, which is written in place.
        if dx is not None and (torch.compiler.is_compiling() or g.device.type != "cpu" or g.item() != 1):
            dx = dx * g
        return dx, None if dw is None else dw * g, None, None, None, None


def linear_cross_entropy_torch(x, w, targets, ignore_index=-1, z_loss=0.0, reduction="mean"):
    if targets.numel() * w.shape[0] <= WHOLE and x.dtype != torch.float16:  # fp16: see `late` above
        return cross_entropy_torch(F.linear(x, w.to(x.dtype)), targets, ignore_index, z_loss, reduction)
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        return ChunkedLoss.apply(x, w, targets, ignore_index, z_loss, reduction)
    return chunked_loss(x, w, targets, ignore_index, z_loss, reduction, False, False)[0]


if triton is not None:
    @triton.jit
    def lse_kernel(z, lse, M, BLOCK: tl.constexpr):
        """lse[i] = log sum_j exp z[i, j], j < M: one row a program, one sweep, a maximum and a sum per lane."""
        i = tl.program_id(0).to(tl.int64)
        o_m = tl.arange(0, BLOCK)
        b_m = tl.full((BLOCK,), -1e38, tl.float32)      # not -inf: a masked-out logit of -inf must not give inf - inf
        b_s = tl.zeros((BLOCK,), tl.float32)
        for j in range(0, M, BLOCK):
            b_z = tl.load(z + i * M + j + o_m, mask=j + o_m < M, other=float("-inf")).to(tl.float32)
            b_new = tl.maximum(b_m, b_z)
            b_s = b_s * tl.exp(b_m - b_new) + tl.exp(b_z - b_new)
            b_m = b_new
        m = tl.max(b_m, 0)
        tl.store(lse + i, m + tl.log(tl.sum(b_s * tl.exp(b_m - m), 0)))

    @triton.jit
    def loss_kernel(z, lse, targets, loss, share, N, V, stride_n, stride_v, ignore_index, z_loss,
                    MEAN: tl.constexpr, BLOCK: tl.constexpr):
        """One program sums all rows, in a fixed order. The target's logit stands at z[i stride_n + t stride_v]."""
        o_n = tl.arange(0, BLOCK)
        b_loss = tl.zeros((BLOCK,), tl.float32)
        b_count = tl.zeros((BLOCK,), tl.float32)
        for i in range(0, N, BLOCK):
            m_n = i + o_n < N
            b_t = tl.load(targets + i + o_n, mask=m_n, other=ignore_index)
            live = b_t != ignore_index
            good = live & (b_t >= 0) & (b_t < V)
            p_z = z + (i + o_n).to(tl.int64) * stride_n + b_t * stride_v
            b_z = tl.load(p_z, mask=good, other=float("nan")).to(tl.float32)
            b_lse = tl.load(lse + i + o_n, mask=m_n, other=0.0)
            b_loss += tl.where(live, b_lse - b_z + z_loss * b_lse * b_lse, 0.0)
            b_count += live.to(tl.float32)
        s = 1.0
        if MEAN:
            s = 1.0 / tl.maximum(tl.sum(b_count, 0), 1.0)
        tl.store(loss, tl.sum(b_loss, 0) * s)
        tl.store(share, s)

    # dz = (exp(z - lse) (1 + 2 z_loss lse) - [v = t]) g share;   0 in an ignored row
    @triton.jit
    def cross_entropy_bwd_kernel(z, lse, targets, g, share, dz, V, ignore_index, z_loss, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64)
        o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        m_v = o_v < V
        t = tl.load(targets + i)
        s = tl.load(lse + i)
        scale = tl.where(t != ignore_index, tl.load(g) * tl.load(share), 0.0)
        b_z = tl.load(z + i * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_dz = tl.exp(b_z - s) * (1.0 + 2.0 * z_loss * s) - (o_v == t).to(tl.float32)
        tl.store(dz + i * V + o_v, b_dz * scale, mask=m_v)

    @triton.jit
    def logits_tile(x, w, n0, v0, N, V, C,
                    BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
        """Logits from row n0, column v0. The 64-bit part of an address is one scalar: tiles of int64 would spill."""
        o_n, o_v, o_k = tl.arange(0, BN), tl.arange(0, BV), tl.arange(0, BK)
        x += n0.to(tl.int64) * C
        w += v0.to(tl.int64) * C
        p_x = o_n[:, None] * C + o_k[None, :]                                           # [BN, BK]
        p_w = o_v[None, :] * C + o_k[:, None]                                           # [BK, BV]
        m_n, m_v = n0 + o_n < N, v0 + o_v < V
        b_z = tl.zeros((BN, BV), tl.float32)
        for k in range(0, C, BK):
            m_k = k + o_k < C
            b_x = tl.load(x + p_x, mask=m_n[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(w + p_w, mask=m_k[:, None] & m_v[None, :], other=0.0)
            b_z = tl.dot(b_x, b_w, b_z, input_precision=PRECISION)
            x += BK
            w += BK
        return b_z                                                                      # [BN, BV]

    @triton.jit
    def tile_index(N, V, BN: tl.constexpr, BV: tl.constexpr):
        """This program's tile of rows and of the vocabulary: 16 row tiles share a tile of w while it is in L2."""
        tiles_n, tiles_v = tl.cdiv(N, BN), tl.cdiv(V, BV)
        i = tl.program_id(0)
        return tl.swizzle2d(i // tiles_v, i % tiles_v, tiles_n, tiles_v, 16)

    @triton.jit
    def linear_cross_entropy_fwd_kernel(x, w, targets, part, z_t, N, V, C,
                                        BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
        """part[n, tile of V] = lse of the tile's logits; z_t[n] = the target's logit, from the tile that holds it."""
        i_n, i_v = tile_index(N, V, BN, BV)
        b_z = logits_tile(x, w, i_n * BN, i_v * BV, N, V, C, BN, BV, BK, PRECISION)     # [BN, BV]
        o_n, o_v = i_n * BN + tl.arange(0, BN), i_v * BV + tl.arange(0, BV)
        m_n, m_v = o_n < N, o_v < V
        b_z = tl.where(m_v[None, :], b_z, float("-inf"))
        b_m = tl.max(b_z, 1)                                                            # [BN]
        b_lse = b_m + tl.log(tl.sum(tl.exp(b_z - b_m[:, None]), 1))                     # [BN]
        tl.store(part + o_n.to(tl.int64) * tl.cdiv(V, BV) + i_v, b_lse, mask=m_n)
        b_t = tl.load(targets + o_n, mask=m_n, other=-1)
        here = (b_t >= i_v * BV) & (b_t < i_v * BV + BV) & (b_t < V)
        b_zt = tl.sum(tl.where(o_v[None, :] == b_t[:, None], b_z, 0.0), 1)              # [BN]
        tl.store(z_t + o_n, b_zt, mask=m_n & here)

    # dz as above without g share;   dx = g share dz w;   dw = g share dz^T x
    # dz stays unscaled, in [-1, 1]: dz / N would underflow fp16. The products scale their fp32 sums.
    @triton.jit
    def linear_cross_entropy_bwd_kernel(x, w, targets, lse, dz, N, V, C, v0, stride_n, ignore_index, z_loss,
                                        BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
        """dz (N, V) of the slice of the vocabulary that starts at v0; w and V are the slice's."""
        i_n, i_v = tile_index(N, V, BN, BV)
        b_z = logits_tile(x, w, i_n * BN, i_v * BV, N, V, C, BN, BV, BK, PRECISION)     # [BN, BV]
        o_n, o_v = i_n * BN + tl.arange(0, BN), i_v * BV + tl.arange(0, BV)
        m_n, m_v = o_n < N, o_v < V
        b_t = tl.load(targets + o_n, mask=m_n, other=ignore_index)
        b_lse = tl.load(lse + o_n, mask=m_n, other=0.0)
        b_dz = tl.exp(b_z - b_lse[:, None]) * (1.0 + 2.0 * z_loss * b_lse)[:, None]
        b_dz -= ((v0 + o_v)[None, :] == b_t[:, None]).to(tl.float32)
        b_dz = tl.where((b_t != ignore_index)[:, None], b_dz, 0.0)
        tl.store(dz + o_n.to(tl.int64)[:, None] * stride_n + o_v[None, :], b_dz, mask=m_n[:, None] & m_v[None, :])

    @triton.jit
    def product_kernel(a, b, sums, out, g, share, M, N, K, stride_m, stride_k, first, last,
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
        """out (M, N) = g share (a b summed over calls), a[m, k] at m stride_m + k stride_k, b (K, N).
        Between the first and the last call the sum stands in `sums`, fp32."""
        m0 = tl.program_id(0) // tl.cdiv(N, BN) * BM
        n0 = tl.program_id(0) % tl.cdiv(N, BN) * BN
        o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
        m_m, m_n = m0 + o_m < M, n0 + o_n < N
        a += m0.to(tl.int64) * stride_m
        b += n0
        p_a = o_m[:, None] * stride_m + o_k[None, :] * stride_k                         # [BM, BK]
        p_b = o_k[:, None] * N + o_n[None, :]                                           # [BK, BN]
        b_y = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            m_k = k + o_k < K
            b_a = tl.load(a + p_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_b = tl.load(b + p_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_y = tl.dot(b_a, b_b, b_y, input_precision=PRECISION)
            a += BK * stride_k
            b += BK * N
        m_y = m_m[:, None] & m_n[None, :]
        p_y = o_m[:, None] * N + o_n[None, :]                                           # [BM, BN]
        sums += m0.to(tl.int64) * N + n0
        out += m0.to(tl.int64) * N + n0
        # Masks, not branches: with branches the odd widths spill.
        b_y += tl.load(sums + p_y, mask=m_y & (first == 0), other=0.0).to(tl.float32)
        tl.store(sums + p_y, b_y, mask=m_y & (last == 0))
        tl.store(out + p_y, b_y * (tl.load(g) * tl.load(share)), mask=m_y & (last != 0))

    def tile(dtype):
        """16-bit: 48 KB of shared memory, so that two blocks fit an sm_89 multiprocessor where their registers do too.
        fp32: tf32x3, three products on tensor cores, which have no ieee form; it comes close to fp32's accuracy. Its
        parts take registers: twice the BK spills."""
        if dtype == torch.float32:
            return (64, 64), dict(BK=16, PRECISION="tf32x3", num_warps=4, num_stages=3)
        return (128, 128), dict(BK=32, PRECISION="ieee", num_warps=8, num_stages=4)

    def row_block(n):
        """Lanes for a row of n: 2048 at most, 8 warps."""
        block = min(2048, triton.next_power_of_2(n))
        return dict(BLOCK=block, num_warps=min(8, max(1, block // 256)))

    def reduce_loss(z, stride_n, stride_v, lse, targets, V, ignore_index, z_loss, mean):
        loss, share = lse.new_empty(()), lse.new_empty(())
        loss_kernel[(1,)](z, lse, targets, loss, share, targets.shape[0], V, stride_n, stride_v, ignore_index, z_loss,
                          MEAN=mean, BLOCK=1024, num_warps=8)
        return loss, share

    @custom_op("kernels::cross_entropy", mutates_args=())
    def cross_entropy_op(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, z_loss: float,
                         mean: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """loss (), lse (N,), share () of logits (N, V): contiguous."""
        N, V = logits.shape
        lse = logits.new_empty(N, dtype=torch.float32)
        lse_kernel[(N,)](logits, lse, V, **row_block(V))
        loss, share = reduce_loss(logits, V, 1, lse, targets, V, ignore_index, z_loss, mean)
        return loss, lse, share

    @custom_op("kernels::cross_entropy_bwd", mutates_args=())
    def cross_entropy_bwd_op(g: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor,
                             share: torch.Tensor, ignore_index: int, z_loss: float) -> torch.Tensor:
        N, V = logits.shape
        dlogits, how = torch.empty_like(logits), row_block(V)
        grid = (N, triton.cdiv(V, how["BLOCK"]))
        cross_entropy_bwd_kernel[grid](logits, lse, targets, g, share, dlogits, V, ignore_index, z_loss, **how)
        return dlogits

    @custom_op("kernels::linear_cross_entropy", mutates_args=())
    def linear_cross_entropy_op(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, ignore_index: int,
                                z_loss: float, mean: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """loss (), lse (N,), share () of x (N, C), w (V, C): contiguous."""
        (N, C), V = x.shape, w.shape[0]
        (BN, BV), how = tile(x.dtype)
        tiles_v = triton.cdiv(V, BV)
        part = x.new_empty(N, tiles_v, dtype=torch.float32)
        z_t, lse = part.new_empty(N), part.new_empty(N)
        w = w if w.dtype == x.dtype else w.to(x.dtype)
        linear_cross_entropy_fwd_kernel[(triton.cdiv(N, BN) * tiles_v,)](
            x, w, targets, part, z_t, N, V, C, BN=BN, BV=BV, **how)
        lse_kernel[(N,)](part, lse, tiles_v, **row_block(tiles_v))
        loss, share = reduce_loss(z_t, 1, 0, lse, targets, V, ignore_index, z_loss, mean)
        return loss, lse, share

    @custom_op("kernels::linear_cross_entropy_bwd", mutates_args=())
    def linear_cross_entropy_bwd_op(g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor,
                                    lse: torch.Tensor, share: torch.Tensor, ignore_index: int, z_loss: float,
                                    need_dx: bool, need_dw: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """dx (N, C), dw (V, C); an empty tensor where it is not needed."""
        (N, C), V = x.shape, w.shape[0]
        (BM, BN), how = tile(x.dtype)
        # 2048 columns at least, as dx's fp32 sum is read and written once a slice. The buffer is then 2048 / C times x.
        width = min(triton.cdiv(V, BN) * BN, max(2048, SLICE // max(1, N) // BN * BN))
        dz = x.new_empty(N, width)
        dx = torch.empty_like(x) if need_dx else x.new_empty(0)
        dw = torch.empty_like(w) if need_dw else w.new_empty(0)
        sums = x.new_empty(N, C, dtype=torch.float32) if need_dx and width < V else dx
        w = w if w.dtype == x.dtype else w.to(x.dtype)
        for v in range(0, V, width):
            n = min(width, V - v)
            linear_cross_entropy_bwd_kernel[(triton.cdiv(N, BM) * triton.cdiv(n, BN),)](
                x, w[v:], targets, lse, dz, N, n, C, v, width, ignore_index, z_loss, BN=BM, BV=BN, **how)
            if need_dx:
                product_kernel[(triton.cdiv(N, BM) * triton.cdiv(C, BN),)](
                    dz, w[v:], sums, dx, g, share, N, C, n, width, 1, int(v == 0), int(v + n == V), BM=BM, BN=BN, **how)
            if need_dw:
                product_kernel[(triton.cdiv(n, BM) * triton.cdiv(C, BN),)](
                    dz, x, dw, dw[v:], g, share, n, C, N, 1, width, 1, 1, BM=BM, BN=BN, **how)
        return dx, dw

    def fake_forward(first, *args):
        like = lambda *shape: first.new_empty(shape, dtype=torch.float32)
        return like(), like(first.shape[0]), like()

    cross_entropy_op.register_fake(fake_forward)
    linear_cross_entropy_op.register_fake(fake_forward)
    cross_entropy_bwd_op.register_fake(lambda g, logits, *args: torch.empty_like(logits))
    linear_cross_entropy_bwd_op.register_fake(lambda g, x, w, t, lse, share, ignore_index, z_loss, need_dx, need_dw: (
        torch.empty_like(x) if need_dx else x.new_empty(0), torch.empty_like(w) if need_dw else w.new_empty(0)))

    def cross_entropy_setup(ctx, inputs, output):
        logits, targets, ctx.ignore_index, ctx.z_loss, _ = inputs
        ctx.save_for_backward(logits, targets, *output[1:])

    def cross_entropy_backward(ctx, g, *_):
        return cross_entropy_bwd_op(g, *ctx.saved_tensors, ctx.ignore_index, ctx.z_loss), None, None, None, None

    def linear_cross_entropy_setup(ctx, inputs, output):
        x, w, targets, ctx.ignore_index, ctx.z_loss, _ = inputs
        ctx.save_for_backward(x, w, targets, *output[1:])

    def linear_cross_entropy_backward(ctx, g, *_):
        need_dx, need_dw = ctx.needs_input_grad[:2]
        dx, dw = linear_cross_entropy_bwd_op(g, *ctx.saved_tensors, ctx.ignore_index, ctx.z_loss, need_dx, need_dw)
        return dx if need_dx else None, dw if need_dw else None, None, None, None, None

    cross_entropy_op.register_autograd(cross_entropy_backward, setup_context=cross_entropy_setup)
    linear_cross_entropy_op.register_autograd(linear_cross_entropy_backward, setup_context=linear_cross_entropy_setup)

    def cross_entropy_triton(logits, targets, ignore_index=-1, z_loss=0.0, reduction="mean"):
        logits, targets = logits.reshape(-1, logits.shape[-1]).contiguous(), targets.reshape(-1).contiguous()
        return cross_entropy_op(logits, targets, ignore_index, z_loss, reduction == "mean")[0]

    def linear_cross_entropy_triton(x, w, targets, ignore_index=-1, z_loss=0.0, reduction="mean"):
        x, targets = x.reshape(-1, x.shape[-1]).contiguous(), targets.reshape(-1).contiguous()
        return linear_cross_entropy_op(x, w.contiguous(), targets, ignore_index, z_loss, reduction == "mean")[0]


def check_arguments(x, targets, reduction):
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction {reduction!r}: "mean" or "sum"')
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)}: {tuple(x.shape[:-1])} expected, a target for each row")


def cross_entropy(logits, targets, ignore_index=-1, z_loss=0.0, reduction="mean"):
    """logits (..., V), targets (...) int64 -> scalar fp32. Saved for backward: the logits, and lse per row."""
    check_arguments(logits, targets, reduction)
    which, args = form(logits), (logits, targets, ignore_index, z_loss, reduction)
    if which == "ref":
        return cross_entropy_ref(*args)
    return cross_entropy_torch(*args) if which == "torch" else cross_entropy_triton(*args)


def linear_cross_entropy(x, w, targets, ignore_index=-1, z_loss=0.0, reduction="mean"):
    """cross_entropy(x w^T, targets) without the logits: x (..., C), w (V, C), targets (...) int64 -> scalar fp32."""
    check_arguments(x, targets, reduction)
    if w.ndim != 2 or w.shape[1] != x.shape[-1]:
        raise ValueError(f"w {tuple(w.shape)}: (V, {x.shape[-1]}) expected for x {tuple(x.shape)}")
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    which, args = form(x), (x, w, targets, ignore_index, z_loss, reduction)
    if which == "ref":
        return linear_cross_entropy_ref(*args)
    return linear_cross_entropy_torch(*args) if which == "torch" else linear_cross_entropy_triton(*args)
