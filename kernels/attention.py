"""
Attention: softmax(scale q k^T) v without the T x T matrix
    Dao 2023, FlashAttention-2, arXiv:2307.08691v1, algorithms 1 and 2

    s_ij = scale q_i . k_j      softcap > 0: softcap tanh(s_ij / softcap), as in Gemma 2, arXiv:2408.00118
    p_ij = exp(s_ij - lse_i),   lse_i = log sum_j exp(s_ij);   causal: over the keys j <= i + Tk - Tq only
    o_i  = sum_j p_ij v_j
    backward                    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - delta_i),   delta_i = do_i . o_i
                                dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i

Shapes: q (B, H, Tq, D), k, v (B, Hkv, Tk, D) -> o (B, H, Tq, D), all of one dtype: fp32, bf16 or fp16. H % Hkv == 0
(GQA): query head h reads head h // (H / Hkv) of k and v. Any strides: the kernels read views of one packed (B, T, 3,
H, D) tensor in place, except that a last dimension that is not contiguous is copied, and that a D other than 32, 64
or 128 is filled up with zeros. o is a view of a contiguous (B, Tq, H, D): o.transpose(1, 2).reshape(B, Tq, H * D) is
free. D <= 128 in the kernels. Softmax and all sums are fp32; p and ds are rounded to the inputs' dtype to be
multiplied. Under autocast the inputs are cast as torch.nn.functional.scaled_dot_product_attention casts them.

Saved for backward: q, k, v, o and lse, (B, H, Tq) fp32, in base 2. p is recomputed, once in each of the two backward
kernels: one owns a block of queries (dq, and delta), one a block of keys (dk and dv, summed over the query heads of its
group). No atomics: results repeat bit for bit. On a CPU both passes are loops in C over
tiles of 64 x 64; a processor with AMX takes PyTorch's forward in bf16.

Bytes and FLOPs of one query head. A block: BM queries (fwd, dq) or BN keys (dkv); e: bytes of an element; G = H / Hkv:
    fwd    e D (2 Tq + 2 sum over blocks of the keys they see) + 4 Tq                  4 D FLOPs for each pair
    dq     e D (4 Tq + 2 sum over blocks of the keys they see) + 8 Tq                  6 D
    dkv    e D (4 Tk / G + 2 sum over blocks of the queries that see them) + 8 that    8 D
Blocks above the causal diagonal are neither read nor multiplied: for long T half of both. Device memory moves each
tensor about once while a head's k and v stay in the L2 cache; the tensor cores are then the limit, at least BM or BN
FLOPs for each byte read in 16 bits. Decoding (Tq = 1) is limited by reading k and v, with one program a head: long
contexts at small B H leave multiprocessors idle.
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


def attention_ref(q, k, v, causal=True, scale=None, softcap=0.0):
    """The definition; fp32 inside, fp64 for fp64."""
    Tq, Tk, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)  # (B, H, Tk, D)
    s = scale * (q.to(dtype) @ k.to(dtype).transpose(2, 3))  # (B, H, Tq, Tk)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if causal:
        seen = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
        s = s.masked_fill(~seen, float("-inf"))
    return (s.softmax(-1) @ v.to(dtype)).to(q.dtype)


# Both passes for a CPU (algorithms 1 and 2 of the paper), fp32 inside whatever the inputs are. A thread takes a head
# (backward: one of k and v, and the query heads that read it) through tiles of BLOCK queries x BLOCK keys, which stay
# in its cache. What it needs of q, k, v and do it copies first, as fp32 rows of P, D filled up to whole vectors: any
# strides, no tile at an edge.
SOURCE = r"""
enum { P = (D + 15) / 16 * 16, BLOCK = 64 };
typedef float row[P];
typedef struct { num b, h, t; } strides;
static const float LOG2E = 1.44269504f, LN2 = 0.693147181f;

static void read(const void *x, num at, num bf16, float factor, float *to) {
    if (bf16) for (num d = 0; d < D; d++) to[d] = factor * from_bf16(((uint16_t *)x)[at + d]);
    else for (num d = 0; d < D; d++) to[d] = factor * ((float *)x)[at + d];
    for (num d = D; d < P; d++) to[d] = 0;
}

static void write(const row *x, num T, num bf16, float factor, void *to, strides s, num b, num h) {
    for (num t = 0; t < T; t++) {
        num at = b * s.b + h * s.h + t * s.t;
        row y;
        for (num d = 0; d < D; d++) y[d] = factor * x[t][d];
        put(y, D, bf16, to, at);
    }
}

/* A head: T rows, then zeros up to a multiple of BLOCK */
static void rows(const void *x, strides s, num b, num h, num T, num bf16, float factor, row *to) {
    for (num t = 0; t < T; t++) read(x, b * s.b + h * s.h + t * s.t, bf16, factor, to[t]);
    memset(to[T], 0, ((T + BLOCK - 1) / BLOCK * BLOCK - T) * sizeof(row));
}

/* BLOCK rows after the other as (P, BLOCK), the right side of a product with their transpose */
static void turn(const row *x, num T, float *to) {
    for (num j = 0; j < T; j += BLOCK)
        for (num d = 0; d < P; d++)
            for (num t = 0; t < BLOCK; t++) to[j * P + d * BLOCK + t] = x[j + t][d];
}

/* s: the strides of q, k, v, o, lse. room: floats in work for each thread */
void forward(const void *q, const void *k, const void *v, void *o, float *lse, const strides *s, float *work, num room,
             const float *scale, num bf16, num causal, num B, num H, num G, num Tq, num Tk, num threads) {
    num Q = (Tq + BLOCK - 1) / BLOCK * BLOCK, K = (Tk + BLOCK - 1) / BLOCK * BLOCK;
    #pragma omp parallel for num_threads(threads)
    for (num thread = 0; thread < threads; thread++) {
        num begin = thread * B * H / threads, end = (thread + 1) * B * H / threads;
        for (num i = begin; i < end; i++) {
            num b = i / H, h = i % H;
            row *vs = (row *)(work + thread * room), *qs = vs + K, *os = qs + Q;
            float *kT = os[Q], p[BLOCK][BLOCK], most[BLOCK], sum[BLOCK];
            if (i == begin || h % G == 0) {
                rows(k, s[1], b, h / G, Tk, bf16, 1, vs), turn(vs, Tk, kT);
                rows(v, s[2], b, h / G, Tk, bf16, 1, vs);
            }
            rows(q, s[0], b, h, Tq, bf16, LOG2E * *scale, qs);
            for (num m = 0; m < Tq; m += BLOCK) {
                for (num r = 0; r < BLOCK; r++) most[r] = -INFINITY, sum[r] = 0;
                for (num j = 0; j < (causal ? m + 1 : Tk); j += BLOCK) {
                    product(qs[m], P, 1, kT + j * P, BLOCK, p[0], BLOCK, BLOCK, BLOCK, D, 0);
                    for (num r = 0; r < BLOCK; r++) {
                        int seen = (causal && m + r + 1 < Tk ? m + r + 1 : Tk) - j;
                        float top = most[r], l = 0;
                        #pragma omp simd reduction(max:top)
                        for (int n = 0; n < BLOCK; n++) top = n < seen && p[r][n] > top ? p[r][n] : top;
                        float shrink = ex2(most[r] - top);
                        #pragma omp simd reduction(+:l)
                        for (int n = 0; n < BLOCK; n++) {
                            float e = ex2(p[r][n] - top);
                            p[r][n] = e = n < seen ? e : 0;
                            l += e;
                        }
                        for (num d = 0; d < P; d++) os[m + r][d] = j ? os[m + r][d] * shrink : 0;
                        most[r] = top, sum[r] = sum[r] * shrink + l;
                    }
                    product(p[0], BLOCK, 1, vs[j], P, os[m], P, BLOCK, P, BLOCK, 1);
                }
                for (num r = 0; r < BLOCK && m + r < Tq; r++) {
                    for (num d = 0; d < P; d++) os[m + r][d] /= sum[r];
                    lse[b * s[4].b + h * s[4].h + (m + r) * s[4].t] = LN2 * (most[r] + log2f(sum[r]));
                }
            }
            write(os, Tq, bf16, 1, o, s[3], b, h);
        }
    }
}

/* s: the strides of q, k, v, o, dy, lse, dq, dk, dv. room: floats in work for each thread */
void backward(const void *q, const void *k, const void *v, const void *o, const void *dy, const float *lse, void *dq,
              void *dk, void *dv, const strides *s, float *work, num room, const float *scale, num bf16, num causal,
              num B, num H, num G, num Tq, num Tk, num threads) {
    num Q = (Tq + BLOCK - 1) / BLOCK * BLOCK, K = (Tk + BLOCK - 1) / BLOCK * BLOCK;
    #pragma omp parallel for num_threads(threads)
    for (num thread = 0; thread < threads; thread++)
        for (num i = thread; i < B * H / G; i += threads) {
            num b = i / (H / G), h_k = i % (H / G);
            row *ks = (row *)(work + thread * room), *dks = ks + K, *dvs = dks + K, *qs = dvs + K, *dys = qs + Q,
                *dqs = dys + Q;
            float *kT = dqs[Q], *vT = kT + K * P, *l = vT + K * P, *delta = l + Q;
            float p[BLOCK][BLOCK], ds[BLOCK][BLOCK];
            rows(v, s[2], b, h_k, Tk, bf16, 1, ks), turn(ks, Tk, vT);
            rows(k, s[1], b, h_k, Tk, bf16, 1, ks), turn(ks, Tk, kT);
            memset(l, 0, 2 * Q * 4);
            for (num h = h_k * G; h < (h_k + 1) * G; h++) {
                rows(q, s[0], b, h, Tq, bf16, LOG2E * *scale, qs);  /* in base 2, as lse */
                rows(dy, s[4], b, h, Tq, bf16, 1, dys);
                for (num t = 0; t < Tq; t++) {
                    row y;
                    float sum = 0;
                    read(o, b * s[3].b + h * s[3].h + t * s[3].t, bf16, 1, y);
                    #pragma omp simd reduction(+:sum)
                    for (num d = 0; d < D; d++) sum += y[d] * dys[t][d];
                    delta[t] = sum, l[t] = LOG2E * lse[b * s[5].b + h * s[5].h + t * s[5].t];
                }
                for (num j = 0; j < Tk; j += BLOCK)
                    for (num m = causal ? j : 0; m < Tq; m += BLOCK) {
                        num first = h == h_k * G && m == (causal ? j : 0);  /* the first that dk and dv get */
                        product(qs[m], P, 1, kT + j * P, BLOCK, p[0], BLOCK, BLOCK, BLOCK, D, 0);
                        product(dys[m], P, 1, vT + j * P, BLOCK, ds[0], BLOCK, BLOCK, BLOCK, D, 0);
                        for (num r = 0; r < BLOCK; r++) {
                            float l_r = l[m + r], delta_r = delta[m + r];
                            int seen = (causal && m + r + 1 < Tk ? m + r + 1 : Tk) - j;
                            for (int n = 0; n < BLOCK; n++) {
                                float e = ex2(p[r][n] - l_r);
                                p[r][n] = e = n < seen ? e : 0;
                                ds[r][n] = e * (ds[r][n] - delta_r);
                            }
                        }
                        product(p[0], 1, BLOCK, dys[m], P, dvs[j], P, BLOCK, P, BLOCK, !first);
                        product(ds[0], 1, BLOCK, qs[m], P, dks[j], P, BLOCK, P, BLOCK, !first);
                        product(ds[0], BLOCK, 1, ks[j], P, dqs[m], P, BLOCK, P, BLOCK, j > 0);
                    }
                write(dqs, Tq, bf16, *scale, dq, s[6], b, h);
            }
            write(dks, Tk, bf16, LN2, dk, s[7], b, h_k);  /* q came times LOG2E */
            write(dvs, Tk, bf16, 1, dv, s[8], b, h_k);
        }
}
"""


@functools.cache
def library(D):
    """SOURCE for heads of size D."""
    return compiled(f"enum {{ D = {D} }};" + GEMM + SOURCE)


@functools.cache
def matrix_units():
    """Intel's AMX: PyTorch's forward in bf16 uses it, and is then the faster one."""
    return torch.cpu.get_capabilities().get("amx_tile", False)


def strides_of(*tensors):
    return torch.tensor([t.stride()[:3] for t in tensors])


class Compiled(torch.autograd.Function):
    """The loops above. Causal: as many queries as keys."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale):
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
        (B, H, Tq, D), (Hkv, Tk), threads = q.shape, k.shape[1:3], torch.get_num_threads()
        if q.dtype == torch.bfloat16 and matrix_units():
            all_k, all_v = (t.repeat_interleave(H // Hkv, 1) if H != Hkv else t for t in (k, v))
            forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            o, lse = forward(q, all_k, all_v, 0.0, causal, scale=scale)
        else:
            o, lse = q.new_empty(B, Tq, H, D).transpose(1, 2), q.new_empty(B, H, Tq, dtype=torch.float32)
            P, Q, K = (-(-n // m) * m for n, m in ((D, 16), (Tq, 64), (Tk, 64)))
            work = torch.empty(threads, P * 2 * (Q + K), dtype=torch.float32)
            call(library(D).forward, q, k, v, o, lse, strides_of(q, k, v, o, lse), work, work.shape[1],
                 torch.tensor(scale, dtype=torch.float32), int(q.dtype == torch.bfloat16), int(causal), B, H, H // Hkv,
                 Tq, Tk, threads)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.how = causal, scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        (causal, scale), (B, H, Tq, D), (Hkv, Tk), threads = ctx.how, q.shape, k.shape[1:3], torch.get_num_threads()
        do = do if do.stride(3) == 1 else do.contiguous()
        grads = [t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v)]
        P, Q, K = (-(-n // m) * m for n, m in ((D, 16), (Tq, 64), (Tk, 64)))
        work = torch.empty(threads, P * (3 * Q + 5 * K) + 2 * Q, dtype=torch.float32)
        tensors = q, k, v, o, do, lse, *grads
        call(library(D).backward, *tensors, strides_of(*tensors), work, work.shape[1],
             torch.tensor(scale, dtype=torch.float32), int(q.dtype == torch.bfloat16), int(causal), B, H, H // Hkv,
             Tq, Tk, threads)
        return *grads, None, None


def attention_torch(q, k, v, causal=True, scale=None, softcap=0.0):
    if softcap > 0:  # not an option of PyTorch's
        return attention_ref(q, k, v, causal, scale, softcap)
    Tq, Tk, mask = q.shape[2], k.shape[2], None
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    same = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.bfloat16)
    if q.is_cpu and same and q.numel() and k.numel() and (Tq == Tk or not causal):
        if not torch.compiler.is_compiling() and library(q.shape[3]):
            return Compiled.apply(q, k, v, causal, q.shape[3] ** -0.5 if scale is None else scale)
    if causal and 1 < Tq < Tk:  # PyTorch's is_causal aligns top left; one query sees every key
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal and Tq == Tk, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2 e): the GPU's instruction is exp2

    @triton.jit
    def tanh(x):
        return 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1)  # +-1 at the ends, where exp2 gives inf or 0

    @triton.jit
    def keys_seen(i_m, Tq, Tk, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        """Keys [0, whole): whole blocks that all queries of block i_m see; [whole, end): masked; the rest: unseen."""
        if CAUSAL:
            return (i_m * BM + Tk - Tq + 1) // BN * BN, tl.minimum(i_m * BM + BM + Tk - Tq, Tk)
        else:
            return Tk // BN * BN, Tk

    # Strides come as tuples (batch, head, time, 1). Programs are numbered so that those of one head, which share k and
    # v, run together; under a causal mask the longest of them start first.

    @triton.jit
    def attention_fwd_kernel(q, k, v, o, lse, sq, sk, sv, so, H, G, Tq, Tk, scale, CAP: tl.constexpr,
                             CAUSAL: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        n_m = tl.cdiv(Tq, BM)
        i_m = n_m - 1 - tl.program_id(0) % n_m
        i_bh = (tl.program_id(0) // n_m).to(tl.int64)  # int64: so is every offset of more than a block
        i_b, i_h = i_bh // H, i_bh % H
        q += i_b * sq[0] + i_h * sq[1]
        k += i_b * sk[0] + i_h // G * sk[1]
        v += i_b * sv[0] + i_h // G * sv[1]
        o += i_b * so[0] + i_h * so[1]
        o_m, o_n, o_d = i_m * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)[None, :]
        m_m = o_m < Tq
        o_k, o_v = o_n[:, None] * sk[2] + o_d, o_n[:, None] * sv[2] + o_d
        b_q = tl.load(q + o_m.to(tl.int64)[:, None] * sq[2] + o_d, mask=m_m[:, None], other=0.0)  # [BM, D]

        b_o = tl.zeros([BM, D], tl.float32)  # sum of p v, with p = exp2(s - max) so far
        b_l = tl.zeros([BM], tl.float32)  # sum of p
        b_max = tl.full([BM], float("-inf"), tl.float32)
        whole, end = keys_seen(i_m, Tq, Tk, CAUSAL, BM, BN)
        for MASKED in tl.static_range(2):
            for n in range(whole if MASKED else 0, end if MASKED else whole, BN):
                m_n = n + o_n < Tk
                m_kv = m_n[:, None] if MASKED else True
                n64 = tl.cast(n, tl.int64)
                b_k = tl.load(k + n64 * sk[2] + o_k, mask=m_kv, other=0.0)  # [BN, D]
                b_v = tl.load(v + n64 * sv[2] + o_v, mask=m_kv, other=0.0)  # [BN, D]
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
                if CAP > 0:
                    b_s = tanh(b_s * (scale / CAP)) * (CAP * LOG2E)
                else:
                    b_s *= scale * LOG2E
                if MASKED:
                    m_s = n + o_n[None, :] <= o_m[:, None] + Tk - Tq if CAUSAL else m_n[None, :]
                    b_s = tl.where(m_s, b_s, float("-inf"))
                b_new = tl.maximum(b_max, tl.max(b_s, 1))  # finite: every row sees a key of the first block
                b_p = tl.exp2(b_s - b_new[:, None])
                b_shrink = tl.exp2(b_max - b_new)
                b_l = b_l * b_shrink + tl.sum(b_p, 1)
                b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], input_precision="ieee")
                b_max = b_new
        tl.store(o + o_m.to(tl.int64)[:, None] * so[2] + o_d, b_o / b_l[:, None], mask=m_m[:, None])
        tl.store(lse + i_bh * Tq + o_m, b_max + tl.log2(b_l), mask=m_m)

    # With L = sum_i do_i . o_i:  dL/dp_ij = do_i . v_j = dp_ij, and the softmax's Jacobian gives
    #   dL/ds_ij = p_ij (dp_ij - sum_l p_il dp_il) = p_ij (dp_ij - do_i . o_i)     the sum over keys is a dot product
    # A soft cap multiplies ds_ij by its own derivative, 1 - tanh^2.

    @triton.jit
    def attention_bwd_dq_kernel(q, k, v, o, do, lse, delta, dq, sq, sk, sv, so, H, G, Tq, Tk, scale, CAP: tl.constexpr,
                                CAUSAL: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        """dq and delta of a block of queries; do, o and dq have the strides so."""
        n_m = tl.cdiv(Tq, BM)
        i_m = n_m - 1 - tl.program_id(0) % n_m
        i_bh = (tl.program_id(0) // n_m).to(tl.int64)
        i_b, i_h = i_bh // H, i_bh % H
        q += i_b * sq[0] + i_h * sq[1]
        k += i_b * sk[0] + i_h // G * sk[1]
        v += i_b * sv[0] + i_h // G * sv[1]
        o_m, o_n, o_d = i_m * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)[None, :]
        m_m = o_m < Tq
        o_k, o_v = o_n[:, None] * sk[2] + o_d, o_n[:, None] * sv[2] + o_d
        m_q = m_m[:, None]
        o_o = i_b * so[0] + i_h * so[1] + o_m.to(tl.int64)[:, None] * so[2] + o_d
        b_do = tl.load(do + o_o, mask=m_q, other=0.0)  # [BM, D]
        b_delta = tl.sum(b_do.to(tl.float32) * tl.load(o + o_o, mask=m_q, other=0.0).to(tl.float32), 1)
        tl.store(delta + i_bh * Tq + o_m, b_delta, mask=m_m)
        b_lse = tl.load(lse + i_bh * Tq + o_m, mask=m_m, other=float("inf"))  # inf: p = 0 past the end
        b_q = tl.load(q + o_m.to(tl.int64)[:, None] * sq[2] + o_d, mask=m_q, other=0.0)

        b_dq = tl.zeros([BM, D], tl.float32)
        whole, end = keys_seen(i_m, Tq, Tk, CAUSAL, BM, BN)
        for MASKED in tl.static_range(2):
            for n in range(whole if MASKED else 0, end if MASKED else whole, BN):
                m_n = n + o_n < Tk
                m_kv = m_n[:, None] if MASKED else True
                n64 = tl.cast(n, tl.int64)
                b_k = tl.load(k + n64 * sk[2] + o_k, mask=m_kv, other=0.0)  # [BN, D]
                b_v = tl.load(v + n64 * sv[2] + o_v, mask=m_kv, other=0.0)  # [BN, D]
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
                if CAP > 0:
                    b_tanh = tanh(b_s * (scale / CAP))
                    b_s = b_tanh * (CAP * LOG2E)
                else:
                    b_s *= scale * LOG2E
                b_p = tl.exp2(b_s - b_lse[:, None])
                if MASKED:
                    m_s = n + o_n[None, :] <= o_m[:, None] + Tk - Tq if CAUSAL else m_n[None, :]
                    b_p = tl.where(m_s, b_p, 0.0)
                b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision="ieee") - b_delta[:, None])
                if CAP > 0:
                    b_ds *= 1 - b_tanh * b_tanh
                b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
        tl.store(dq + o_o, b_dq * scale, mask=m_q)

    @triton.jit
    def attention_bwd_dkv_kernel(q, k, v, do, lse, delta, dk, dv, sq, sk, sv, so, sdk, Hkv, G, Tq, Tk, scale,
                                 CAP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
                                 BN: tl.constexpr):
        """dk and dv of a block of keys, summed over the G query heads that read it. Keys are the rows of products."""
        n_n = tl.cdiv(Tk, BN)
        i_n = tl.program_id(0) % n_n
        i_bh = (tl.program_id(0) // n_n).to(tl.int64)
        i_b, i_h = i_bh // Hkv, i_bh % Hkv
        o_m, o_n, o_d = tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, D)[None, :]
        o_q, o_do = o_m[:, None] * sq[2] + o_d, o_m[:, None] * so[2] + o_d
        m_kv = (o_n < Tk)[:, None]
        o_n64 = o_n.to(tl.int64)[:, None]
        b_k = tl.load(k + i_b * sk[0] + i_h * sk[1] + o_n64 * sk[2] + o_d, mask=m_kv, other=0.0)  # [BN, D]
        b_v = tl.load(v + i_b * sv[0] + i_h * sv[1] + o_n64 * sv[2] + o_d, mask=m_kv, other=0.0)  # [BN, D]

        b_dk = tl.zeros([BN, D], tl.float32)
        b_dv = tl.zeros([BN, D], tl.float32)
        start, whole = 0, 0  # queries from start on see a key of this block, those from whole on see all of them
        if CAUSAL:
            start = tl.maximum(i_n * BN - (Tk - Tq), 0) // BM * BM
            whole = tl.minimum(tl.cdiv(tl.maximum(i_n * BN + BN - 1 - (Tk - Tq), 0), BM) * BM, Tq)
        for g in range(G):
            i_row = (i_bh * G + g) * Tq
            p_q = q + i_b * sq[0] + (i_h * G + g) * sq[1]
            p_do = do + i_b * so[0] + (i_h * G + g) * so[1]
            for WHOLE in tl.static_range(0 if CAUSAL else 1, 2):
                for m in range(whole if WHOLE else start, Tq if WHOLE else whole, BM):
                    m_m = m + o_m < Tq
                    m_q = m_m[:, None]
                    m64 = tl.cast(m, tl.int64)
                    b_q = tl.load(p_q + m64 * sq[2] + o_q, mask=m_q, other=0.0)  # [BM, D]
                    b_do = tl.load(p_do + m64 * so[2] + o_do, mask=m_q, other=0.0)  # [BM, D]
                    b_lse = tl.load(lse + i_row + m + o_m, mask=m_m, other=float("inf"))  # inf: p = 0 past the end
                    b_delta = tl.load(delta + i_row + m + o_m, mask=m_m, other=0.0)
                    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BN, BM]
                    if CAP > 0:
                        b_tanh = tanh(b_s * (scale / CAP))
                        b_s = b_tanh * (CAP * LOG2E)
                    else:
                        b_s *= scale * LOG2E
                    b_p = tl.exp2(b_s - b_lse[None, :])  # keys past the end get some p too: their rows are not stored
                    if not WHOLE:
                        b_p = tl.where(o_n[:, None] <= m + o_m[None, :] + Tk - Tq, b_p, 0.0)
                    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
                    b_ds = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision="ieee") - b_delta[None, :])
                    if CAP > 0:
                        b_ds *= 1 - b_tanh * b_tanh
                    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
        o_dk = i_b * sdk[0] + i_h * sdk[1] + o_n64 * sdk[2] + o_d
        tl.store(dk + o_dk, b_dk * scale, mask=m_kv)
        tl.store(dv + o_dk, b_dv, mask=m_kv)

    # (BM, BN, warps, stages) for 16-bit D <= 64, 16-bit D = 128, fp32 D <= 64, fp32 D = 128. None spills on sm_89. At
    # 16-bit D = 128 a block owns 128 rows, 16 for each of 8 warps: with fewer, Triton gives a warp some columns of all
    # rows, and p goes through shared memory. fp32 is "ieee", plain FMAs: on sm_89 three tf32 or six bf16 products would
    # be no faster and need twice the registers.
    TILES = {
        "fwd": ((64, 64, 4, 2), (128, 32, 8, 2), (32, 32, 4, 2), (32, 16, 4, 2)),
        "dq": ((64, 32, 4, 2), (128, 32, 8, 2), (32, 32, 4, 2), (16, 16, 4, 2)),
        "dkv": ((32, 64, 4, 2), (16, 128, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1)),
    }

    def config(kernel, q):
        D = q.shape[3]
        BM, BN, warps, stages = TILES[kernel][2 * (q.dtype == torch.float32) + (D > 64)]
        if kernel == "fwd" and q.shape[2] <= 16:  # decoding
            BM, warps = 16, 4
        return dict(D=D, BM=BM, BN=BN, num_warps=warps, num_stages=stages)

    def empty(x):
        """Like x (B, H, T, D), as a view of a contiguous (B, T, H, D)."""
        B, H, T, D = x.shape
        return x.new_empty(B, T, H, D).transpose(1, 2)

    def rows(*tensors):
        """A last dimension that is not contiguous is made so; other strides are the kernels' business."""
        return [x if x.stride(3) == 1 else x.contiguous() for x in tensors]

    @custom_op("kernels::attention", mutates_args=())
    def attention_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float,
                     softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
        """-> o, lse (base 2)."""
        (B, H, Tq, _), (_, Hkv, Tk, _) = q.shape, k.shape
        q, k, v = rows(q, k, v)
        o, lse = empty(q), torch.empty(B, H, Tq, dtype=torch.float32, device=q.device)
        how = config("fwd", q)
        attention_fwd_kernel[(triton.cdiv(Tq, how["BM"]) * B * H,)](
            q, k, v, o, lse, q.stride(), k.stride(), v.stride(), o.stride(), H, H // Hkv, Tq, Tk, scale,
            CAP=softcap, CAUSAL=causal, **how)
        return o, lse

    @attention_op.register_fake
    def _(q, k, v, causal, scale, softcap):
        return empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    @custom_op("kernels::attention_bwd", mutates_args=())
    def attention_bwd_op(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
                         lse: torch.Tensor, causal: bool, scale: float,
                         softcap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> dq, dk, dv. The first kernel writes delta, which the second reads."""
        (B, H, Tq, _), (_, Hkv, Tk, _) = q.shape, k.shape
        q, k, v = rows(q, k, v)
        do, o = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (do, o))  # a copy only if laid out otherwise
        dq, dk, dv, delta = empty(q), empty(k), empty(v), torch.empty_like(lse)
        strides = (q.stride(), k.stride(), v.stride(), o.stride())
        how = config("dq", q)
        attention_bwd_dq_kernel[(triton.cdiv(Tq, how["BM"]) * B * H,)](
            q, k, v, o, do, lse, delta, dq, *strides, H, H // Hkv, Tq, Tk, scale, CAP=softcap, CAUSAL=causal, **how)
        how = config("dkv", q)
        attention_bwd_dkv_kernel[(triton.cdiv(Tk, how["BN"]) * B * Hkv,)](
            q, k, v, do, lse, delta, dk, dv, *strides, dk.stride(), Hkv, H // Hkv, Tq, Tk, scale,
            CAP=softcap, CAUSAL=causal, **how)
        return dq, dk, dv

    @attention_bwd_op.register_fake
    def _(do, q, k, v, o, lse, causal, scale, softcap):
        return empty(q), empty(k), empty(v)

    def save_for_backward(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.options = inputs[3:]
        ctx.set_materialize_grads(False)  # lse brings no gradient: not a tensor of zeros to write

    attention_op.register_autograd(
        lambda ctx, do, _: (*attention_bwd_op(do, *ctx.saved_tensors, *ctx.options), None, None, None),
        setup_context=save_for_backward)

    def attention_triton(q, k, v, causal, scale, softcap):
        if torch.is_autocast_enabled(q.device.type):
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
        if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"attention: q {q.dtype}, k {k.dtype}, v {v.dtype}; expected one of "
                             "float32, bfloat16, float16 for all")
        D = q.shape[3]
        scale = D ** -0.5 if scale is None else float(scale)
        fill = max(32, triton.next_power_of_2(D)) - D
        if fill:  # zeros make a head of 80 or 96 one of 128: masks along D cost narrow loads and registers, which spill
            q, k, v = (torch.nn.functional.pad(x, (0, fill)) for x in (q, k, v))
        if not k.shape[2]:  # nothing to attend to: 0, as a sum over no keys
            return torch.zeros_like(q)[..., :D]
        return attention_op(q, k, v, causal, scale, float(softcap))[0][..., :D]


def attention(q, k, v, causal=True, scale=None, softcap=0.0):
    """q (B, H, Tq, D), k and v (B, Hkv, Tk, D), H % Hkv == 0 -> (B, H, Tq, D) in q's (or autocast's) dtype.

    causal: query i sees the keys j <= i + Tk - Tq, so that with a KV cache the last query sees all. scale: None is 1
    / sqrt(D). softcap > 0 bounds the scores by +-softcap. D > 128 goes to PyTorch's own attention. ValueError:
    shapes or (GPU) dtypes that do not fit, or causal with more queries than keys, where the first ones would see
    nothing."""
    B, H, Tq, D = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (B, D) or H % k.shape[1]:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected "
                         "(B, H, Tq, D) and twice (B, Hkv, Tk, D), H a multiple of Hkv")
    if causal and k.shape[2] < Tq:
        raise ValueError(f"attention: causal with {Tq} queries but only {k.shape[2]} keys: the first would see none")
    which = form(q)
    if which == "triton" and D <= 128:
        return attention_triton(q, k, v, causal, scale, softcap)
    return (attention_ref if which == "ref" else attention_torch)(q, k, v, causal, scale, softcap)
