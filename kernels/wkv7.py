"""
WKV-7: RWKV-7's recurrence, a generalised delta rule, chunk by chunk with matrix products
    Peng et al. 2025, arXiv:2503.14456v2, section 4;  the chunks as in Yang et al. 2024, arXiv:2406.06484v6, section 3

    S_t = S_{t-1} diag(e^{w_t}) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t    rows of S are values, columns keys
    (RWKV-7: a = -kappa, b = its rate times kappa, w in (-0.6065, 0))

In a chunk of L tokens after the state S, with c_t = w_1 + ... + w_t and m = c_L / 2 for each channel, rows are tokens:
    q = [a_t e^{c_{t-1} - m}; r_t e^{c_t - m}] (2L, N), p = [k_t e^{m - c_t}; b_t e^{m - c_t}] (2L, N), S' = S diag(e^m)
    A = q p^T where the token of p comes before that of q (r: or is the same), else 0;   A_ab its quarter of a and b
    [z; y] = q S'^T + A [v; u],  u = z = S_{t-1} a_t per token, a triangular system:  u = (1 - A_ab)^{-1} (z without u)
    S_L = (S' + [v; u]^T p) diag(e^m)
backward, with R = dL/dS_L, R' = R diag(e^m), D = [dz; dy], where dz = (1 - A_ab)^{-T} (A_rb^T dy + p_b R'^T):
    dA = D [v; u]^T where A is not 0,   dq = D S' + dA p,   dp = dA^T q + [v; u] R',   dv = A_.k^T D + p_k R'^T
    dL/dS = (R' + D^T q) diag(e^m);     dr da dk db are dq and dp times the exponentials above
    dw_t = sum_rows S_L R + sum_{s >= t} (r_s dr_s - k_s dk_s - b_s db_s) + sum_{s > t} a_s da_s      (s in the chunk)

The exponents are between -c and c with c = 0.61 L / 2 at RWKV-7's smallest decay: e^4.9 for the 16 tokens of the
kernels, e^9.8 for the 32 of the plain form, whatever follows, so nothing leaves the range of any dtype, and decays of 1
lose nothing. For other uses w has to be above -80 / L. The inverse is built from blocks of 1, 2, 4, ... tokens, each
step a product of true inverses: unlike a sum of powers of A_ab it does not cancel when one key comes again and again.

Shapes: r, w, k, v, a, b (B, T, H, N) of one dtype, fp32, bf16 or fp16 (the definition and the plain form: fp64 too),
N <= 64 in the kernels; initial (B, H, N, N) or None -> y (B, T, H, N) in r's dtype, final (B, H, N, N) fp32. Sums and
the state are fp32. Saved for backward: the inputs and the state before each chunk (kernels: rounded to the inputs'
dtype, as the products have it). A, its inverse and u are made again.
Bytes, in bf16 at N = 64 and a token and head: 6 inputs and y are 896, which is the floor, the saved states 512: 1.6
times the floor forward; backward 13 tensors, 1664, and the states again: 1.3 times.
In bf16 at N = 64 nothing spills on sm_89. Open: in fp32 there are 250 spill instructions forward, 260 backward, and
backward 6 in bf16 where N is padded (40).
FLOPs: 8 N^2 + 20 L N a token and head forward, 2.5 times that backward; token by token 9 N^2, but no matrix products.

CPU: token by token as a loop in C, whose state stays in the cache (CompiledWKV7), a third of the chunks' time; without
a compiler, in fp64, and under torch.compile, the chunks in PyTorch's products (WKV7).
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


def wkv7_ref(r, w, k, v, a, b, initial=None):
    """The definition, one token after the other; fp32 inside, fp64 for fp64."""
    dtype = torch.promote_types(r.dtype, torch.float32)
    B, _, H, N = r.shape
    S = torch.zeros(B, H, N, N, dtype=dtype, device=r.device) if initial is None else initial.to(dtype)
    y = []
    for r_t, w_t, k_t, v_t, a_t, b_t in zip(*(x.to(dtype).unbind(1) for x in (r, w, k, v, a, b))):  # each (B, H, N)
        u = S @ a_t[..., None]  # (B, H, N, 1)
        S = S * w_t.exp()[:, :, None] + u * b_t[:, :, None] + v_t[..., None] * k_t[:, :, None]
        y.append((S @ r_t[..., None])[..., 0])
    return torch.stack(y, 1).to(r.dtype), S


CHUNK = 32  # tokens of a chunk in the plain form
TILES = 64  # (batch, head, chunk) computed at once: few enough for a core's cache, enough for two cores to share


def groups(B, T, H):
    """How T is cut: (first token, number of chunks, tokens of a chunk) for each group that is computed at once."""
    n, full = max(1, TILES // (B * H)), T // CHUNK
    parts = [(i * CHUNK, min(n, full - i), CHUNK) for i in range(0, full, n)]
    return parts + [(full * CHUNK, 1, T % CHUNK)] if T % CHUNK else parts


def tiles(x, t, n, L):
    """n chunks of L tokens of x (B, T, H, N) as a view (n, B, H, L, N)."""
    return x[:, t : t + n * L].unflatten(1, (n, L)).permute(1, 0, 3, 2, 4)


def inverse(A):
    """(1 - A)^{-1} of A (..., L, L), strictly lower triangular."""
    one = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    return torch.linalg.solve_triangular(-A, one, upper=False, unitriangular=True)


def prepare(r, w, k, a, b):
    """Tiles (n, B, H, L, N) -> q, p (n, BH, 2L, N), A (n, BH, 2L, 2L) and (1 - A_ab)^{-1} (n, BH, L, L);
    e^m (n, BH, 1, N); factors e^{c_{t-1} - m} of a, e^{c_t - m} of r, e^{m - c_t} of k and b (n, B, H, L, N)."""
    n, B, H, L, N = r.shape
    c = w.cumsum(3)
    m = c[..., -1:, :] / 2
    up = (c - m).exp_()
    before, down = torch.cat([(-m).exp(), up[..., :-1, :]], 3), up.reciprocal()
    q, p = (c.new_empty(n, B, H, 2, L, N) for _ in "qp")
    for x, factor, out in ((a, before, q[..., 0, :, :]), (r, up, q[..., 1, :, :]),
                           (k, down, p[..., 0, :, :]), (b, down, p[..., 1, :, :])):
        out.copy_(x * factor)  # out= with a view would end torch.compile's graph, here and below
    q, p = (x.view(n, B * H, 2 * L, N) for x in (q, p))
    A = (q @ p.mT).mul_(past(L, q))
    return q, p, A, inverse(A[..., :L, L:]), m.exp().view(n, B * H, 1, N), before, up, down


def past(L, like):
    """(2L, 2L): 1 where a token of p, k and then b, comes before one of q, a and then r; r sees its own token too."""
    one = torch.ones(L, L, dtype=like.dtype, device=like.device)
    return torch.cat([one.tril(-1).repeat(1, 2), one.tril().repeat(1, 2)])


class WKV7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, w, k, v, a, b, initial):
        B, T, H, N = r.shape
        wide = torch.promote_types(r.dtype, torch.float32)
        S = (torch.zeros(B * H, N, N, dtype=wide, device=r.device) if initial is None else
             initial.to(wide).view(B * H, N, N))
        cuts, y, starts = groups(B, T, H), torch.empty_like(r, memory_format=torch.contiguous_format), []
        with torch.autocast(r.device.type, enabled=False):
            for t, n, L in cuts:
                r_, w_, k_, v_, a_, b_ = (tiles(x, t, n, L).to(wide) for x in (r, w, k, v, a, b))
                q, p, A, M, half, *_ = prepare(r_, w_, k_, a_, b_)
                vu, start = q.new_empty(q.shape), S.new_empty(n, *S.shape)
                vu[:, :, :L].view(v_.shape).copy_(v_)
                zy = A[..., :L] @ vu[:, :, :L]  # (n, BH, 2L, N): z and y, so far of v alone
                for i in range(n):
                    start[i] = S
                    S = S * half[i]
                    zy[i].baddbmm_(q[i], S.mT)
                    vu[i, :, L:] = M[i] @ zy[i, :, :L]
                    S = S.baddbmm_(vu[i].mT, p[i]).mul_(half[i])
                y_ = zy[:, :, L:] + A[:, :, L:, L:] @ vu[:, :, L:]
                tiles(y, t, n, L).copy_(y_.view(r_.shape))
                starts.append(start)
        ctx.save_for_backward(r, w, k, v, a, b, *starts)
        ctx.has_initial = initial is not None
        ctx.set_materialize_grads(False)  # an unused final state brings no gradient
        return y, S.view(B, H, N, N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal):
        r, w, k, v, a, b, *starts = ctx.saved_tensors
        (B, T, H, N), wide = r.shape, starts[0].dtype
        dr, dw, dk, dv, da, db = grads = [torch.empty_like(x, memory_format=torch.contiguous_format)
                                          for x in (r, w, k, v, a, b)]
        dS = starts[0].new_zeros(B * H, N, N) if dfinal is None else dfinal.reshape(B * H, N, N)
        with torch.autocast(r.device.type, enabled=False):
            for (t, n, L), start in reversed([*zip(groups(B, T, H), starts)]):
                r_, w_, k_, v_, a_, b_ = (tiles(x, t, n, L).to(wide) for x in (r, w, k, v, a, b))
                q, p, A, M, half, before, up, down = prepare(r_, w_, k_, a_, b_)
                vu, D, dstart = q.new_empty(q.shape), q.new_empty(q.shape), torch.empty_like(start)
                S = start * half
                vu[:, :, :L].view(v_.shape).copy_(v_)
                vu[:, :, L:] = M @ (q[:, :, :L] @ S.mT + A[:, :, :L, :L] @ vu[:, :, :L])
                if dy is None:
                    D.zero_()
                else:
                    D[:, :, L:].view(r_.shape).copy_(tiles(dy, t, n, L))
                du = A[:, :, L:, L:].mT @ D[:, :, L:]  # (n, BH, L, N): so far of dy alone
                for i in reversed(range(n)):
                    torch.mul(dS, half[i], out=dstart[i])
                    du[i].baddbmm_(p[i, :, L:], dstart[i].mT)
                    D[i, :, :L] = M[i].mT @ du[i]
                    dS = torch.baddbmm(dstart[i], D[i].mT, q[i]).mul_(half[i])
                dA = (D @ vu.mT).mul_(past(L, D))
                dq = (D @ S).add_(dA @ p)
                dp = vu @ dstart  # (n, BH, 2L, N): what reaches the chunk's end
                end = (S.mul_(dstart).sum(2) + (dp * p).sum(2)).view(n, B, H, 1, N)  # sum_rows S_L R
                dp += dA.mT @ q
                dv_ = A[..., :L].mT @ D + p[:, :, :L] @ dstart.mT
                rest = (dq * q - dp * p).view(n, B, H, 2, L, N).sum(3)  # r dr + a da - k dk - b db
                dq, dp = (x.view(n, B, H, 2, L, N) for x in (dq, dp))
                da_ = dq[:, :, :, 0] * before
                dw_ = (rest.sum(3, keepdim=True) + end + rest).sub_(rest.cumsum(3)).addcmul_(a_, da_, value=-1)
                for out, x in zip(grads, (dq[:, :, :, 1] * up, dw_, dp[:, :, :, 0] * down, dv_.view(r_.shape), da_,
                                          dp[:, :, :, 1] * down)):
                    tiles(out, t, n, L).copy_(x)
        return *grads, dS.view(B, H, N, N) if ctx.has_initial else None


Q = 32  # tokens from one saved state to the next in the form below
SOURCE = r"""
enum { M = (N + 15) / 16, P = 16 * M, ROWS = 16 };
typedef float vec __attribute__((vector_size(64))), half __attribute__((vector_size(32))),
    quarter __attribute__((vector_size(16)));

static inline float sum(vec x) {
    half h[2];
    memcpy(h, &x, 64);
    h[0] += h[1];
    quarter q[2];
    memcpy(q, h, 32);
    q[0] += q[1];
    return q[0][0] + q[0][1] + (q[0][2] + q[0][3]);
}

static inline void load(const void *x, num x16, num at, vec *to) {  /* N from the at-th on; what is left of M stays */
    get(x, x16, at, N, (float *)to);
}

static inline void decay(vec *w) {  /* e^w */
    for (num n = 0; n < P; n++) ((float *)w)[n] = ex2(1.44269504f * ((float *)w)[n]);
}

/* s holds S transposed: a row is a key, lanes are values, so that S a and S r are sums of rows. */
void forward(const void *r, const void *w, const void *k, const void *v, const void *a, const void *b, void *y,
             float *states, float *state, num B, num T, num H, num x16) {
    num chunks = (T + Q - 1) / Q;
    #pragma omp parallel for schedule(static) if (B * H * T > 8)
    for (num i = 0; i < B * H; i++) {
        vec s[N][M], x[6][M] = {0};
        float *r_t = (float *)x[0], *d_t = (float *)x[1], *k_t = (float *)x[2], *a_t = (float *)x[4],
              *b_t = (float *)x[5], *at_start = state + i * N * N;
        const void *ins[6] = {r, w, k, v, a, b};
        if (T == 1 && !states) {  /* generation: rows of S as they lie */
            float y_t[N];
            for (num n = 0; n < 6; n++) load(ins[n], x16, i * N, x[n]);
            decay(x[1]);
            for (num row = 0; row < N; row++) {
                vec *S = s[0], u = {0}, o = {0};
                S[M - 1] = u;
                load(at_start, 0, row * N, S);
                for (num m = 0; m < M; m++) u += S[m] * x[4][m];
                float u_t = sum(u), v_t = ((float *)x[3])[row];
                for (num m = 0; m < M; m++) {
                    S[m] = S[m] * x[1][m] + u_t * x[5][m] + v_t * x[2][m];
                    o += S[m] * x[0][m];
                }
                y_t[row] = sum(o);
                put((float *)S, N, 0, at_start, row * N);
            }
            put(y_t, N, x16, y, i * N);
            continue;
        }
        memset(s, 0, sizeof s);
        for (num row = 0; row < N; row++)
            for (num j = 0; j < N; j++) ((float *)s[j])[row] = at_start[row * N + j];
        for (num t = 0; t < T; t++) {
            num at = ((i / H * T + t) * H + i % H) * N;
            if (t % Q == 0 && states) memcpy(states + (i * chunks + t / Q) * N * P, s, sizeof s);
            vec u[M] = {0}, y_t[M] = {0};
            for (num n = 0; n < 6; n++) load(ins[n], x16, at, x[n]);
            decay(x[1]);
            for (num j = 0; j < N; j++)
                for (num m = 0; m < M; m++) u[m] += s[j][m] * a_t[j];
            for (num j = 0; j < N; j++)
                for (num m = 0; m < M; m++) {
                    s[j][m] = s[j][m] * d_t[j] + u[m] * b_t[j] + x[3][m] * k_t[j];
                    y_t[m] += s[j][m] * r_t[j];
                }
            put((float *)y_t, N, x16, y, at);
        }
        for (num row = 0; row < N; row++)
            for (num j = 0; j < N; j++) at_start[row * N + j] = ((float *)s[j])[row];
    }
}

/* g: dL/dfinal before, dL/dinitial after; R is dL/dS. A row is a value, lanes are keys: five of six gradients sum rows.
   With dy and r, d = e^w:  R += dy r^T;   du = R b,  dv = R k,  dr = S^T dy,  db = R^T u,  dk = R^T v,
   dw = d (rows of R S_before),  da = S_before^T du,   and on to the token before:  R = R diag(d) + du a^T */
void backward(const void *r, const void *w, const void *k, const void *v, const void *a, const void *b,
              const float *states, const void *dy, void *dr, void *dw, void *dk, void *dv, void *da, void *db,
              float *g, num B, num T, num H, num x16) {
    num chunks = (T + Q - 1) / Q;
    #pragma omp parallel for schedule(static)
    for (num i = 0; i < B * H; i++) {
        vec R[N][M] = {0}, sums[Q][5][M], (*s)[ROWS][M] = aligned_alloc(64, (Q + 1) * sizeof *s);
        vec r_t[M] = {0}, d_t[M] = {0}, k_t[M] = {0}, a_t[M] = {0}, b_t[M] = {0};
        float u[Q][ROWS];
        for (num row = 0; row < N; row++) load(g, 0, (i * N + row) * N, R[row]);
        for (num c = chunks - 1; c >= 0; c--) {
            num first = c * Q, count = T - first < Q ? T - first : Q;
            memset(sums, 0, sizeof sums);
            for (num top = 0; top < N; top += ROWS) {  /* ROWS values at a time: Q states of so many stay in cache */
                num rows = N - top < ROWS ? N - top : ROWS;
                float v_t[ROWS], dy_t[ROWS], dv_t[ROWS];
                memset(s[0], 0, sizeof s[0]);
                for (num j = 0; j < N; j++)
                    for (num row = 0; row < rows; row++)
                        ((float *)s[0][row])[j] = states[((i * chunks + c) * N + j) * P + top + row];
                for (num t = 0; t < count; t++) {
                    num at = ((i / H * T + first + t) * H + i % H) * N;
                    load(w, x16, at, d_t), load(k, x16, at, k_t), load(a, x16, at, a_t), load(b, x16, at, b_t);
                    decay(d_t);
                    get(v, x16, at + top, rows, v_t);
                    for (num row = 0; row < rows; row++) {
                        vec p = {0}, *old = s[t][row], *new = s[t + 1][row];
                        for (num m = 0; m < M; m++) p += old[m] * a_t[m];
                        float u_t = u[t][row] = sum(p);
                        for (num m = 0; m < M; m++) new[m] = old[m] * d_t[m] + u_t * b_t[m] + v_t[row] * k_t[m];
                    }
                }
                for (num t = count - 1; t >= 0; t--) {
                    num at = ((i / H * T + first + t) * H + i % H) * N;
                    vec o[5][M];
                    load(r, x16, at, r_t), load(w, x16, at, d_t), load(k, x16, at, k_t), load(a, x16, at, a_t);
                    load(b, x16, at, b_t);
                    decay(d_t);
                    get(v, x16, at + top, rows, v_t);
                    get(dy, x16, at + top, rows, dy_t);
                    memcpy(o, sums[t], sizeof o);
                    for (num row = 0; row < rows; row++) {
                        vec x[M], pu = {0}, pv = {0}, *old = s[t][row], *new = s[t + 1][row];
                        float o_t = dy_t[row], u_t = u[t][row];
                        for (num m = 0; m < M; m++) {
                            x[m] = R[top + row][m] + o_t * r_t[m];
                            pu += x[m] * b_t[m];
                            pv += x[m] * k_t[m];
                            o[0][m] += new[m] * o_t;
                            o[1][m] += x[m] * old[m];
                            o[2][m] += x[m] * v_t[row];
                            o[4][m] += x[m] * u_t;
                        }
                        float du = sum(pu);
                        dv_t[row] = sum(pv);
                        for (num m = 0; m < M; m++) {
                            o[3][m] += old[m] * du;
                            R[top + row][m] = x[m] * d_t[m] + du * a_t[m];
                        }
                    }
                    put(dv_t, rows, x16, dv, at + top);
                    memcpy(sums[t], o, sizeof o);
                }
            }
            void *out[5] = {dr, dw, dk, da, db};
            for (num t = 0; t < count; t++) {
                num at = ((i / H * T + first + t) * H + i % H) * N;
                load(w, x16, at, d_t);
                decay(d_t);
                for (num m = 0; m < M; m++) sums[t][1][m] *= d_t[m];
                for (num n = 0; n < 5; n++) put((float *)sums[t][n], N, x16, out[n], at);
            }
        }
        for (num row = 0; row < N; row++) memcpy(g + (i * N + row) * N, R[row], 4 * N);
        free(s);
    }
}
"""


@functools.cache
def library(N):
    """The C code for heads of N channels: with N known, a token's sums stay in registers."""
    return compiled(f"enum {{ N = {N}, Q = {Q} }};" + SOURCE)


class CompiledWKV7(torch.autograd.Function):
    """The recurrence at the top, in fp32; kept: the state before every Q tokens, which backward goes through again."""

    @staticmethod
    def forward(ctx, r, w, k, v, a, b, initial):
        B, T, H, N = r.shape
        ins = [x.contiguous() for x in (r, w, k, v, a, b)]
        S = r.new_zeros(B, H, N, N, dtype=torch.float32) if initial is None else (
            initial.to(torch.float32, copy=True).contiguous())
        y, keep = torch.empty_like(ins[0]), any(ctx.needs_input_grad)
        states = S.new_empty(B, H, -(-T // Q), N, -(-N // 16) * 16) if keep else None
        ctx.how = B, T, H, int(r.dtype == torch.bfloat16)
        call(library(N).forward, *ins, y, states, S, *ctx.how)
        ctx.save_for_backward(*ins, states)
        ctx.has_initial = initial is not None
        ctx.set_materialize_grads(False)  # an unused final state brings no gradient
        return y, S

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal):
        *ins, states = ctx.saved_tensors
        B, _, H, N = ins[0].shape
        dy = torch.zeros_like(ins[0]) if dy is None else dy.contiguous()
        g = states.new_zeros(B, H, N, N) if dfinal is None else dfinal.to(torch.float32, copy=True).contiguous()
        grads = [torch.empty_like(x) for x in ins]
        call(library(N).backward, *ins, states, dy, *grads, g, *ctx.how)
        return *grads, g if ctx.has_initial else None


def wkv7_torch(r, w, k, v, a, b, initial=None):
    compiles = r.is_cpu and r.dtype in (torch.float32, torch.bfloat16) and not torch.compiler.is_compiling()
    if compiles and library(r.shape[-1]):
        return CompiledWKV7.apply(r, w, k, v, a, b, initial)
    return WKV7.apply(r, w, k, v, a, b, initial)


if triton is not None:
    # One program walks through the chunks of one (batch, head) with its state in registers: nothing goes through memory
    # but the inputs, y and, for backward, the state before each chunk. All tiles are the header's transposed: a column
    # is a token, so that products have BN rows, which the warps share; with rows of BT tokens every warp would compute,
    # and hold, all of them. i is the place of a token of p in a chunk, j of one of q. Columns past T and rows past N
    # are loaded as zeros: a decay of 1 and nothing read or written.

    @triton.jit
    def product(x, y):
        return tl.dot(x, y, input_precision="ieee")  # fp32: plain FMAs; 16-bit: tensor cores, sums in fp32

    @triton.jit
    def fine(x, y, t: tl.constexpr):
        """Product of two fp32 tiles; to 2^-16 where the inputs' dtype t is bf16: each is the sum of two tiles in t."""
        if t == tl.float32:
            return product(x, y)
        x0, y0 = x.to(t), y.to(t)
        return product(x0, y0) + product(x0, (y - y0.to(tl.float32)).to(t)) + product((x - x0.to(tl.float32)).to(t), y0)

    @triton.jit
    def load(x, o, m):
        return tl.load(x + o, mask=m, other=0.0).to(tl.float32)

    @triton.jit
    def prepare_tile(r, w, k, a, b, o, m, i, j, LOG: tl.constexpr):
        """-> q_a, q_r, p_k, p_b [BN, BT], A_ak, A_rk, A_rb [BT, BT] as operands of products; (1 - A_ab)^{-1} [BT, BT]
        in fp32, for where keys repeat it takes differences of nearly equal rows; e^m [BN, 1]; the factors of a, of r,
        of k and b [BN, BT]."""
        t = r.dtype.element_ty
        b_w = load(w, o, m)
        c, mid = tl.cumsum(b_w, 1), tl.sum(b_w, 1, keep_dims=True) * 0.5
        before, up, down = tl.exp(c - b_w - mid), tl.exp(c - mid), tl.exp(mid - c)
        q_a, q_r = (load(a, o, m) * before).to(t), (load(r, o, m) * up).to(t)
        p_k, p_b = (load(k, o, m) * down).to(t), (load(b, o, m) * down).to(t)
        A_ak = tl.where(i < j, product(tl.trans(p_k), q_a), 0.0).to(t)
        A_ab = tl.where(i < j, product(tl.trans(p_b), q_a), 0.0)
        A_rk = tl.where(i <= j, product(tl.trans(p_k), q_r), 0.0).to(t)
        A_rb = tl.where(i <= j, product(tl.trans(p_b), q_r), 0.0).to(t)
        # M holds the inverses of the diagonal's blocks of 2^e tokens; two of them and what couples them make the next:
        #   (1 - [[X, Z], [0, Y]])^{-1} = [[M_X, M_X Z M_Y], [0, M_Y]]
        M = tl.where(i == j, 1.0, 0.0) + tl.where((i >> 1) == (j >> 1), A_ab, 0.0)
        for e in tl.static_range(1, LOG):
            between = tl.where(((i >> (e + 1)) == (j >> (e + 1))) & ((i >> e) != (j >> e)), A_ab, 0.0)
            M += fine(fine(M, between, t), M, t)
        return q_a, q_r, p_k, p_b, A_ak, A_rk, A_rb, M, tl.exp(mid), before, up, down

    @triton.jit
    def wkv7_fwd_kernel(r, w, k, v, a, b, initial, y, states, final, H, T, N: tl.constexpr, BN: tl.constexpr,
                        BT: tl.constexpr, LOG: tl.constexpr):
        i_bh = tl.program_id(0).to(tl.int64)
        i, j, o_n = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :], tl.arange(0, BN)[:, None]
        start = ((i_bh // H) * T * H + i_bh % H) * N
        o_k = tl.arange(0, BN)[None, :]
        o_s, m_s = o_n * N + o_k, (o_n < N) & (o_k < N)
        states += i_bh * tl.cdiv(T, BT) * N * N
        t = r.dtype.element_ty
        if initial is None:
            S = tl.zeros([BN, BN], tl.float32)  # rows are values, columns keys
        else:
            S = load(initial + i_bh * N * N, o_s, m_s)
        for n in range(0, tl.cdiv(T, BT)):
            o_t = n * BT + j
            o, m = start + o_t.to(tl.int64) * H * N + o_n, (o_t < T) & (o_n < N)
            tl.store(states + n.to(tl.int64) * N * N + o_s, S, mask=m_s)
            q_a, q_r, p_k, p_b, A_ak, A_rk, A_rb, M, half, before, up, down = prepare_tile(
                r, w, k, a, b, o, m, i, j, LOG)
            b_v = tl.load(v + o, mask=m, other=0.0)
            S *= tl.trans(half)
            S_ = S.to(t)
            u = fine(product(S_, q_a) + product(b_v, A_ak), M, t).to(t)
            tl.store(y + o, product(S_, q_r) + product(b_v, A_rk) + product(u, A_rb), mask=m)
            S = (S + product(b_v, tl.trans(p_k)) + product(u, tl.trans(p_b))) * tl.trans(half)
        tl.store(final + i_bh * N * N + o_s, S, mask=m_s)

    # The header's names: R = dL/dS at the chunk's end, R_ = R diag(e^m), D = [dz; dy], dA = D [v; u]^T where A != 0.

    @triton.jit
    def wkv7_bwd_kernel(r, w, k, v, a, b, states, dy, dfinal, dr, dw, dk, dv, da, db, dinitial, H, T, N: tl.constexpr,
                        BN: tl.constexpr, BT: tl.constexpr, LOG: tl.constexpr):
        i_bh = tl.program_id(0).to(tl.int64)
        i, j, o_n = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :], tl.arange(0, BN)[:, None]
        start = ((i_bh // H) * T * H + i_bh % H) * N
        o_k = tl.arange(0, BN)[None, :]
        o_s, m_s = o_n * N + o_k, (o_n < N) & (o_k < N)
        n_t = tl.cdiv(T, BT)
        states += i_bh * n_t * N * N
        t = r.dtype.element_ty
        if dfinal is None:
            R = tl.zeros([BN, BN], tl.float32)
        else:
            R = load(dfinal + i_bh * N * N, o_s, m_s)
        for n in range(0, n_t):
            o_t = (n_t - 1 - n) * BT + j
            o, m = start + o_t.to(tl.int64) * H * N + o_n, (o_t < T) & (o_n < N)
            q_a, q_r, p_k, p_b, A_ak, A_rk, A_rb, M, half, before, up, down = prepare_tile(
                r, w, k, a, b, o, m, i, j, LOG)
            b_v, b_dy = tl.load(v + o, mask=m, other=0.0), tl.load(dy + o, mask=m, other=0.0)
            S = load(states + (n_t - 1 - n).to(tl.int64) * N * N, o_s, m_s) * tl.trans(half)
            R *= tl.trans(half)
            mid = tl.trans(tl.sum(S * R, 0, keep_dims=True))  # [BN, 1], for dw
            S_, R_ = S.to(t), R.to(t)
            u = fine(product(S_, q_a) + product(b_v, A_ak), M, t).to(t)
            du = product(b_dy, tl.trans(A_rb)) + product(R_, p_b)
            dz = fine(du, tl.trans(M), t).to(t)
            tl.store(dv + o, product(dz, tl.trans(A_ak)) + product(b_dy, tl.trans(A_rk)) + product(R_, p_k), mask=m)
            dA_ak = tl.where(i < j, product(tl.trans(b_v), dz), 0.0).to(t)
            dA_ab = tl.where(i < j, product(tl.trans(u), dz), 0.0).to(t)
            dA_rk = tl.where(i <= j, product(tl.trans(b_v), b_dy), 0.0).to(t)
            dA_rb = tl.where(i <= j, product(tl.trans(u), b_dy), 0.0).to(t)
            S_ = tl.trans(S_)
            dq = product(S_, b_dy) + product(p_k, dA_rk) + product(p_b, dA_rb)
            tl.store(dr + o, dq * up, mask=m)
            rest = dq * q_r
            dq = product(S_, dz) + product(p_k, dA_ak) + product(p_b, dA_ab)
            tl.store(da + o, dq * before, mask=m)
            a_da = dq * q_a
            rest += a_da
            R_ = tl.trans(R_)
            dp = product(R_, b_v)
            mid += tl.sum(dp * p_k, 1, keep_dims=True)
            dp += product(q_a, tl.trans(dA_ak)) + product(q_r, tl.trans(dA_rk))
            tl.store(dk + o, dp * down, mask=m)
            rest -= dp * p_k
            dp = product(R_, u)
            mid += tl.sum(dp * p_b, 1, keep_dims=True)
            dp += product(q_a, tl.trans(dA_ab)) + product(q_r, tl.trans(dA_rb))
            tl.store(db + o, dp * down, mask=m)
            rest -= dp * p_b
            tl.store(dw + o, mid + tl.sum(rest, 1, keep_dims=True) - tl.cumsum(rest, 1) + rest - a_da, mask=m)
            R = (R + product(b_dy, tl.trans(q_r)) + product(dz, tl.trans(q_a))) * tl.trans(half)
        if dinitial is not None:
            tl.store(dinitial + i_bh * N * N + o_s, R, mask=m_s)

    TILE = 16  # tokens of a chunk in the kernels

    def config(r):
        """A tile's rows are shared by 4 warps; in fp32, where products are FMAs with whole rows in registers, by 8."""
        N = r.shape[3]
        BN = max(16, triton.next_power_of_2(N))
        warps = 8 if BN == 64 and r.dtype == torch.float32 else 4
        return dict(N=N, BN=BN, BT=TILE, LOG=TILE.bit_length() - 1, num_warps=warps, num_stages=1)

    @custom_op("kernels::wkv7", mutates_args=())
    def wkv7_op(r: torch.Tensor, w: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor,
                initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> y, final, and the states before each chunk (B, H, chunks, N, N) for backward."""
        B, T, H, N = r.shape
        y, final = r.new_empty(r.shape), r.new_empty(B, H, N, N, dtype=torch.float32)
        states = r.new_empty(B, H, triton.cdiv(T, TILE), N, N)
        wkv7_fwd_kernel[(B * H,)](
            *(x.contiguous() for x in (r, w, k, v, a, b)), None if initial is None else initial.contiguous(),
            y, states, final, H, T, **config(r))
        return y, final, states

    @wkv7_op.register_fake
    def _(r, w, k, v, a, b, initial):
        B, T, H, N = r.shape
        final = r.new_empty(B, H, N, N, dtype=torch.float32)
        return r.new_empty(r.shape), final, r.new_empty(B, H, (T + TILE - 1) // TILE, N, N)

    @custom_op("kernels::wkv7_bwd", mutates_args=())
    def wkv7_bwd_op(dy: torch.Tensor, dfinal: torch.Tensor | None, r: torch.Tensor, w: torch.Tensor, k: torch.Tensor,
                    v: torch.Tensor, a: torch.Tensor, b: torch.Tensor, states: torch.Tensor, initial: bool
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
                               torch.Tensor]:
        """-> dr, dw, dk, dv, da, db, dinitial (empty without initial)."""
        B, T, H, N = r.shape
        grads = [r.new_empty(r.shape) for _ in range(6)]
        dinitial = r.new_empty((B, H, N, N) if initial else 0, dtype=torch.float32)
        wkv7_bwd_kernel[(B * H,)](
            *(x.contiguous() for x in (r, w, k, v, a, b)), states, dy.contiguous(),
            None if dfinal is None else dfinal.contiguous(), *grads, dinitial if initial else None, H, T, **config(r))
        return *grads, dinitial

    @wkv7_bwd_op.register_fake
    def _(dy, dfinal, r, w, k, v, a, b, states, initial):
        B, T, H, N = r.shape
        dinitial = r.new_empty((B, H, N, N) if initial else 0, dtype=torch.float32)
        return *(r.new_empty(r.shape) for _ in range(6)), dinitial

    def save_for_backward(ctx, inputs, output):
        *tensors, initial = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.initial = initial is not None and initial.dtype
        ctx.set_materialize_grads(False)  # an unused final brings no gradient: not a tensor of zeros to read

    def wkv7_backward(ctx, dy, dfinal, _):
        saved = ctx.saved_tensors  # once: activation checkpointing makes them again at each look
        *grads, dinitial = wkv7_bwd_op(torch.zeros_like(saved[0]) if dy is None else dy, dfinal, *saved,
                                       bool(ctx.initial))
        return *grads, dinitial.to(ctx.initial) if ctx.initial else None

    wkv7_op.register_autograd(wkv7_backward, setup_context=save_for_backward)

    def wkv7_triton(r, w, k, v, a, b, initial=None):
        if r.dtype not in (torch.float32, torch.bfloat16, torch.float16) or r.shape[3] > 64:
            raise ValueError(f"wkv7: {r.dtype}, N {r.shape[3]}; expected float32, bfloat16 or float16, and N <= 64")
        return wkv7_op(r, w, k, v, a, b, initial)[:2]


def wkv7(r, w, k, v, a, b, initial=None):
    """r, w, k, v, a, b (B, T, H, N), initial (B, H, N, N) or None: the state before the first token -> y (B, T, H, N)
    in r's dtype, final (B, H, N, N) fp32: the state after the last. T >= 1. ValueError: shapes or dtypes that do not
    fit; on a GPU also N > 64."""
    B, T, H, N = r.shape
    if any(x.shape != r.shape or x.dtype != r.dtype for x in (w, k, v, a, b)) or not T or (
            initial is not None and initial.shape != (B, H, N, N)):
        given = [(tuple(x.shape), x.dtype) for x in (r, w, k, v, a, b, initial) if x is not None]
        raise ValueError(f"wkv7: {given}; expected six of (B, T, H, N) in one dtype, T >= 1, and initial (B, H, N, N)")
    which = form(r)
    op = wkv7_triton if which == "triton" else wkv7_ref if which == "ref" else wkv7_torch
    return op(r, w, k, v, a, b, initial)
