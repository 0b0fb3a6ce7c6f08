"""
State space duality: the recurrence of Mamba-2, chunk by chunk with matrix products
    Dao & Gu 2024, arXiv:2405.21060v1, section 6 and listing 1

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,   y_t = S_t C_t + D x_t           per head: S (P, N), dt_t, A, D numbers
    in a chunk of Q tokens, after the state S, with c_i = (dt_1 + ... + dt_i) A from the chunk's start, v_j = dt_j x_j,
    e_i = exp(c_i), w_j = exp(c_Q - c_j), L_ij = exp(c_i - c_j) for i >= j, else 0:
    y_i = sum_j L_ij (C_i . B_j) v_j + e_i S C_i + D x_i,    S' = e_Q S + sum_j w_j v_j B_j^T
    backward, with o = dy, R = dL/dS' of the state the chunk leaves (after the last: dfinal), X_ij = L_ij (o_i . v_j):
    dC_i = sum_j X_ij B_j + e_i S^T o_i,      dB_j = sum_i X_ij C_i + w_j R^T v_j        (summed over the group's heads)
    dv_j = sum_i L_ij (C_i . B_j) o_i + w_j R B_j,      R' = e_Q R + sum_i e_i o_i C_i^T,      dx_j = dt_j dv_j + D o_j
    c: with W_ij = X_ij (C_i . B_j), i > j:   dL/dc_i = sum_j W_ij - sum_j W_ji + e_i o_i . S C_i - w_i v_i . R B_i
    dt_t counts in c_i of all i >= t, also beyond its chunk:  dL/d(dt_t A) = sum_{i >= t} dL/dc_i + dfinal . final
    ddt_t = A dL/d(dt_t A) + x_t . dv_t,   dA = sum_t dt_t dL/d(dt_t A),   dD = sum_t o_t . x_t

Every exponent is a difference of sums within one chunk and at most 0, so nothing overflows however small a decay is.

Shapes: x (B, T, H, P), dt (B, T, H), A, D (H,), B, C (B, T, G, N), initial (B, H, P, N) -> y (B, T, H, P) in x's dtype,
final (B, H, P, N) fp32 (fp64 for fp64). Head h has B and C of group h G / H. x, B and C of one dtype, fp32, bf16 or
fp16, and of any strides but the last, as columns of a projection are; dt > 0 (after its softplus), A < 0 and D fp32.
The kernels: N <= 256. Sums and the state are fp32; a matrix is rounded to the inputs' dtype to be multiplied. But
dL/d(dt_t A) adds up dL/dc_i over all i >= t, where what pairs of later tokens give cancels, and the rounding of S and R
would not: in these sums 16-bit backward multiplies S, R and what updates them in two parts, rounded and the rest.

On a CPU the chunks are a loop in C (CompiledSSD), whose matrices stay in the cache; without a compiler, in fp64 and
under torch.compile PyTorch's products (SSD). Both save the state before each chunk of 64 tokens.

The kernels save the inputs only: a program owns a head of a sequence, goes through its chunks with the state in
registers, forward (y; and dC, which makes the states again) or from the last to the first (dx, dB with R). So forward
moves the floor (B and C, which all heads of a group read, come from the L2 cache), and backward reads the inputs twice;
what each head has of dB and dC is written and added up by PyTorch in a fixed order, and that is most of backward's
bytes. Results repeat bit for bit.
FLOPs a token and head: 2 (Q N + Q P + 2 N P) forward, Q = 32, 2 (3 Q N + 3 Q P + 9 N P) backward, Q = 16; tensor cores.
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


# ----- gemm (shared) -----
# Products of matrices that are in the cache, for loops in C: about as fast as MKL's.
GEMM = r"""
#ifdef __AVX512F__
enum { W = 16, V = 4 };  /* floats in a vector, vectors in a row of a product's sums: 4 x 4 of them fit the registers */
#else
enum { W = 8, V = 2 };
#endif
enum { ROWS = 4 };
typedef float vec __attribute__((vector_size(4 * W), aligned(4), may_alias));

#define SUMS(NAME, R, V) \
static void NAME(const float *a, num a_m, num a_k, const float *b, num b_k, float *c, num c_m, num K, num add) { \
    vec s[R][V]; \
    for (num r = 0; r < R; r++) \
        for (num v = 0; v < V; v++) s[r][v] = add ? *(vec *)(c + r * c_m + v * W) : (vec){0}; \
    for (num k = 0; k < K; k++, a += a_k, b += b_k) { \
        vec x[V]; \
        for (num v = 0; v < V; v++) x[v] = *(vec *)(b + v * W); \
        for (num r = 0; r < R; r++) \
            for (num v = 0; v < V; v++) s[r][v] += a[r * a_m] * x[v]; \
    } \
    for (num r = 0; r < R; r++) \
        for (num v = 0; v < V; v++) *(vec *)(c + r * c_m + v * W) = s[r][v]; \
}
SUMS(wide, ROWS, V)
SUMS(half, 2 * ROWS, V / 2)
SUMS(narrow, 2 * ROWS, 1)

/* c = a b, or c += a b. a (M, K), element (m, k) at m a_m + k a_k; b (K, N), c (M, N): rows b_k, c_m apart. M is a
   multiple of 8, N of 16 */
static void product(const float *a, num a_m, num a_k, const float *b, num b_k, float *c, num c_m,
                    num M, num N, num K, num add) {
    for (num n = 0, v; n < N; n += v * W) {
        v = N - n >= V * W ? V : N - n >= V / 2 * W ? V / 2 : 1;
        for (num m = 0; m < M; m += v == V ? ROWS : 2 * ROWS)
            (v == V ? wide : v > 1 ? half : narrow)(a + m * a_m, a_m, a_k, b + n, b_k, c + m * c_m + n, c_m, K, add);
    }
}
"""
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


# The chunks as they stand at the top. A thread has some heads of one group, all of them in most cases: they share B and
# C, and C B^T is made once for them. States lie as (N, P), and what has a gradient of C or B is made as (N, Q), so that
# no state is ever turned. N and P are known when this is compiled.
SOURCE = r"""
enum { Q = 64, NN = (N + 15) / 16 * 16, PP = (P + 15) / 16 * 16 };
typedef struct { num b, t, h; } strides;
typedef float tokens_n[Q][NN], tokens_p[Q][PP], n_tokens[NN][Q], p_tokens[PP][Q], square[Q][Q], state[NN][PP];
typedef struct {
    tokens_n B, C, scaled, dB, dC;
    n_tokens BT, CT, dBT, dCT, part;
    tokens_p x, v, o, y, dv, r;
    p_tokens vT, oT;
    square CB, L, M, dM, dCB;
    float dt[Q], c[Q], e[Q], w[Q];
    double dc[Q], ds[Q];  /* these are sums that cancel */
} space;
static const float LOG2E = 1.44269504f;

/* `count` rows of n numbers, then zeros: (Q, pad) */
static void rows(const void *x, strides s, num b, num t, num h, num count, num n, num pad, num x16, float *to) {
    memset(to, 0, 4 * Q * pad);
    for (num i = 0; i < count; i++) get(x, x16, b * s.b + (t + i) * s.t + h * s.h, n, to + i * pad);
}

static void turn(const float *x, num n, float *to) {  /* (Q, n) -> (n, Q) */
    for (num j = 0; j < n; j++)
        for (num i = 0; i < Q; i++) to[j * Q + i] = x[i * n + j];
}

/* of one head: dt, c, e, w, L below and on the diagonal, M = L C B^T, v = dt x */
static void chunk(space *s, const void *x, strides sx, const float *dt, float A, num b, num t, num h, num T, num H,
                  num count, num x16) {
    float sum = 0;
    for (num i = 0; i < Q; i++) {
        s->dt[i] = i < count ? dt[(b * T + t + i) * H + h] : 0;
        s->c[i] = sum += s->dt[i] * A;
    }
    for (num i = 0; i < Q; i++) s->e[i] = ex2(LOG2E * s->c[i]), s->w[i] = ex2(LOG2E * (sum - s->c[i]));
    for (num i = 0; i < Q; i++)
        for (int j = 0; j < Q; j++) {
            float L = ex2(LOG2E * (s->c[i] - s->c[j] < 0 ? s->c[i] - s->c[j] : 0));
            s->L[i][j] = L = j <= i ? L : 0;
            s->M[i][j] = L * s->CB[i][j];
        }
    rows(x, sx, b, t, h, count, P, PP, x16, s->x[0]);
    for (num i = 0; i < Q; i++)
        for (num p = 0; p < PP; p++) s->v[i][p] = s->dt[i] * s->x[i][p];
}

static void shared(space *s, const void *B, const void *C, strides sB, strides sC, num b, num t, num g, num count,
                   num x16) {
    rows(B, sB, b, t, g, count, N, NN, x16, s->B[0]), turn(s->B[0], NN, s->BT[0]);
    rows(C, sC, b, t, g, count, N, NN, x16, s->C[0]);
    product(s->C[0], NN, 1, s->BT[0], Q, s->CB[0], Q, Q, Q, N, 0);
}

static void scale(const float *factors, const float *x, num n, float *to) {  /* each row of (Q, n) by its factor */
    for (num i = 0; i < Q; i++)
        for (num j = 0; j < n; j++) to[i * n + j] = factors[i] * x[i * n + j];
}

/* an item: heads first to last of group g in sequence b */
#define ITEM(i) num b = i / parts / G, g = i / parts % G, each = (H / G + parts - 1) / parts, \
    first = g * (H / G) + i % parts * each, last = first + each < (g + 1) * (H / G) ? first + each : (g + 1) * (H / G)

/* final: the initial state before. states: one before each chunk, (batch, H, chunks) of them */
void forward(const void *x, const float *dt, const float *A, const void *B, const void *C, const float *D, void *y,
             float *states, float *final, const strides *st, num batch, num T, num H, num G, num parts, num x16) {
    num chunks = (T + Q - 1) / Q;
    #pragma omp parallel for schedule(static)
    for (num i = 0; i < batch * G * parts; i++) {
        ITEM(i);
        space *s = aligned_alloc(64, sizeof(space) + each * sizeof(state));
        state *S = (state *)(s + 1);
        memset(S, 0, each * sizeof(state));
        for (num h = first; h < last; h++)
            for (num p = 0; p < P; p++)
                for (num n = 0; n < N; n++) S[h - first][n][p] = final[((b * H + h) * P + p) * N + n];
        for (num k = 0; k < chunks; k++) {
            num t = k * Q, count = T - t < Q ? T - t : Q;
            shared(s, B, C, st[1], st[2], b, t, g, count, x16);
            for (num h = first; h < last; h++) {
                float *S_h = S[h - first][0];
                if (states) memcpy(states + ((b * H + h) * chunks + k) * NN * PP, S_h, sizeof(state));
                chunk(s, x, st[0], dt, A[h], b, t, h, T, H, count, x16);
                scale(s->e, s->C[0], NN, s->scaled[0]);
                product(s->scaled[0], NN, 1, S_h, PP, s->y[0], PP, Q, PP, N, 0);
                product(s->M[0], Q, 1, s->v[0], PP, s->y[0], PP, Q, PP, Q, 1);
                for (num j = 0; j < count; j++) {
                    if (D) for (num p = 0; p < P; p++) s->y[j][p] += D[h] * s->x[j][p];
                    put(s->y[j], P, x16, y, ((b * T + t + j) * H + h) * P);
                }
                scale(s->w, s->v[0], PP, s->v[0]);
                for (num j = 0; j < NN * PP; j++) S_h[j] *= s->e[Q - 1];
                product(s->B[0], 1, NN, s->v[0], PP, S_h, PP, NN, PP, Q, 1);
            }
        }
        for (num h = first; h < last; h++)
            for (num p = 0; p < P; p++)
                for (num n = 0; n < N; n++) final[((b * H + h) * P + p) * N + n] = S[h - first][n][p];
        free(s);
    }
}

/* g: dL/dfinal before, dL/dinitial after. dB, dC (parts, batch, T, G, N) fp32; dA, dD (batch, H) */
void backward(const void *x, const float *dt, const float *A, const void *B, const void *C, const float *D,
              const float *states, const void *dy, void *dx, float *ddt, double *dA, float *dB, float *dC, double *dD,
              float *g_state, const strides *st, num batch, num T, num H, num G, num parts, num x16) {
    num chunks = (T + Q - 1) / Q;
    strides sy = {T * H * P, H * P, P};
    #pragma omp parallel for schedule(static)
    for (num i = 0; i < batch * G * parts; i++) {
        ITEM(i);
        space *s = aligned_alloc(64, sizeof(space) + each * sizeof(state));
        state *R = (state *)(s + 1);
        memset(R, 0, each * sizeof(state));
        for (num h = first; h < last; h++) {
            dA[b * H + h] = dD[b * H + h] = 0;
            for (num p = 0; p < P; p++)
                for (num n = 0; n < N; n++) R[h - first][n][p] = g_state[((b * H + h) * P + p) * N + n];
        }
        for (num k = chunks - 1; k >= 0; k--) {
            num t = k * Q, count = T - t < Q ? T - t : Q;
            shared(s, B, C, st[1], st[2], b, t, g, count, x16);
            turn(s->C[0], NN, s->CT[0]);
            memset(s->dCB, 0, sizeof s->dCB);
            memset(s->dBT, 0, sizeof s->dBT);
            memset(s->dCT, 0, sizeof s->dCT);
            for (num h = first; h < last; h++) {
                const float *S = states + ((b * H + h) * chunks + k) * NN * PP;
                float *R_h = R[h - first][0], e_Q;
                double carry = 0, after = 0, before = 0;
                chunk(s, x, st[0], dt, A[h], b, t, h, T, H, count, x16);
                e_Q = s->e[Q - 1];
                rows(dy, sy, b, t, h, count, P, PP, x16, s->o[0]);
                turn(s->v[0], PP, s->vT[0]), turn(s->o[0], PP, s->oT[0]);
                /* inside the chunk */
                product(s->o[0], PP, 1, s->vT[0], Q, s->dM[0], Q, Q, Q, P, 0);
                product(s->M[0], 1, Q, s->o[0], PP, s->dv[0], PP, Q, PP, Q, 0);
                memset(s->dc, 0, sizeof s->dc);
                for (num r = 0; r < Q; r++) {
                    double sum = 0;
                    #pragma omp simd reduction(+:sum)
                    for (int j = 0; j < Q; j++) {
                        float X = s->L[r][j] * s->dM[r][j], W_rj = j < r ? s->M[r][j] * s->dM[r][j] : 0;
                        s->dCB[r][j] += X;
                        s->dc[j] -= W_rj;
                        sum += W_rj;
                    }
                    s->dc[r] += sum;
                }
                /* y_i = e_i S C_i */
                for (num p = 0; p < PP; p++)
                    for (num j = 0; j < Q; j++) s->oT[p][j] *= s->e[j];
                product(S, PP, 1, s->oT[0], Q, s->part[0], Q, NN, Q, P, 0);
                for (num n = 0; n < NN; n++)
                    for (num j = 0; j < Q; j++) {
                        s->dCT[n][j] += s->part[n][j];
                        s->dc[j] += s->CT[n][j] * s->part[n][j];
                    }
                /* S' = e_Q S + sum_j w_j v_j B_j^T */
                product(s->B[0], NN, 1, R_h, PP, s->r[0], PP, Q, PP, N, 0);
                for (num j = 0; j < Q; j++) {
                    double sum = 0;
                    #pragma omp simd reduction(+:sum)
                    for (num p = 0; p < PP; p++) {
                        float d = s->w[j] * s->r[j][p];
                        sum += d * s->v[j][p];
                        s->dv[j][p] += d;
                    }
                    s->ds[j] = sum;
                }
                for (num p = 0; p < PP; p++)
                    for (num j = 0; j < Q; j++) s->vT[p][j] *= s->w[j];
                product(R_h, PP, 1, s->vT[0], Q, s->dBT[0], Q, NN, Q, P, 1);
                #pragma omp simd reduction(+:carry)
                for (num j = 0; j < NN * PP; j++) carry += R_h[j] * S[j];
                for (num j = 0; j < NN * PP; j++) R_h[j] *= e_Q;
                scale(s->e, s->o[0], PP, s->y[0]);
                product(s->C[0], 1, NN, s->y[0], PP, R_h, PP, NN, PP, Q, 1);
                /* dt_t A counts in c_i of all i >= t */
                for (num j = 0; j < Q; j++) after += s->dc[j];
                for (num j = 0; j < count; j++) {
                    float dla = after + before + carry * e_Q, sum = 0, o_x = 0;
                    after -= s->dc[j], before += s->ds[j];
                    for (num p = 0; p < P; p++) sum += s->dv[j][p] * s->x[j][p], o_x += s->o[j][p] * s->x[j][p];
                    ddt[(b * T + t + j) * H + h] = sum + dla * A[h];
                    dA[b * H + h] += dla * s->dt[j], dD[b * H + h] += o_x;
                    for (num p = 0; p < P; p++)
                        s->dv[j][p] = s->dv[j][p] * s->dt[j] + (D ? D[h] * s->o[j][p] : 0);
                    put(s->dv[j], P, x16, dx, ((b * T + t + j) * H + h) * P);
                }
            }
            product(s->dCB[0], Q, 1, s->B[0], NN, s->dC[0], NN, Q, NN, Q, 0);
            product(s->dCB[0], 1, Q, s->C[0], NN, s->dB[0], NN, Q, NN, Q, 0);
            for (num j = 0; j < count; j++) {
                num at = (((i % parts * batch + b) * T + t + j) * G + g) * N;
                for (num n = 0; n < N; n++) {
                    dB[at + n] = s->dB[j][n] + s->dBT[n][j];
                    dC[at + n] = s->dC[j][n] + s->dCT[n][j];
                }
            }
        }
        for (num h = first; h < last; h++)
            for (num p = 0; p < P; p++)
                for (num n = 0; n < N; n++) g_state[((b * H + h) * P + p) * N + n] = R[h - first][n][p];
        free(s);
    }
}
"""


@functools.cache
def library(N, P):
    return compiled(f"enum {{ N = {N}, P = {P} }};" + GEMM + SOURCE)


class CompiledSSD(torch.autograd.Function):
    """Kept: the inputs, and the state before each chunk."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial):
        (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
        x, B, C = (t if t.stride(3) == 1 else t.contiguous() for t in (x, B, C))
        dt, A, D = (None if t is None else t.float().contiguous() for t in (dt, A, D))
        S = dt.new_zeros(batch, H, P, N) if initial is None else initial.to(torch.float32, copy=True).contiguous()
        parts = min(H // G, -(-torch.get_num_threads() // (batch * G)))
        parts = -(-(H // G) // -(-(H // G) // parts))  # none of them without a head
        ctx.how = batch, T, H, G, parts, int(x.dtype == torch.bfloat16)
        y, states = torch.empty(x.shape, dtype=x.dtype), None
        if any(ctx.needs_input_grad):
            states = dt.new_empty(batch * H, -(-T // CHUNK), -(-N // 16) * 16, -(-P // 16) * 16)
        call(library(N, P).forward, x, dt, A, B, C, D, y, states, S, CompiledSSD.strides(x, B, C), *ctx.how)
        ctx.save_for_backward(x, dt, A, B, C, D, states)
        ctx.initial = initial is not None
        ctx.set_materialize_grads(False)  # an unused final brings no gradient
        return y, S

    @staticmethod
    def strides(*tensors):
        return torch.tensor([t.stride()[:3] for t in tensors])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal):
        x, dt, A, B, C, D, states = ctx.saved_tensors
        (batch, _, H, P), N, parts = x.shape, B.shape[3], ctx.how[4]
        R = dt.new_zeros(batch, H, P, N) if dfinal is None else dfinal.to(torch.float32, copy=True).contiguous()
        dy = x.new_zeros(x.shape) if dy is None else dy.contiguous()
        dx, ddt = torch.empty(x.shape, dtype=x.dtype), torch.empty_like(dt)
        dA, dD = dt.new_empty(2, batch, H, dtype=torch.float64)
        dB, dC = dt.new_empty(2, parts, *B.shape)
        call(library(N, P).backward, x, dt, A, B, C, D, states, dy, dx, ddt, dA, dB, dC, dD, R,
             CompiledSSD.strides(x, B, C), *ctx.how)
        dB, dC = (d.sum(0).to(B.dtype) for d in (dB, dC))
        dA, dD = (d.sum(0).float() for d in (dA, dD))
        return dx, ddt, dA, dB, dC, None if D is None else dD, R if ctx.initial else None


def ssd_torch(x, dt, A, B, C, D, initial):
    compiles = x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and not torch.compiler.is_compiling()
    if compiles and library(B.shape[3], x.shape[3]):
        return CompiledSSD.apply(x, dt, A, B, C, D, initial)
    return SSD.apply(x, dt, A, B, C, D, initial)


if triton is not None:
    # A program owns a block of BP columns of a head's x and S. The N states are G slices of BN, a leading dimension of
    # B, C and S [G, BN, BP]: products are batches of G, so a warp holds its own slice of each operand; with one large
    # product it would hold nearly all of S as an operand, and spill. Of backward's sums over P each block has a share.

    @triton.jit
    def steps(dt, A, start, T, s_t, BT: tl.constexpr):
        """A chunk's dt, c_i, e_i, w_i [BT], e_Q, and L [BT, BT]. Past the end dt = 0: nothing decays or is written."""
        i = tl.arange(0, BT)
        b_dt = tl.load(dt + (start + i).to(tl.int64) * s_t, mask=start + i < T, other=0.0).to(tl.float32)
        b_c = tl.cumsum(b_dt * A, 0)
        last = tl.sum(b_dt * A, 0)
        b_L = tl.where(i[:, None] >= i[None, :], tl.exp(tl.minimum(b_c[:, None] - b_c[None, :], 0.0)), 0.0)
        return b_dt, tl.exp(b_c), tl.exp(tl.minimum(last - b_c, 0.0)), tl.exp(last), b_L

    @triton.jit
    def rows(x, start, T, s_t, o_p, P, BT: tl.constexpr):
        """[BT, BP] of x (T, P)"""
        o_t = start + tl.arange(0, BT)[:, None]
        return tl.load(x + o_t.to(tl.int64) * s_t + o_p, mask=(o_t < T) & (o_p < P), other=0.0)

    @triton.jit
    def slices(x, start, T, s_t, o_n, N, BT: tl.constexpr):
        """[G, BT, BN] of x (T, N)"""
        o_t = start + tl.arange(0, BT)[None, :, None]
        return tl.load(x + o_t.to(tl.int64) * s_t + o_n, mask=(o_t < T) & (o_n < N), other=0.0)

    @triton.jit
    def batch_dot(a, b, G: tl.constexpr):
        """a (., .) times each of b [G, ., .]"""
        return tl.dot(tl.broadcast_to(a[None], (G, a.shape[0], a.shape[1])), b, input_precision="ieee")

    @triton.jit
    def update(b_s, whole, b_k, b_x, G: tl.constexpr, TWICE: tl.constexpr):
        """whole S + sum_j k_j x_j: b_s [G, BN, BP], b_k [G, BT, BN], b_x [BT, BP] fp32 rounded; TWICE: its loss too."""
        b_k = tl.permute(b_k, (0, 2, 1))
        b_x = tl.broadcast_to(b_x[None], (G, b_x.shape[0], b_x.shape[1]))
        high = b_x.to(b_k.dtype)
        b_s = tl.dot(b_k, high, b_s * whole, input_precision="ieee")
        return tl.dot(b_k, (b_x - high.to(tl.float32)).to(b_k.dtype), b_s, input_precision="ieee") if TWICE else b_s

    @triton.jit
    def ssd_fwd_kernel(x, dt, A, B, C, D, initial, y, final, sx, sdt, sB, sC, T, H, BLOCKS, HEADS, P, N: tl.constexpr,
                       G: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr):
        """Strides (batch, time, head or group); HEADS: a group's. y contiguous, states (P, N) of each (batch, head)."""
        i_b, i_s = (tl.program_id(0) // (H * BLOCKS)).to(tl.int64), tl.program_id(0) % (H * BLOCKS)
        i_h, first = i_s // BLOCKS, i_s % BLOCKS * BP
        x += i_b * sx[0] + i_h * sx[2]
        dt += i_b * sdt[0] + i_h * sdt[2]
        B += i_b * sB[0] + i_h // HEADS * sB[2]
        C += i_b * sC[0] + i_h // HEADS * sC[2]
        y += (i_b * T * H + i_h) * P
        o_g, o_p = tl.arange(0, G)[:, None, None] * BN, first + tl.arange(0, BP)[None, :]
        o_n, o_k = o_g + tl.arange(0, BN)[None, None, :], o_g + tl.arange(0, BN)[None, :, None]  # [G, 1, BN] [G, BN, 1]
        o_s, m_s = (i_b * H + i_h) * P * N + o_p[None] * N + o_k, (o_k < N) & (o_p < P)[None]
        b_A = tl.load(A + i_h).to(tl.float32)
        b_D = 0.0 if D is None else tl.load(D + i_h).to(tl.float32)
        b_s = tl.zeros([G, BN, BP], tl.float32)
        if initial is not None:
            b_s = tl.load(initial + o_s, mask=m_s, other=0.0).to(tl.float32)
        for start in range(0, T, BT):
            b_dt, b_e, b_w, whole, b_L = steps(dt, b_A, start, T, sdt[1], BT)
            b_x = rows(x, start, T, sx[1], o_p, P, BT)
            b_B, b_C = slices(B, start, T, sB[1], o_n, N, BT), slices(C, start, T, sC[1], o_n, N, BT)
            b_M = tl.sum(tl.dot(b_C, tl.permute(b_B, (0, 2, 1)), input_precision="ieee"), 0) * b_L * b_dt[None, :]
            b_y = tl.sum(tl.dot(b_C, b_s.to(b_x.dtype), input_precision="ieee"), 0) * b_e[:, None]  # [BT, BP]
            b_y = tl.dot(b_M.to(b_x.dtype), b_x, b_y + b_D * b_x.to(tl.float32), input_precision="ieee")  # b_M [BT, BT]
            o_t = start + tl.arange(0, BT)[:, None]
            tl.store(y + o_t.to(tl.int64) * H * P + o_p, b_y, mask=(o_t < T) & (o_p < P))
            b_s = update(b_s, whole, b_B, b_x.to(tl.float32) * (b_dt * b_w)[:, None], G, False)
        tl.store(final + o_s, b_s, mask=m_s)

    @triton.jit
    def ssd_bwd_c_kernel(dy, dfinal, x, dt, A, B, C, initial, dC, off, phi, sdy, sx, sdt, sB, sC, T, H, BLOCKS, HEADS,
                         P, N: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr):
        """From the first chunk to the last: dC (B, T, H, BLOCKS, N), off_i = e_i o_i . S C_i (B, T, H, BLOCKS) and,
        (B, H, BLOCKS), phi = dfinal . final: of each block its share."""
        i_b, i_s = (tl.program_id(0) // (H * BLOCKS)).to(tl.int64), tl.program_id(0) % (H * BLOCKS)
        i_h, first = i_s // BLOCKS, i_s % BLOCKS * BP
        TWICE: tl.constexpr = x.dtype.element_ty != tl.float32
        dy += i_b * sdy[0] + i_h * sdy[2]
        x += i_b * sx[0] + i_h * sx[2]
        dt += i_b * sdt[0] + i_h * sdt[2]
        B += i_b * sB[0] + i_h // HEADS * sB[2]
        C += i_b * sC[0] + i_h // HEADS * sC[2]
        o_g, o_p = tl.arange(0, G)[:, None, None] * BN, first + tl.arange(0, BP)[None, :]
        o_n, o_k = o_g + tl.arange(0, BN)[None, None, :], o_g + tl.arange(0, BN)[None, :, None]
        o_s, m_s = (i_b * H + i_h) * P * N + o_p[None] * N + o_k, (o_k < N) & (o_p < P)[None]
        b_A = tl.load(A + i_h).to(tl.float32)
        b_s = tl.zeros([G, BN, BP], tl.float32)
        if initial is not None:
            b_s = tl.load(initial + o_s, mask=m_s, other=0.0).to(tl.float32)
        for start in range(0, T, BT):
            b_dt, b_e, b_w, whole, b_L = steps(dt, b_A, start, T, sdt[1], BT)
            b_x, b_o = rows(x, start, T, sx[1], o_p, P, BT), rows(dy, start, T, sdy[1], o_p, P, BT)
            b_B, b_C = slices(B, start, T, sB[1], o_n, N, BT), slices(C, start, T, sC[1], o_n, N, BT)
            b_X = tl.dot(b_o, tl.trans(b_x), input_precision="ieee") * b_dt[None, :] * b_L  # [BT, BT]
            high = b_s.to(b_x.dtype)
            b_dC = batch_dot(b_o, tl.permute(high, (0, 2, 1)), G)  # [G, BT, BN]
            if TWICE:
                b_dC += batch_dot(b_o, tl.permute((b_s - high.to(tl.float32)).to(b_x.dtype), (0, 2, 1)), G)
            b_dC *= b_e[None, :, None]
            b_off = tl.sum(tl.sum(b_dC * b_C.to(tl.float32), 2), 0)  # [BT]
            b_dC += batch_dot(b_X.to(b_x.dtype), b_B, G)
            i = start + tl.arange(0, BT)
            o_t = ((i_b * T + i) * H * BLOCKS + i_s).to(tl.int64)
            tl.store(off + o_t, b_off, mask=i < T)
            tl.store(dC + o_t[None, :, None] * N + o_n, b_dC, mask=(i < T)[None, :, None] & (o_n < N))
            b_s = update(b_s, whole, b_B, b_x.to(tl.float32) * (b_dt * b_w)[:, None], G, TWICE)
        if dfinal is not None:
            b_R = tl.load(dfinal + o_s, mask=m_s, other=0.0).to(tl.float32)
            tl.store(phi + i_b * H * BLOCKS + i_s, tl.sum(tl.sum(tl.sum(b_R * b_s, 2), 1), 0))

    @triton.jit
    def ssd_bwd_x_kernel(dy, dfinal, x, dt, A, B, C, D, dx, dB, dc, xdv, xo, dinitial, sdy, sx, sdt, sB, sC,
                         T, H, BLOCKS, HEADS, P, N: tl.constexpr, G: tl.constexpr, BN: tl.constexpr,
                         BT: tl.constexpr, BP: tl.constexpr):
        """From last chunk to first: dx, dB (B, T, H, BLOCKS, N); (B, T, H, BLOCKS): dL/dc less off, x . dv, x . o."""
        i_b, i_s = (tl.program_id(0) // (H * BLOCKS)).to(tl.int64), tl.program_id(0) % (H * BLOCKS)
        i_h, first = i_s // BLOCKS, i_s % BLOCKS * BP
        TWICE: tl.constexpr = x.dtype.element_ty != tl.float32
        dy += i_b * sdy[0] + i_h * sdy[2]
        x += i_b * sx[0] + i_h * sx[2]
        dt += i_b * sdt[0] + i_h * sdt[2]
        B += i_b * sB[0] + i_h // HEADS * sB[2]
        C += i_b * sC[0] + i_h // HEADS * sC[2]
        o_g, o_p = tl.arange(0, G)[:, None, None] * BN, first + tl.arange(0, BP)[None, :]
        o_n, o_k = o_g + tl.arange(0, BN)[None, None, :], o_g + tl.arange(0, BN)[None, :, None]
        o_s, m_s = (i_b * H + i_h) * P * N + o_p[None] * N + o_k, (o_k < N) & (o_p < P)[None]
        b_A = tl.load(A + i_h).to(tl.float32)
        b_D = 0.0 if D is None else tl.load(D + i_h).to(tl.float32)
        b_R = tl.zeros([G, BN, BP], tl.float32)
        if dfinal is not None:
            b_R = tl.load(dfinal + o_s, mask=m_s, other=0.0).to(tl.float32)
        diagonal = tl.arange(0, BT)[:, None] == tl.arange(0, BT)[None, :]
        for n in range(tl.cdiv(T, BT) - 1, -1, -1):
            start = n * BT
            b_dt, b_e, b_w, whole, b_L = steps(dt, b_A, start, T, sdt[1], BT)
            b_x, b_o = rows(x, start, T, sx[1], o_p, P, BT), rows(dy, start, T, sdy[1], o_p, P, BT)
            b_B, b_C = slices(B, start, T, sB[1], o_n, N, BT), slices(C, start, T, sC[1], o_n, N, BT)
            b_v = b_x.to(tl.float32) * b_dt[:, None]
            b_M = tl.sum(tl.dot(b_C, tl.permute(b_B, (0, 2, 1)), input_precision="ieee"), 0) * b_L  # [BT, BT]
            b_X = tl.dot(b_o, tl.trans(b_x), input_precision="ieee") * b_dt[None, :]
            b_W = tl.where(diagonal, 0.0, b_M * b_X)
            b_X *= b_L
            high = b_R.to(b_x.dtype)
            b_dvs = tl.dot(b_B, high, input_precision="ieee")  # [G, BT, BP]
            if TWICE:
                b_dvs = tl.dot(b_B, (b_R - high.to(tl.float32)).to(b_x.dtype), b_dvs, input_precision="ieee")
            b_dvs = tl.sum(b_dvs, 0) * b_w[:, None]  # w R B [BT, BP]
            b_dc = tl.sum(b_W, 1) - tl.sum(b_W, 0) - tl.sum(b_v * b_dvs, 1)
            b_dv = tl.dot(tl.trans(b_M.to(b_x.dtype)), b_o, b_dvs, input_precision="ieee")
            b_dB = batch_dot(b_x, tl.permute(high, (0, 2, 1)), G) * (b_dt * b_w)[None, :, None]  # [G, BT, BN]
            b_dB += batch_dot(tl.trans(b_X.to(b_x.dtype)), b_C, G)
            i = start + tl.arange(0, BT)
            o_t = ((i_b * T + i) * H * BLOCKS + i_s).to(tl.int64)
            o_x = ((i_b * T + i) * H + i_h).to(tl.int64)[:, None] * P + o_p
            wide_o, wide_x = b_o.to(tl.float32), b_x.to(tl.float32)
            tl.store(dc + o_t, b_dc, mask=i < T)
            tl.store(xdv + o_t, tl.sum(b_dv * wide_x, 1), mask=i < T)
            tl.store(xo + o_t, tl.sum(wide_o * wide_x, 1), mask=i < T)
            tl.store(dx + o_x, b_dv * b_dt[:, None] + b_D * wide_o, mask=(i < T)[:, None] & (o_p < P))
            tl.store(dB + o_t[None, :, None] * N + o_n, b_dB, mask=(i < T)[None, :, None] & (o_n < N))
            b_R = update(b_R, whole, b_C, wide_o * b_e[:, None], G, TWICE)
        if dinitial is not None:
            tl.store(dinitial + o_s, b_R, mask=m_s)

    def config(x, N, BT):
        """Slices of 32 states; no spills on sm_89 at P = 64, N = 64 and 128. fp32 is "ieee", plain FMAs."""
        G, half = max(2, triton.next_power_of_2(N) // 32), x.element_size() < 4
        return dict(N=N, G=G, BN=32, BP=32 if half else 16, BT=BT if half else 16, num_warps=8, num_stages=1)

    def sizes(x, dt, B, C, BP):
        """Strides and sizes as all three kernels take them, and the number of programs."""
        (batch, T, H, P), blocks = x.shape, triton.cdiv(x.shape[3], BP)
        return ((x.stride()[:3], dt.stride(), B.stride()[:3], C.stride()[:3], T, H, blocks, H // B.shape[2], P),
                (batch * H * blocks,))

    def dense(*tensors):
        return [t if t.stride(3) == 1 else t.contiguous() for t in tensors]

    BT_FWD, BT_BWD = 32, 16  # tokens a chunk in 16 bits; fp32: 16; both backward kernels the same: off belongs to dc

    @custom_op("kernels::ssd", mutates_args=())
    def ssd_op(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
               D: torch.Tensor | None, initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """-> y, final."""
        N = B.shape[3]
        x, B, C = dense(x, B, C)
        y, final = x.new_empty(x.shape), x.new_empty(x.shape[0], *x.shape[2:], N, dtype=torch.float32)
        how = config(x, N, BT_FWD)
        shape, grid = sizes(x, dt, B, C, how["BP"])
        ssd_fwd_kernel[grid](x, dt, A, B, C, D, None if initial is None else initial.contiguous(),
                             y, final, *shape, **how)
        return y, final

    @ssd_op.register_fake
    def _(x, dt, A, B, C, D, initial):
        return x.new_empty(x.shape), x.new_empty(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float32)

    @custom_op("kernels::ssd_bwd", mutates_args=())
    def ssd_bwd_op(dy: torch.Tensor, dfinal: torch.Tensor | None, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor,
                   B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None, initial: torch.Tensor | None
                   ) -> list[torch.Tensor]:
        """-> dx, ddt, dA (H,) fp32, dB, dC, dD (H,) fp32, dinitial (empty without initial)."""
        (batch, T, H, _), (groups, N) = x.shape, B.shape[2:]
        dy, x, B, C = dense(dy, x, B, C)
        initial, dfinal = (None if t is None else t.contiguous() for t in (initial, dfinal))
        forth, back = config(x, N, BT_BWD), config(x, N, BT_BWD)
        shape, grid = sizes(x, dt, B, C, forth["BP"])
        blocks = shape[6]
        dB, dC = x.new_empty(2, batch, T, H * blocks, N).unbind()
        dc, off, xdv, xo = x.new_empty(4, batch, T, H, blocks, dtype=torch.float32).unbind()
        phi = None if dfinal is None else x.new_empty(batch, H, blocks, dtype=torch.float32)
        dx, dinitial = x.new_empty(x.shape), x.new_empty(0 if initial is None else initial.shape, dtype=torch.float32)
        ssd_bwd_c_kernel[grid](dy, dfinal, x, dt, A, B, C, initial, dC, off, phi, dy.stride()[:3], *shape, **forth)
        ssd_bwd_x_kernel[grid](dy, dfinal, x, dt, A, B, C, D, dx, dB, dc, xdv, xo,
                               None if initial is None else dinitial, dy.stride()[:3], *shape, **back)
        dla = dc.add_(off).sum(3).flip(1).cumsum(1).flip(1)  # (B, T, H)
        if phi is not None:
            dla += phi.sum(2)[:, None]
        by_group = lambda t: t.view(batch, T, groups, -1, N).sum(3)  # sums are fp32 inside
        return [dx, (dla * A + xdv.sum(3)).to(dt.dtype), (dla * dt).sum((0, 1)), by_group(dB), by_group(dC),
                xo.sum((0, 1, 3)), dinitial]

    @ssd_bwd_op.register_fake
    def _(dy, dfinal, x, dt, A, B, C, D, initial):
        head = lambda: A.new_empty(A.shape, dtype=torch.float32)
        return [x.new_empty(x.shape), dt.new_empty(dt.shape), head(), B.new_empty(B.shape), C.new_empty(C.shape),
                head(), x.new_empty(0 if initial is None else initial.shape, dtype=torch.float32)]

    def save_for_backward(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)  # an unused final brings no gradient: not a tensor of zeros to read

    def ssd_backward(ctx, dy, dfinal):
        x, dt, A, B, C, D, initial = saved = ctx.saved_tensors  # once: checkpointing recomputes them here
        dx, ddt, dA, dB, dC, dD, dinitial = ssd_bwd_op(torch.zeros_like(x) if dy is None else dy, dfinal, *saved)
        return (dx, ddt, dA.to(A.dtype), dB, dC, None if D is None else dD.to(D.dtype),
                None if initial is None else dinitial.to(initial.dtype))

    ssd_op.register_autograd(ssd_backward, setup_context=save_for_backward)

    def ssd_triton(x, dt, A, B, C, D, initial):
        if not x.dtype == B.dtype == C.dtype or x.dtype == torch.float64 or B.shape[3] > 256:
            raise ValueError(f"ssd: x {x.dtype}, B {B.dtype}, C {C.dtype}, N {B.shape[3]}; expected one dtype of "
                             "float32, bfloat16, float16, and N <= 256")
        return ssd_op(x, dt, A, B, C, D, initial)


def ssd(x, dt, A, B, C, D=None, initial=None):
    """x (B, T, H, P), dt (B, T, H), A and D (H,), B and C (B, T, G, N), initial (B, H, P, N): the state before the
    first token, or zeros -> y (B, T, H, P) in x's dtype, final (B, H, P, N) in fp32. ValueError: shapes that do not
    fit; on a GPU N > 256."""
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    want = [(batch, T, H, P), (batch, T, H), (H,), (batch, T, G, N), (batch, T, G, N), (H,), (batch, H, P, N)]
    found = [None if t is None else tuple(t.shape) for t in (x, dt, A, B, C, D, initial)]
    if H % G or any(f not in (None, w) for f, w in zip(found, want)):
        raise ValueError(f"ssd: shapes {found}; expected x (B, T, H, P), dt (B, T, H), A (H,), B, C (B, T, G, N), "
                         "D (H,), initial (B, H, P, N), H divisible by G")
    which = form(x)
    op = ssd_triton if which == "triton" else ssd_ref if which == "ref" else ssd_torch
    return op(x, dt, A, B, C, D, initial)
