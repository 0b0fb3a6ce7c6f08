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

Every exponent is a difference of times, never a quotient of decays, so nothing overflows however small a decay is. With
a decay for each step and head (Mamba-2), a (i - j) becomes L_i - L_j and a (i + 1) becomes L_i of the chunk's
cumulative sums L of the log decays, and no more changes: a load of (c,) and a cumsum, and for the decays' gradient
dL_i = q_i . dq_i - k_i . dk_i, summed from the end (kernels/ssd.py is that, with its own shapes). A decay for each key
channel (RWKV-6) would go inside the product q_i . k_j.

Shapes: q, k (B, T, H, K), v (B, T, H, V), log_decay (H,) fp32, <= 0, initial (B, H, K, V) or None
     -> o (B, T, H, V) in v's dtype, final (B, H, K, V) fp32 (fp64 for fp64). q, k and v of one dtype: fp32, bf16 or
fp16; any strides, as views of a projection have them (the kernels copy only where the last dimension is not
contiguous). K and V at most 512 in the kernels. The state and all sums are fp32; A, B and the state are rounded to the
inputs' dtype to be multiplied. log_decay takes no gradient. Under autocast q, k and v are cast to its dtype.

Saved for backward: the inputs; the kernels make states again (the plain form keeps one a chunk), both forms A and B.
Bytes: each launch reads its inputs and writes its result, and no state or product between: the floor for forward, and
in backward (dq, dk, dv: three launches of the same kernel) each input once a launch. The programs that share a head's
columns (7 at V = 432) read x and y each, from the cache: they run side by side.
FLOPs: 2 T (c K + c V + 2 K V) a head forward, three times that backward; products with c x c matrices are done whole.

CPU: token by token as a loop in C for fp32 and bf16, backward too, half of the chunks' time in fp32
(CompiledRetention); under torch.compile, without a compiler and for other dtypes the chunks (Retention).

gated_norm: y = silu(z) * o r,  r = 1 / sqrt(mean(o^2) + eps) over the last dimension (eq. 8's group norm, per head).
    with s = silu(z), u = o r:  do = r (dy s - u mean(dy s u)), dz = dy u silu'(z). Saves o, z; 3 + 5 passes, the floor;
on a CPU as a loop in C.
"""
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

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


# ----- c (shared) -----
# A loop over time, or over bytes, is what a CPU is good at and what tensor operations cannot say: such loops are C
# here, which gcc or clang turns into vectors, once on a machine. A failed attempt is said. Without a compiler, or with
# KERNELS_C=0, the plain form in PyTorch serves.
HEADER = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
typedef int64_t num;
static inline float bits(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
static inline float from_bf16(uint16_t x) { return bits((uint32_t)x << 16); }
static inline uint16_t to_bf16(float x) {  /* to nearest, ties to even; what is not a number stays so */
    uint32_t u;
    memcpy(&u, &x, 4);
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static inline float ex2(float x) {  /* 2^x: a minimax polynomial for the fraction, the exponent's bits for the rest */
    x = x < -126 ? -126 : x > 126 ? 126 : x;
    float n = rintf(x), f = x - n, p = 1.53533589e-4f * f + 1.33988747e-3f;
    p = ((((p * f + 9.61843737e-3f) * f + 5.55033247e-2f) * f + 0.240226479f) * f + 0.693147203f) * f + 1;
    return p * bits((uint32_t)((int32_t)n + 127) << 23);
}
static inline float sigmoid(float x) { return 1 / (1 + ex2(-1.44269504f * x)); }
static inline void get(const void *x, num x16, num at, num n, float *to) {  /* n from the at-th on; x16: bf16? */
    if (x16) for (num i = 0; i < n; i++) to[i] = from_bf16(((uint16_t *)x)[at + i]);
    else memcpy(to, (float *)x + at, 4 * n);
}
static inline const float *see(const void *x, num x16, num at, num n, float *room) {  /* where they lie, or in room */
    if (!x16) return (const float *)x + at;
    get(x, 1, at, n, room);
    return room;
}
static inline void put(const float *x, num n, num to16, void *to, num at) {
    if (to16) {
        uint16_t *y = (uint16_t *)to + at;
        num i = 0;
#ifdef __AVX512BF16__
        for (; i + 16 <= n; i += 16) {
            __m256bh v = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
            memcpy(y + i, &v, 32);
        }
#endif
        for (; i < n; i++) y[i] = to_bf16(x[i]);
    } else memcpy((float *)to + at, x, 4 * n);
}
enum { RUN = 512 };  /* numbers that a loop over all elements has in hand */
"""


@functools.cache
def compiled(source):
    """HEADER + source as a library, or None without a compiler. Its loops run on PyTorch's own OpenMP threads. It is
    kept in ~/.cache/kernels_c (XDG_CACHE_HOME), under a name that says source, compiler, flags and processor."""
    cc = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if not cc or os.environ.get("KERNELS_C") == "0":
        return None
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-fopenmp"]
    flags += ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []  # gcc's own choice is 256
    what = HEADER, source, cc, flags, platform.platform(), getattr(torch.cpu, "get_capabilities", dict)()
    name = hashlib.sha256(repr(what).encode()).hexdigest()[:24] + ".so"
    try:
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kernels_c")
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
            library = (folder if os.access(folder, os.W_OK) else Path(tmp)) / name
            if not library.is_file():
                Path(tmp, "c.c").write_text(HEADER + source)
                part = library.with_suffix(f".{os.getpid()}")  # another process may be at it, too
                subprocess.run([cc, *flags, "c.c", "-o", part], cwd=tmp, check=True, capture_output=True)
                part.replace(library)
            return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as e:
        warnings.warn(f"{cc} cannot compile the loops of kernels/ ({e}): slower forms in PyTorch serve; "
                      "KERNELS_C=0 asks for those")
        return None


def call(function, *args):
    """function(*args): contiguous tensors or None as pointers, lists of tensors as arrays of pointers, ints as int64.
    Fake tensors are only shapes: no call."""
    fake, given = torch._subclasses.FakeTensor, []
    for a in args:
        if isinstance(a, int):
            given.append(ctypes.c_int64(a))
        elif isinstance(a, fake) or isinstance(a, list) and any(isinstance(t, fake) for t in a):
            return
        elif isinstance(a, list):
            given.append((ctypes.c_void_p * len(a))(*(t.data_ptr() for t in a)))
        else:
            given.append(ctypes.c_void_p(None if a is None else a.data_ptr()))
    function(*given)
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


CHUNK = 128  # of the plain form, at most


def chunks(x, n, c):
    """x (b, T, H, D) -> (n, b, H, c, D) in one piece, zeros after the end: batches of matrices as BLAS likes them."""
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, n * c - x.shape[1]))
    return x.unflatten(1, (n, c)).permute(1, 0, 3, 2, 4).contiguous()


def unchunk(x, out):
    """The inverse, into out (b, n c, H, D)."""
    n, _, _, c, _ = x.shape
    out.unflatten(1, (n, c)).copy_(x.permute(1, 0, 3, 2, 4))


def decays(a, n, c, T, dtype):
    """a (H,) -> exp(a (i - j)) for i >= j, else 0 (H, c, c); exp(a (i + 1)) (H, c, 1); and for each of the n chunks of
    l = c tokens, of which the last may have fewer, exp(a (l - 1 - j)) (n, 1, H, c, 1) and exp(a l) (n, 1, H, 1, 1)."""
    i, a = torch.arange(c, device=a.device), a[:, None, None]
    left = (T - c * torch.arange(n, device=a.device)).clamp(max=c)[:, None, None, None, None]  # l
    inside, before = torch.exp(a * (i[:, None] - i).clamp(min=0)).tril(), torch.exp(a * (i + 1)[:, None])
    after, whole = torch.exp(a * (left - 1 - i[:, None]).clamp(min=0)), torch.exp(a * left)
    return inside.to(dtype), before.to(dtype), after.to(dtype), whole


class Retention(torch.autograd.Function):
    """Some sequences at a time, so that their A fits a core's cache, all chunks of theirs in one batch of products;
    only the states go from chunk to chunk. Saved for backward: the inputs and the states between chunks."""

    @staticmethod
    def sizes(q):
        """-> chunks n, their length c, sequences at a time"""
        _, T, H, _ = q.shape
        n = -(-T // CHUNK)
        c = -(-T // n)
        return n, c, max(1, 2**18 // (n * H * c * c))

    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial):
        (B, T, H, K), V, (n, c, some) = q.shape, v.shape[3], Retention.sizes(q)
        wide = torch.promote_types(v.dtype, torch.float32)
        inside, before, after, whole = decays(log_decay.to(wide), n, c, T, v.dtype)
        o, final = v.new_empty(B, n * c, H, V), v.new_empty(B, H, K, V, dtype=wide)
        states = v.new_empty(n - 1, B, H, K, V, dtype=wide)  # the one before the first chunk is `initial`
        for b in (slice(i, i + some) for i in range(0, B, some)):
            q_c, k_c, v_c = (chunks(x[b], n, c) for x in (q, k, v))  # (n, b, H, c, K or V)
            o_c = (q_c @ k_c.mT).mul_(inside) @ v_c
            S = ((k_c * after).mT @ v_c).to(wide)  # (n, b, H, K, V): of each chunk alone; then what it leaves
            if initial is not None:
                S[0].addcmul_(whole[0], initial[b].to(wide))
                o_c[0] += (q_c[0] * before) @ initial[b].to(v.dtype)
            for i in range(1, n):
                S[i].addcmul_(whole[i], S[i - 1])
            if n > 1:
                o_c[1:] += (q_c[1:] * before) @ S[:-1].to(v.dtype)
            unchunk(o_c, o[b])
            states[:, b], final[b] = S[:-1], S[-1]
        ctx.save_for_backward(q, k, v, log_decay, initial, states)
        ctx.set_materialize_grads(False)  # an unused final brings no gradient
        return o[:, :T], final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, log_decay, initial, states = ctx.saved_tensors
        (B, T, H, _), (n, c, some), wide = q.shape, Retention.sizes(q), states.dtype
        inside, before, after, whole = decays(log_decay.to(wide), n, c, T, v.dtype)
        do = torch.zeros_like(v) if do is None else do
        dq, dk, dv = (x.new_empty(B, n * c, H, x.shape[3]) for x in (q, k, v))
        dinitial = None if initial is None else torch.empty_like(initial)
        for b in (slice(i, i + some) for i in range(0, B, some)):
            q_c, k_c, v_c, do_c = (chunks(x[b], n, c) for x in (q, k, v, do))
            D = (do_c @ v_c.mT).mul_(inside)  # the B above
            dq_c, dk_c = D @ k_c, D.mT @ q_c
            dv_c = (q_c @ k_c.mT).mul_(inside).mT @ do_c
            if n > 1 or initial is not None:
                R = ((q_c * before).mT @ do_c).to(wide)  # (n, b, H, K, V): dL/dS before a chunk, by its o; then in all
            if dfinal is not None:
                dk_c[-1] += (v_c[-1] * after[-1]) @ dfinal[b].to(v.dtype).mT
                dv_c[-1] += (k_c[-1] * after[-1]) @ dfinal[b].to(v.dtype)
                if n > 1 or initial is not None:
                    R[-1].addcmul_(whole[-1], dfinal[b].to(wide))
            if n > 1:
                for i in range(n - 2, -1, -1):
                    R[i].addcmul_(whole[i], R[i + 1])
                dk_c[:-1] += (v_c * after)[:-1] @ R[1:].to(v.dtype).mT
                dv_c[:-1] += (k_c * after)[:-1] @ R[1:].to(v.dtype)
                dq_c[1:] += (do_c[1:] * before) @ states[:, b].to(v.dtype).mT
            if initial is not None:
                dq_c[0] += (do_c[0] * before) @ initial[b].to(v.dtype).mT
                dinitial[b] = R[0]
            for x, out in ((dq_c, dq), (dk_c, dk), (dv_c, dv)):
                unchunk(x, out[b])
        return dq[:, :T], dk[:, :T], dv[:, :T], None, dinitial


# The recurrence as it is written at the top, W columns of S at once; or from the last token to the first,
# S_t = e^a S_{t+1} + k_t^T v_t. Gradients are such scans too, with R = dL/dS, and S turned where v is on q's side:
#     dq = scan(do, v, k) with S^T,   dv = scan backward(k, q, do) with R,   dk = scan backward(v, do, q) with R^T
SOURCE = r"""
enum { W = 16 * M };  /* columns of S at once: 16 floats are a vector */
typedef float vec __attribute__((vector_size(64)));

/* q, k (B, T, H, K), v (B, T, H, V), g (H) the decays e^a -> o (B, T, H, V). state (B, H, K, V), or (B, H, V, K) if
   turned: before the first token read, then after the last; backward decays it once more, to R of the token before. */
void scan(const void *q, const void *k, const void *v, const float *g, void *o, float *state,
          num B, num T, num H, num K, num V, num backward, num turned, num x16) {
    num blocks = (V + W - 1) / W;
    #pragma omp parallel for schedule(static) if (B * H * T * K > 2048)
    for (num i = 0; i < B * H * blocks; i++) {
        num h = i / blocks % H, b = i / blocks / H, left = i % blocks * W, n = V - left < W ? V - left : W;
        num row = turned ? 1 : V, column = turned ? K : 1;
        float *S = state + (b * H + h) * K * V + left * column;
        vec s[K][M], zero = {0};
        float q_t[K], k_t[K];
        memset(s, 0, sizeof s);
        for (num j = 0; j < K; j++)
            for (num l = 0; l < n; l++) ((float *)s[j])[l] = S[j * row + l * column];
        for (num step = 0; step < T; step++) {
            num at = (b * T + (backward ? T - 1 - step : step)) * H + h;
            float decay = backward && step == 0 ? 1 : g[h];
            vec v_t[M], o_t[M];
            for (num m = 0; m < M; m++) v_t[m] = o_t[m] = zero;
            get(q, x16, at * K, K, q_t);
            get(k, x16, at * K, K, k_t);
            get(v, x16, at * V + left, n, (float *)v_t);
            for (num j = 0; j < K; j++)
                for (num m = 0; m < M; m++) {
                    s[j][m] = s[j][m] * decay + v_t[m] * k_t[j];
                    o_t[m] += s[j][m] * q_t[j];
                }
            put((float *)o_t, n, x16, o, at * V + left);
        }
        for (num j = 0; j < K; j++)
            for (num l = 0; l < n; l++) S[j * row + l * column] = ((float *)s[j])[l] * (backward ? g[h] : 1);
    }
}
"""


@functools.cache
def library(M):
    return compiled(f"enum {{ M = {M} }};" + SOURCE)


def scan(q, k, v, g, state, backward=False, turned=False):
    """q, k (B, T, H, K), v (B, T, H, V), g (H,) -> o like v; state, (B, H, K, V) or turned, becomes the last."""
    o, V = torch.empty_like(v), v.shape[3]
    call(library(4 if V > 32 else 2 if V > 16 else 1).scan, q, k, v, g, o, state, *q.shape, V,
         int(backward), int(turned), int(v.dtype == torch.bfloat16))
    return o


class CompiledRetention(torch.autograd.Function):
    """The recurrence as it is written at the top, fp32 inside; the inputs are all that is kept."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial):
        q, k, v = (x.contiguous() for x in (q, k, v))
        g = log_decay.float().exp()
        S = (g.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if initial is None else
             initial.to(g.dtype, copy=True).contiguous())
        ctx.save_for_backward(q, k, v, g, initial)
        ctx.set_materialize_grads(False)  # an unused final brings no gradient
        return scan(q, k, v, g, S), S

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, g, initial = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do.contiguous()
        S, R = (g.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if x is None else
                x.to(g.dtype, copy=True).contiguous() for x in (initial, dfinal))
        dq = scan(do, v, k, g, S, turned=True)
        dk = scan(v, do, q, g, R.clone(), backward=True, turned=True)
        dv = scan(k, q, do, g, R, backward=True)
        return dq, dk, dv, None, None if initial is None else R


def retention_torch(q, k, v, log_decay, initial=None):
    compiles = v.is_cpu and v.dtype in (torch.float32, torch.bfloat16) and not torch.compiler.is_compiling()
    if compiles and library(4):
        return CompiledRetention.apply(q, k, v, log_decay, initial)
    if q.shape[1] == 1:  # generation: one step of the definition
        return retention_ref(q, k, v, log_decay, initial)
    return Retention.apply(q, k, v, log_decay, initial)


NORM = r"""
void gated_norm(const void *o, const void *z, void *y, float *r, const float *eps, num M, num V, num x16) {
    #pragma omp parallel for schedule(static) if (M * V > 8192)
    for (num m = 0; m < M; m++) {
        float u[V], g[V], square = 0;
        get(o, x16, m * V, V, u);
        get(z, x16, m * V, V, g);
        #pragma omp simd reduction(+:square)
        for (num j = 0; j < V; j++) square += u[j] * u[j];
        r[m] = 1 / sqrtf(square / V + *eps);
        for (num j = 0; j < V; j++) u[j] *= r[m] * g[j] * sigmoid(g[j]);
        put(u, V, x16, y, m * V);
    }
}

void gated_norm_backward(const void *dy, const void *o, const void *z, const float *r, void *dout, void *dz, num M,
                         num V, num x16) {
    #pragma omp parallel for schedule(static)
    for (num m = 0; m < M; m++) {
        float u[V], g[V], d[V], mean = 0;
        get(dy, x16, m * V, V, d);
        get(o, x16, m * V, V, u);
        get(z, x16, m * V, V, g);
        #pragma omp simd reduction(+:mean)
        for (num j = 0; j < V; j++) {
            float s = sigmoid(g[j]), t = d[j];
            u[j] *= r[m];
            d[j] = t * g[j] * s;  /* dy silu(z) */
            g[j] = t * u[j] * s * (1 + g[j] * (1 - s));
            mean += d[j] * u[j];
        }
        put(g, V, x16, dz, m * V);
        mean /= V;
        for (num j = 0; j < V; j++) d[j] = r[m] * (d[j] - u[j] * mean);
        put(d, V, x16, dout, m * V);
    }
}
"""


class CompiledGatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, z, eps):
        o, z = o.contiguous(), z.contiguous()
        ctx.how = o.numel() // o.shape[-1], o.shape[-1], int(o.dtype == torch.bfloat16)
        y, r = torch.empty_like(o), o.new_empty(o.shape[:-1], dtype=torch.float32)
        call(compiled(NORM).gated_norm, o, z, y, r, torch.tensor(eps, dtype=torch.float32), *ctx.how)
        ctx.save_for_backward(o, z, r)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        o, z, r = ctx.saved_tensors
        do, dz = torch.empty_like(o), torch.empty_like(z)
        call(compiled(NORM).gated_norm_backward, dy.contiguous(), o, z, r, do, dz, *ctx.how)
        return do, dz, None


def gated_norm_torch(o, z, eps=1e-6):
    if (o.is_cpu and o.dtype == z.dtype and o.dtype in (torch.float32, torch.bfloat16) and o.numel() > 4096
            and not torch.compiler.is_compiling() and compiled(NORM)):
        return CompiledGatedNorm.apply(o, z, eps)
    return gated_norm_ref(o, z, eps)


if triton is not None:
    # Forward and the three gradients are one computation on different tensors, x and y (T, N), z (T, M) -> out (T, M):
    #     out_i = sum_j exp(a |i - j|) (x_i . y_j) z_j + f_i x_i S,   S' = exp(a c) S + sum_j f'_j y_j^T z_j    S (N, M)
    #     o:  q, k, v     dq:  do, v, k with S^T     over j <= i,   f_i = exp(a (i + 1)),      f'_j = exp(a (c - 1 - j))
    #     dv: k, q, do    dk:  v, do, q, with R in S's place, from the last chunk to the first,
    #                                                over j >= i,   f_i = exp(a (c - 1 - i)),  f'_j = exp(a (j + 1))
    # A program owns BZ columns of out and of S, which stays in registers (fp32) from the first chunk to the last:
    # nothing but the inputs and the result goes through memory, and dq makes the states again rather than reading them.
    # The N rows are G slices of BN, a leading dimension of x, y and S: products are batches of G, one for each warp,
    # which so holds its own slice of every operand; the sums over G then add up what a product over N would (with one
    # large product each warp holds nearly all of S as an operand and spills).

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
        o_n, o_k = o_g + tl.arange(0, BN)[None, None, :], o_g + tl.arange(0, BN)[None, :, None]  # [G, 1, BN] [G, BN, 1]
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
            b_o = (tl.sum(tl.dot(b_x, b_s.to(b_x.dtype), input_precision="ieee"), 0)
                   * (to_end if REVERSE else from_start))
            b_o = tl.dot(b_a.to(b_z.dtype), b_z, b_o, input_precision="ieee")  # [BT, BZ]
            tl.store(out + o_t * so[1] + o_z, b_o, mask=m_t & m_z)
            b_z = (b_z.to(tl.float32) * (from_start if REVERSE else to_end)).to(b_z.dtype)
            b_z = tl.broadcast_to(b_z[None], (G, BT, BZ))
            b_s = tl.dot(b_y, b_z, b_s * tl.exp(a * c), input_precision="ieee")  # [G, BN, BZ]
        if final is not None:
            tl.store(final + o_s, b_s, mask=m_s)

    def config(x, N):
        """Slices of 32 rows, a warp for each up to 8. No spills on sm_89, at most 67,584 bytes of shared memory. fp32
        is "ieee", plain FMAs: on sm_89 three tf32 products would be no faster."""
        G = max(2, triton.next_power_of_2(N) // 32)
        BT, BZ = (16, 16) if x.element_size() == 4 else (32, 32) if G <= 4 else (16, 64) if G == 8 else (16, 32)
        return dict(N=N, G=G, BN=32, BT=BT, BZ=BZ, num_warps=min(8, max(4, G)),
                    num_stages=1 if x.element_size() == 4 else 2)

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

    @custom_op("kernels::retention", mutates_args=())
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

    @custom_op("kernels::retention_bwd", mutates_args=())
    def retention_bwd_op(do: torch.Tensor, dfinal: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
                         v: torch.Tensor, log_decay: torch.Tensor, initial: torch.Tensor | None
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
        saved = *_, v, _, initial = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
        dq, dk, dv, dinitial = retention_bwd_op(torch.zeros_like(v) if do is None else do, dfinal, *saved)
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
        tl.store(dz + i, b_dy * b_u * sigmoid * (1 + b_z * (1 - sigmoid)), mask=m)  # silu' = sigma (1 + z (1 - sigma))

    def row_config(o):
        """-> M, V, grid, constexprs."""
        M, V = o.numel() // o.shape[-1], o.shape[-1]
        BV = triton.next_power_of_2(V)
        BM = max(1, 1024 // BV)
        return M, V, (triton.cdiv(M, BM),), dict(BM=BM, BV=BV, num_warps=4 if BV <= 1024 else 8)

    @custom_op("kernels::gated_norm", mutates_args=())
    def gated_norm_op(o: torch.Tensor, z: torch.Tensor, eps: float) -> torch.Tensor:
        M, V, grid, how = row_config(o)
        y = o.new_empty(o.shape)
        gated_norm_fwd_kernel[grid](o.contiguous(), z.contiguous(), y, M, V, eps, **how)
        return y

    @gated_norm_op.register_fake
    def _(o, z, eps):
        return o.new_empty(o.shape)

    @custom_op("kernels::gated_norm_bwd", mutates_args=())
    def gated_norm_bwd_op(dy: torch.Tensor, o: torch.Tensor, z: torch.Tensor, eps: float
                          ) -> tuple[torch.Tensor, torch.Tensor]:
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

    gated_norm_op.register_autograd(lambda ctx, dy: (*gated_norm_bwd_op(dy, *ctx.saved_tensors, ctx.eps), None),
                                    setup_context=save_rows)


def retention(q, k, v, log_decay, initial=None):
    """q, k (B, T, H, K), v (B, T, H, V), log_decay (H,) <= 0, initial (B, H, K, V) or None: the state before the first
    token -> o (B, T, H, V) in v's dtype, final (B, H, K, V) fp32: the state after the last. T >= 1. ValueError: shapes
    or dtypes that do not fit; on a GPU also K or V > 512."""
    B, T, H, K = q.shape
    if k.shape != q.shape or v.shape[:3] != (B, T, H) or log_decay.shape != (H,) or not T or (
            initial is not None and initial.shape != (B, H, K, v.shape[3])):
        shapes = [tuple(x.shape) for x in (q, k, v, log_decay, initial) if x is not None]
        raise ValueError(f"retention: shapes {shapes}; expected q, k (B, T, H, K), v (B, T, H, V), log_decay (H,), "
                         "initial (B, H, K, V)")
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"retention: q {q.dtype}, k {k.dtype}, v {v.dtype}; expected one dtype")
    which = form(q)
    op = retention_triton if which == "triton" else retention_ref if which == "ref" else retention_torch
    return op(q, k, v, log_decay, initial)


def gated_norm(o, z, eps=1e-6):
    """o, z (..., V) -> y = silu(z) * o / sqrt(mean(o^2) + eps), like o. ValueError: two shapes; on a GPU V > 8192."""
    if o.shape != z.shape or o.shape[-1] > 8192:
        raise ValueError(f"gated_norm: shapes {tuple(o.shape)}, {tuple(z.shape)}; expected two of (..., V), V <= 8192")
    which = form(o)
    op = gated_norm_op if which == "triton" else gated_norm_ref if which == "ref" else gated_norm_torch
    return op(o, z, eps)
