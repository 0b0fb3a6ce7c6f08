"""
Retention: linear attention whose state decays, chunk by chunk with matrix products; and the gated norm that follows it
    Sun et al. 2023, arXiv:2307.08621v4, eq. 3 to 8;  the chunks as in Yang et al. 2023, arXiv:2312.06635, section 4

    S_t = exp(a) S_{t-1} + k_t^T v_t,   o_t = q_t S_t             a = log_decay of the head, S (K, V)
    in a chunk of c tokens, i and j from 0, after the state S:
    o_i = sum_{j <= i} exp(a (i - j)) (q_i . k_j) v_j + exp(a (i + 1)) q_i S
    S'  = exp(a c) S + sum_j exp(a (c - 1 - j)) k_j^T v_j
    backward, with R = dL/dS of the state that the chunk leaves (dfinal after the last), A_ij and B_ij for i >= j:
    A_ij = exp(a (i - j)) q_i . k_j,   B_ij = exp(a (i - j)) do_i . v_j
    dq_i = sum_j B_ij k_j + exp(a (i + 1)) do_i S^T          dk_j = sum_i B_ij q_i + exp(a (c - 1 - j)) v_j R^T
    dv_j = sum_i A_ij do_i + exp(a (c - 1 - j)) k_j R        R'   = exp(a c) R + sum_i exp(a (i + 1)) q_i^T do_i

Every exponent is a difference of times, never a quotient of decays, so nothing overflows however small a decay is. With a decay
for each step and head (Mamba-2), a (i - j) becomes L_i - L_j and a (i + 1) becomes L_i of the chunk's cumulative sums L of the log
decays, and no more changes: a load of (c,) and a cumsum, and for the decays' gradient dL_i = q_i . dq_i - k_i . dk_i, summed from the
end (kernels/ssd.py is that, with its own shapes). A decay for each key channel (RWKV-6) would go inside the product q_i . k_j.

Shapes: q, k (B, T, H, K), v (B, T, H, V), log_decay (H,) fp32, <= 0, initial (B, H, K, V) or None
     -> o (B, T, H, V) in v's dtype, final (B, H, K, V) fp32 (fp64 for fp64). q, k and v of one dtype: fp32, bf16 or fp16;
any strides, as views of a projection have them (the kernels copy only where the last dimension is not contiguous).
K and V at most 512 in the kernels. The state and all sums are fp32; A, B and the state are rounded to the inputs' dtype to
be multiplied. log_decay takes no gradient. Under autocast q, k and v are cast to its dtype.

Saved for backward: the inputs; the kernels make the states again (the plain form keeps one a chunk), A and B are made again in both.
Bytes: each launch reads its inputs and writes its result, and no state or product between: the floor for forward, and in
backward (dq, dk, dv: three launches of the same kernel) each input once a launch. The programs that share a head's columns
(7 at V = 432) read x and y each, from the cache: they run side by side.
FLOPs: 2 T (c K + c V + 2 K V) a head forward, three times that backward; the products with the c x c matrices are computed whole.

gated_norm: y = silu(z) * o r,  r = 1 / sqrt(mean(o^2) + eps) over the last dimension (eq. 8's group norm, per head).
    with s = silu(z), u = o r:  do = r (dy s - u mean(dy s u)),  dz = dy u silu'(z). Only o and z are saved; 3 + 5 passes, the floor.
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


def retention_ref(q, k, v, log_decay, initial=None):
    """The definition, one token after the other; fp32 inside, fp64 for fp64."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    decay = log_decay.to(dtype).exp()[:, None, None]  # (H, 1, 1)
    S = torch.zeros((), dtype=dtype, device=v.device) if initial is None else initial.to(dtype)
    o = []
    for q_t, k_t, v_t in zip(q.to(dtype).unbind(1), k.to(dtype).unbind(1), v.to(dtype).unbind(1)):
        S = decay * S + k_t[..., :, None] * v_t[..., None, :]  # (B, H, K, V)
        o.append((q_t[..., None, :] @ S).squeeze(-2))  # (B, H, V)
    return torch.stack(o, 1).to(v.dtype), S


def gated_norm_ref(o, z, eps=1e-6):
    """The definition; fp32 inside, fp64 for fp64."""
    h, g = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (o, z))
    return (g * g.sigmoid() * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(o.dtype)


CHUNK = 128  # of the plain form: its products and the (B, K, V) state stay in a core's cache at usual sizes


def decays(a, c, like):
    """For one head's a: exp(a (i - j)) where i >= j, else 0 (c, c); exp(a (i + 1)) and exp(a (c - 1 - j)) (c, 1); exp(a c)."""
    i = torch.arange(c, device=a.device)[:, None]
    inside = torch.exp(a * (i - i.T).clamp(min=0)).tril()
    return inside.to(like), torch.exp(a * (i + 1)).to(like), torch.exp(a * (c - 1 - i)).to(like), torch.exp(a * c).item()


class Retention(torch.autograd.Function):
    """Head by head, so that a decay is a number and no product needs a copy: q[:, t, h] is a batch (B, c, K) with strides.
    Saved for backward: the inputs and the state before each chunk; A and B are made again."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial):
        (B, T, H, K), V = q.shape, v.shape[3]
        wide = torch.promote_types(v.dtype, torch.float32)
        o, final = v.new_empty(B, T, H, V), v.new_empty(B, H, K, V, dtype=wide)
        states = v.new_empty((T - 1) // CHUNK, H, B, K, V, dtype=wide)  # the one before the first chunk is `initial`
        for h, a in enumerate(log_decay.to(wide).unbind()):
            S, c = None if initial is None else initial[:, h], 0
            for i, t in enumerate(range(0, T, CHUNK)):
                q_c, k_c, v_c, o_c = (x[:, t : t + CHUNK, h] for x in (q, k, v, o))  # (B, c, K or V)
                if q_c.shape[1] != c:  # the first chunk, and the last if it is shorter
                    c = q_c.shape[1]
                    inside, before, after, whole = decays(a, c, v.dtype)
                torch.bmm(torch.bmm(q_c, k_c.mT).mul_(inside), v_c, out=o_c)
                kv = torch.bmm((k_c * after).mT, v_c)  # (B, K, V)
                new = states[i, h] if t + c < T else final[:, h]
                if S is None:
                    new.copy_(kv)
                else:
                    o_c.baddbmm_(q_c * before, S.to(v.dtype))
                    torch.add(kv, S, alpha=whole, out=new)
                S = new
        ctx.save_for_backward(q, k, v, log_decay, initial, states)
        ctx.set_materialize_grads(False)  # an unused final brings no gradient
        return o, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, log_decay, initial, states = ctx.saved_tensors
        T = q.shape[1]
        do = torch.zeros_like(v) if do is None else do if do.stride(3) == 1 else do.contiguous()
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        dinitial = None if initial is None else torch.empty_like(initial)
        for h, a in enumerate(log_decay.to(states.dtype).unbind()):
            R, c = None if dfinal is None else dfinal[:, h], 0
            for i, t in reversed([*enumerate(range(0, T, CHUNK))]):
                q_c, k_c, v_c, do_c, dq_c, dk_c, dv_c = (x[:, t : t + CHUNK, h] for x in (q, k, v, do, dq, dk, dv))
                if q_c.shape[1] != c:
                    c = q_c.shape[1]
                    inside, before, after, whole = decays(a, c, v.dtype)
                S = states[i - 1, h] if i else None if initial is None else initial[:, h]
                A, D = torch.bmm(q_c, k_c.mT).mul_(inside), torch.bmm(do_c, v_c.mT).mul_(inside)  # (B, c, c); D: the B above
                torch.bmm(D, k_c, out=dq_c)
                torch.bmm(D.mT, q_c, out=dk_c)
                torch.bmm(A.mT, do_c, out=dv_c)
                if R is not None:
                    dk_c.baddbmm_(v_c * after, R.to(v.dtype).mT)
                    dv_c.baddbmm_(k_c * after, R.to(v.dtype))
                if S is not None:
                    dq_c.baddbmm_(do_c * before, S.to(v.dtype).mT)
                    qdo = torch.bmm((q_c * before).mT, do_c).to(S.dtype)  # (B, K, V)
                    R = qdo if R is None else qdo.add_(R, alpha=whole)
            if initial is not None:
                dinitial[:, h] = R
        return dq, dk, dv, None, dinitial


def retention_torch(q, k, v, log_decay, initial=None):
    if q.shape[1] == 1:  # generation: one step of the definition
        return retention_ref(q, k, v, log_decay, initial)
    return Retention.apply(q, k, v, log_decay, initial)


class GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, z, eps):
        wide = torch.promote_types(o.dtype, torch.float32)
        r = torch.linalg.vector_norm(o, dim=-1, keepdim=True, dtype=wide).square_().div_(o.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(o, z, r)  # r: (..., 1)
        return torch.nn.functional.silu(z).mul_(o).mul_(r).to(o.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        o, z, r = ctx.saved_tensors
        u = o * r
        dz = torch.ops.aten.silu_backward(dy * u, z.to(u.dtype)).to(z.dtype)
        do = torch.nn.functional.silu(z).mul_(dy).to(u.dtype)
        m = torch.linalg.vecdot(do, u).unsqueeze(-1).div_(-o.shape[-1])
        return do.addcmul_(u, m).mul_(r).to(o.dtype), dz, None


if triton is not None:
    # Forward and the three gradients are one computation on different tensors, x and y (T, N), z (T, M) -> out (T, M):
    #     out_i = sum_j exp(a |i - j|) (x_i . y_j) z_j + f_i x_i S,   S' = exp(a c) S + sum_j f'_j y_j^T z_j        S (N, M)
    #     o:  q, k, v     dq:  do, v, k with S^T          over j <= i,   f_i = exp(a (i + 1)),      f'_j = exp(a (c - 1 - j))
    #     dv: k, q, do    dk:  v, do, q, with R in S's place, from the last chunk to the first,
    #                                                     over j >= i,   f_i = exp(a (c - 1 - i)),  f'_j = exp(a (j + 1))
    # A program owns BZ columns of out and of S, which stays in registers (fp32) from the first chunk to the last: nothing but
    # the inputs and the result goes through memory, and dq makes the states again rather than reading them. The N rows are G
    # slices of BN, a leading dimension of x, y and S: products are batches of G, one for each warp, which so holds its own
    # slice of every operand; the sums over G then add up what a product over N would (with one large product each warp holds
    # nearly all of S as an operand and spills).

    @triton.jit
    def retention_kernel(x, y, z, out, log_decay, initial, final, sx, sy, sz, so, ss, H, T, M, N: tl.constexpr,
                         REVERSE: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BZ: tl.constexpr):
        """Strides (batch, time, head, 1) of x, y, z and out; ss: of the state, (N, M) of each (batch, head)."""
        n_z = tl.cdiv(M, BZ)  # the programs of one head run together: they read the same x and y
        i_bh, i_z = (tl.program_id(0) // n_z).to(tl.int64), tl.program_id(0) % n_z
        i_b, i_h = i_bh // H, i_bh % H
        x += i_b * sx[0] + i_h * sx[2]
        y += i_b * sy[0] + i_h * sy[2]
        z += i_b * sz[0] + i_h * sz[2]
        out += i_b * so[0] + i_h * so[2]
        o_g, i, o_z = tl.arange(0, G)[:, None, None] * BN, tl.arange(0, BT), i_z * BZ + tl.arange(0, BZ)[None, :]
        o_n, o_k = o_g + tl.arange(0, BN)[None, None, :], o_g + tl.arange(0, BN)[None, :, None]  # [G, 1, BN], [G, BN, 1]
        m_n, m_z = o_n < N, o_z < M
        m_s = (o_k < N) & m_z[None]
        o_s = i_bh * N * M + o_k * ss[0] + o_z[None] * ss[1]
        a = tl.load(log_decay + i_h).to(tl.float32)
        distance = i[None, :] - i[:, None] if REVERSE else i[:, None] - i[None, :]  # [BT, BT]
        b_decay = tl.where(distance >= 0, tl.exp(a * tl.maximum(distance, 0)), 0.0)
        if initial is None:
            b_s = tl.zeros([G, BN, BZ], tl.float32)
        else:
            b_s = tl.load(initial + o_s, mask=m_s, other=0.0).to(tl.float32)
        n_t = tl.cdiv(T, BT)
        for n in range(n_t):
            start = (n_t - 1 - n if REVERSE else n) * BT
            c = tl.minimum(BT, T - start)  # tokens in this chunk
            o_t = (start + i).to(tl.int64)[:, None]
            m_t = (start + i < T)[:, None]
            b_x = tl.load(x + o_t[None] * sx[1] + o_n, mask=m_t[None] & m_n, other=0.0)  # [G, BT, BN]
            b_y = tl.load(y + o_t[None] * sy[1] + o_n, mask=m_t[None] & m_n, other=0.0)  # [G, BT, BN]
            b_z = tl.load(z + o_t * sz[1] + o_z, mask=m_t & m_z, other=0.0)  # [BT, BZ]
            b_y = tl.permute(b_y, (0, 2, 1))  # [G, BN, BT]
            from_start, to_end = tl.exp(a * (i + 1))[:, None], tl.exp(a * tl.maximum(c - 1 - i, 0))[:, None]
            b_a = tl.sum(tl.dot(b_x, b_y, input_precision="ieee"), 0) * b_decay  # [BT, BT]
            b_o = tl.sum(tl.dot(b_x, b_s.to(b_x.dtype), input_precision="ieee"), 0) * (to_end if REVERSE else from_start)
            b_o = tl.dot(b_a.to(b_z.dtype), b_z, b_o, input_precision="ieee")  # [BT, BZ]
            tl.store(out + o_t * so[1] + o_z, b_o, mask=m_t & m_z)
            b_z = (b_z.to(tl.float32) * (from_start if REVERSE else to_end)).to(b_z.dtype)
            b_z = tl.broadcast_to(b_z[None], (G, BT, BZ))
            b_s = tl.dot(b_y, b_z, b_s * tl.exp(a * c), input_precision="ieee")  # [G, BN, BZ]
        if final is not None:
            tl.store(final + o_s, b_s, mask=m_s)

    def config(x, N):
        """Slices of 32 rows, a warp for each up to 8. No spills on sm_89, at most 67,584 bytes of shared memory. fp32 is "ieee",
        plain FMAs: on sm_89 three tf32 products would be no faster."""
        G = max(2, triton.next_power_of_2(N) // 32)
        BT, BZ = (16, 16) if x.element_size() == 4 else (32, 32) if G <= 4 else (16, 64) if G == 8 else (16, 32)
        return dict(N=N, G=G, BN=32, BT=BT, BZ=BZ, num_warps=min(8, max(4, G)), num_stages=1 if x.element_size() == 4 else 2)

    def launch(x, y, z, out, log_decay, initial, final, transposed, reverse):
        """initial and final (B, H, K, V); transposed: the state is V x K, that is N = V."""
        (B, T, H, N), M = x.shape, z.shape[3]
        how = config(x, N)
        retention_kernel[(triton.cdiv(M, how["BZ"]) * B * H,)](
            x, y, z, out, log_decay, initial, final, x.stride(), y.stride(), z.stride(), out.stride(),
            (1, N) if transposed else (M, 1), H, T, M, REVERSE=reverse, **how)

    def rows(*tensors):
        """A last dimension that is not contiguous is made so; other strides are the kernel's business."""
        return [x if x.stride(3) == 1 else x.contiguous() for x in tensors]

    @torch.library.custom_op("kernels::retention", mutates_args=())
    def retention_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor,
                     initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """-> o, final."""
        q, k, v = rows(q, k, v)
        (B, _, H, K), V = q.shape, v.shape[3]
        o, final = v.new_empty(v.shape), v.new_empty(B, H, K, V, dtype=torch.float32)
        launch(q, k, v, o, log_decay, None if initial is None else initial.contiguous(), final, False, False)
        return o, final

    @retention_op.register_fake
    def _(q, k, v, log_decay, initial):
        return v.new_empty(v.shape), v.new_empty(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)

    @torch.library.custom_op("kernels::retention_bwd", mutates_args=())
    def retention_bwd_op(do: torch.Tensor, dfinal: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                         log_decay: torch.Tensor, initial: torch.Tensor | None
                         ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> dq, dk, dv, dinitial (empty without initial)."""
        do, q, k, v = rows(do, q, k, v)
        initial, dfinal = (None if x is None else x.contiguous() for x in (initial, dfinal))
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        dinitial = q.new_empty(0 if initial is None else initial.shape, dtype=torch.float32)
        launch(do, v, k, dq, log_decay, initial, None, True, False)
        launch(v, do, q, dk, log_decay, dfinal, None, True, True)
        launch(k, q, do, dv, log_decay, dfinal, None if initial is None else dinitial, False, True)
        return dq, dk, dv, dinitial

    @retention_bwd_op.register_fake
    def _(do, dfinal, q, k, v, log_decay, initial):
        dinitial = q.new_empty(0 if initial is None else initial.shape, dtype=torch.float32)
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dinitial

    def save_for_backward(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)  # an unused final brings no gradient: not a tensor of zeros to read

    def retention_backward(ctx, do, dfinal):
        *_, v, _, initial = ctx.saved_tensors
        dq, dk, dv, dinitial = retention_bwd_op(torch.zeros_like(v) if do is None else do, dfinal, *ctx.saved_tensors)
        return dq, dk, dv, None, None if initial is None else dinitial.to(initial.dtype)

    retention_op.register_autograd(retention_backward, setup_context=save_for_backward)

    def retention_triton(q, k, v, log_decay, initial=None):
        if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or max(q.shape[3], v.shape[3]) > 512:
            raise ValueError(f"retention: q {q.dtype}, K {q.shape[3]}, V {v.shape[3]}; expected float32, bfloat16 or "
                             "float16, and K, V <= 512")
        return retention_op(q, k, v, log_decay, initial)

    # ---- gated_norm: rows of V, a few to a program

    @triton.jit
    def gated_norm_fwd_kernel(o, z, y, M, V, eps, BM: tl.constexpr, BV: tl.constexpr):
        i_m, o_v = (tl.program_id(0) * BM + tl.arange(0, BM)[:, None]).to(tl.int64), tl.arange(0, BV)[None, :]
        m, i = (i_m < M) & (o_v < V), i_m * V + o_v
        b_o = tl.load(o + i, mask=m, other=0.0).to(tl.float32)  # [BM, BV]
        b_z = tl.load(z + i, mask=m, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(b_o * b_o, 1, keep_dims=True) / V + eps)  # [BM, 1]
        tl.store(y + i, b_z * tl.sigmoid(b_z) * b_o * r, mask=m)

    @triton.jit
    def gated_norm_bwd_kernel(dy, o, z, do, dz, M, V, eps, BM: tl.constexpr, BV: tl.constexpr):
        i_m, o_v = (tl.program_id(0) * BM + tl.arange(0, BM)[:, None]).to(tl.int64), tl.arange(0, BV)[None, :]
        m, i = (i_m < M) & (o_v < V), i_m * V + o_v
        b_dy = tl.load(dy + i, mask=m, other=0.0).to(tl.float32)  # [BM, BV]
        b_o = tl.load(o + i, mask=m, other=0.0).to(tl.float32)
        b_z = tl.load(z + i, mask=m, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(b_o * b_o, 1, keep_dims=True) / V + eps)  # [BM, 1]
        b_u, sigmoid = b_o * r, tl.sigmoid(b_z)
        b_g = b_dy * b_z * sigmoid
        tl.store(do + i, r * (b_g - b_u * (tl.sum(b_g * b_u, 1, keep_dims=True) / V)), mask=m)
        tl.store(dz + i, b_dy * b_u * sigmoid * (1 + b_z * (1 - sigmoid)), mask=m)  # silu' = sigmoid (1 + z (1 - sigmoid))

    def row_config(o):
        """-> M, V, grid, constexprs."""
        M, V = o.numel() // o.shape[-1], o.shape[-1]
        BV = triton.next_power_of_2(V)
        BM = max(1, 1024 // BV)
        return M, V, (triton.cdiv(M, BM),), dict(BM=BM, BV=BV, num_warps=4 if BV <= 1024 else 8)

    @torch.library.custom_op("kernels::gated_norm", mutates_args=())
    def gated_norm_op(o: torch.Tensor, z: torch.Tensor, eps: float) -> torch.Tensor:
        M, V, grid, how = row_config(o)
        y = o.new_empty(o.shape)
        gated_norm_fwd_kernel[grid](o.contiguous(), z.contiguous(), y, M, V, eps, **how)
        return y

    @gated_norm_op.register_fake
    def _(o, z, eps):
        return o.new_empty(o.shape)

    @torch.library.custom_op("kernels::gated_norm_bwd", mutates_args=())
    def gated_norm_bwd_op(dy: torch.Tensor, o: torch.Tensor, z: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        M, V, grid, how = row_config(o)
        do, dz = o.new_empty(o.shape), z.new_empty(z.shape)
        gated_norm_bwd_kernel[grid](dy.contiguous(), o.contiguous(), z.contiguous(), do, dz, M, V, eps, **how)
        return do, dz

    @gated_norm_bwd_op.register_fake
    def _(dy, o, z, eps):
        return o.new_empty(o.shape), z.new_empty(z.shape)

    def save_rows(ctx, inputs, output):
        o, z, ctx.eps = inputs
        ctx.save_for_backward(o, z)

    gated_norm_op.register_autograd(lambda ctx, dy: (*gated_norm_bwd_op(dy, *ctx.saved_tensors, ctx.eps), None), setup_context=save_rows)


def retention(q, k, v, log_decay, initial=None):
    """q, k (B, T, H, K), v (B, T, H, V), log_decay (H,) <= 0, initial (B, H, K, V) or None: the state before the first token
    -> o (B, T, H, V) in v's dtype, final (B, H, K, V) fp32: the state after the last. T >= 1. ValueError: shapes or dtypes
    that do not fit; on a GPU also K or V > 512."""
    B, T, H, K = q.shape
    if k.shape != q.shape or v.shape[:3] != (B, T, H) or log_decay.shape != (H,) or not T or (
            initial is not None and initial.shape != (B, H, K, v.shape[3])):
        shapes = [tuple(x.shape) for x in (q, k, v, log_decay, initial) if x is not None]
        raise ValueError(f"retention: shapes {shapes}; expected q, k (B, T, H, K), v (B, T, H, V), log_decay (H,), "
                         "initial (B, H, K, V)")
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"retention: q {q.dtype}, k {k.dtype}, v {v.dtype}; expected one dtype")
    which = form(q)
    op = retention_triton if which == "triton" else retention_ref if which == "ref" else retention_torch
    return op(q, k, v, log_decay, initial)


def gated_norm(o, z, eps=1e-6):
    """o, z (..., V) -> y = silu(z) * o / sqrt(mean(o^2) + eps) (..., V), o's dtype. ValueError: two shapes; on a GPU V > 8192."""
    if o.shape != z.shape or o.shape[-1] > 8192:
        raise ValueError(f"gated_norm: shapes {tuple(o.shape)}, {tuple(z.shape)}; expected two of (..., V), V <= 8192")
    which = form(o)
    op = gated_norm_op if which == "triton" else gated_norm_ref if which == "ref" else GatedNorm.apply
    return op(o, z, eps)
