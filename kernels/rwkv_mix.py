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
arithmetic is fp32, so autocast changes one thing: token_shift's results, which products take, are bf16 then already.
All are memory-bound. Autograd would keep up to ten tensors (B, T, C) for each of them; here the inputs are kept (most
of them are what a product beside it keeps anyway), squared_relu keeps its output, since 2 max(k, 0) = 2 sqrt(y).

CPU: a loop in C for each, fp32 or bf16; without a compiler, in fp64 and under torch.compile the definition, whose
results autocast turns into bf16 later.

Bytes, E per element, n = B T C: token_shift with M mixes reads n and writes M n forward (h_{t-1} is the row before, in
the cache); backward reads (1 + M) n and writes n; gates 7 and 10 n, readout 6 and 11 n, squared_relu 2 and 3 n: the
floor. Parameters' gradients: one fp32 row for every 128 tokens (token_shift: 16), summed in a fixed order.
"""
import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

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


SOURCE = r"""
/* Each thread has a run of the M = B T rows of C; sums (parts, ...) are its rows of the parameters' gradients. */
#define ROWS(p, parts, M) num first = p * ((M + parts - 1) / parts), last_row = (p + 1) * ((M + parts - 1) / parts), \
    end = last_row < M ? last_row : M

static void row_before(const void *h, const void *last, num l16, num m, num T, num C, num x16, float *to) {
    if (m % T) get(h, x16, (m - 1) * C, C, to);
    else if (last) get(last, l16, m / T * C, C, to);
    else memset(to, 0, 4 * C);
}

void shift(const void *h, const void *last, const float **mus, void **xs, num n, num parts, num M, num T, num C,
           num x16, num l16, num y16) {
    #pragma omp parallel for schedule(static) if (parts > 1)
    for (num p = 0; p < parts; p++) {
        ROWS(p, parts, M);
        for (num m = first; m < end; m++) {
            float x[C], d[C], y[C];
            get(h, x16, m * C, C, x);
            row_before(h, last, l16, m, T, C, x16, d);
            for (num c = 0; c < C; c++) d[c] -= x[c];
            for (num i = 0; i < n; i++) {
                for (num c = 0; c < C; c++) y[c] = x[c] + d[c] * mus[i][c];
                put(y, C, y16, xs[i], m * C);
            }
        }
    }
}

/* dh_t = sum of dx_t (1 - mu) + dx_{t+1} mu: from the last token down, each dx is read once. sums (parts, n, C) */
void shift_backward(const void *h, const void *last, const float **mus, const void **dxs, void *dh, void *dlast,
                    float *sums, num n, num parts, num M, num T, num C, num x16, num l16, num y16) {
    #pragma omp parallel for schedule(static) if (parts > 1)
    for (num p = 0; p < parts; p++) {
        ROWS(p, parts, M);
        float *dmu = sums + p * n * C, x[C], d[C], g[C], dx[C], after[C];
        memset(dmu, 0, 4 * n * C);
        memset(after, 0, 4 * C);
        for (num i = 0; i < n && end < M && end % T; i++) {  /* the row after this thread's last one */
            get(dxs[i], y16, end * C, C, dx);
            for (num c = 0; c < C; c++) after[c] += dx[c] * mus[i][c];
        }
        for (num m = end - 1; m >= first; m--) {
            get(h, x16, m * C, C, x);
            row_before(h, last, l16, m, T, C, x16, d);
            for (num c = 0; c < C; c++) d[c] -= x[c];
            if ((m + 1) % T == 0) memset(after, 0, 4 * C);
            memcpy(g, after, sizeof g);
            memset(after, 0, 4 * C);
            for (num i = 0; i < n; i++) {
                get(dxs[i], y16, m * C, C, dx);
                for (num c = 0; c < C; c++) {
                    float through = dx[c] * mus[i][c];
                    g[c] += dx[c] - through;
                    after[c] += through;
                    dmu[i * C + c] += dx[c] * d[c];
                }
            }
            put(g, C, x16, dh, m * C);
            if (m % T == 0 && dlast) put(after, C, l16, dlast, m / T * C);
        }
    }
}

/* of one head: p = k k_k, kappa = p / |p|; returns |p| */
static float unit(const float *k, const float *kk, float *kappa, num N) {
    float square = 0;
    #pragma omp simd reduction(+:square)
    for (num j = 0; j < N; j++) kappa[j] = k[j] * kk[j], square += kappa[j] * kappa[j];
    float length = fmaxf(sqrtf(square), 1e-12f);
    for (num j = 0; j < N; j++) kappa[j] /= length;
    return length;
}

void gates(const void *k, const void *w, const void *a, const float *k_k, const float *k_a, void *w_out, void *k_out,
           void *minus, void *b_out, num parts, num M, num C, num N, num x16) {
    #pragma omp parallel for schedule(static) if (parts > 1)
    for (num p = 0; p < parts; p++) {
        ROWS(p, parts, M);
        for (num m = first; m < end; m++) {
            float x[C], s[C], kappa[C], y[C];
            get(w, x16, m * C, C, s);
            for (num c = 0; c < C; c++) y[c] = FASTEST * sigmoid(s[c]);
            put(y, C, x16, w_out, m * C);
            get(k, x16, m * C, C, x);
            get(a, x16, m * C, C, s);
            for (num c = 0; c < C; c++) {
                s[c] = sigmoid(s[c]);
                y[c] = x[c] * (1 + (s[c] - 1) * k_a[c]);
            }
            put(y, C, x16, k_out, m * C);
            for (num j = 0; j < C; j += N) unit(x + j, k_k + j, kappa + j, N);
            for (num c = 0; c < C; c++) y[c] = kappa[c] * s[c], kappa[c] = -kappa[c];
            put(kappa, C, x16, minus, m * C);
            put(y, C, x16, b_out, m * C);
        }
    }
}

/* dkappa = a db - dminus,  dp = (dkappa - kappa (kappa . dkappa)) / |p|. sums (parts, 2, C): k_k, k_a */
void gates_backward(const void *k, const void *w, const void *a, const float *k_k, const float *k_a,
                    const void *dw_out, const void *dk_out, const void *dminus, const void *db, void *dk, void *dw,
                    void *da, float *sums, num parts, num M, num C, num N, num x16) {
    #pragma omp parallel for schedule(static) if (parts > 1)
    for (num p = 0; p < parts; p++) {
        ROWS(p, parts, M);
        float *dkk = sums + p * 2 * C, *dka = dkk + C, x[C], s[C], g[C], kappa[C], b[C], t[C];
        memset(dkk, 0, 8 * C);
        for (num m = first; m < end; m++) {
            get(w, x16, m * C, C, s);
            get(dw_out, x16, m * C, C, g);
            for (num c = 0; c < C; c++) s[c] = sigmoid(s[c]), g[c] *= FASTEST * s[c] * (1 - s[c]);
            put(g, C, x16, dw, m * C);
            get(k, x16, m * C, C, x);
            get(a, x16, m * C, C, s);
            get(dk_out, x16, m * C, C, g);
            get(dminus, x16, m * C, C, t);
            get(db, x16, m * C, C, b);
            for (num c = 0; c < C; c++) s[c] = sigmoid(s[c]), t[c] = b[c] * s[c] - t[c];
            for (num j = 0; j < C; j += N) {
                float length = unit(x + j, k_k + j, kappa + j, N), dot = 0, *u = kappa + j, *v = t + j;
                #pragma omp simd reduction(+:dot)
                for (num i = 0; i < N; i++) dot += u[i] * v[i];
                for (num i = 0; i < N; i++) v[i] = (v[i] - u[i] * dot) / length;
            }
            for (num c = 0; c < C; c++) {
                dkk[c] += t[c] * x[c];
                dka[c] += g[c] * x[c] * (s[c] - 1);
                t[c] = t[c] * k_k[c] + g[c] * (1 + (s[c] - 1) * k_a[c]);
                g[c] = (g[c] * x[c] * k_a[c] + b[c] * kappa[c]) * s[c] * (1 - s[c]);
            }
            put(t, C, x16, dk, m * C);
            put(g, C, x16, da, m * C);
        }
    }
}

/* of one head: y becomes norm(y); returns 1 / deviation, and in bonus the sum of r k rho */
static float normed(float *y, const float *r, const float *k, const float *rho, num N, float *bonus) {
    float mean = 0, var = 0, dot = 0;
    #pragma omp simd reduction(+:mean, dot)
    for (num j = 0; j < N; j++) mean += y[j], dot += r[j] * k[j] * rho[j];
    mean /= N;
    #pragma omp simd reduction(+:var)
    for (num j = 0; j < N; j++) y[j] -= mean, var += y[j] * y[j];
    float rstd = 1 / sqrtf(var / N + EPS);
    for (num j = 0; j < N; j++) y[j] *= rstd;
    *bonus = dot;
    return rstd;
}

void readout(const void *y, const void *r, const void *k, const void *v, const void *g, const float *rho,
             const float *weight, const float *bias, void *out, num parts, num M, num C, num N, num x16) {
    #pragma omp parallel for schedule(static) if (parts > 1)
    for (num p = 0; p < parts; p++) {
        ROWS(p, parts, M);
        for (num m = first; m < end; m++) {
            float n[C], b[C], f[4][C], bonus;
            get(y, x16, m * C, C, n);
            get(r, x16, m * C, C, f[0]);
            get(k, x16, m * C, C, f[1]);
            get(v, x16, m * C, C, f[2]);
            get(g, x16, m * C, C, f[3]);
            for (num j = 0; j < C; j += N) {
                normed(n + j, f[0] + j, f[1] + j, rho + j, N, &bonus);
                for (num i = j; i < j + N; i++) b[i] = bonus;
            }
            for (num c = 0; c < C; c++) n[c] = (n[c] * weight[c] + bias[c] + b[c] * f[2][c]) * f[3][c];
            put(n, C, x16, out, m * C);
        }
    }
}

/* n = (y - mean) rstd: dy = rstd (dn - mean(dn) - n mean(dn n)). sums (parts, 3, C): rho, weight, bias */
void readout_backward(const void *y, const void *r, const void *k, const void *v, const void *g, const float *rho,
                      const float *weight, const float *bias, const void *dout, void *dy, void *dr, void *dk, void *dv,
                      void *dg, float *sums, num parts, num M, num C, num N, num x16) {
    #pragma omp parallel for schedule(static) if (parts > 1)
    for (num p = 0; p < parts; p++) {
        ROWS(p, parts, M);
        float *drho = sums + p * 3 * C, *dweight = drho + C, *dbias = dweight + C;
        float n[C], f[4][C], o[C];
        memset(drho, 0, 12 * C);
        for (num m = first; m < end; m++) {
            get(y, x16, m * C, C, n);
            get(r, x16, m * C, C, f[0]);
            get(k, x16, m * C, C, f[1]);
            get(v, x16, m * C, C, f[2]);
            get(g, x16, m * C, C, f[3]);
            get(dout, x16, m * C, C, o);
            for (num j = 0; j < C; j += N) {
                float bonus, rstd = normed(n + j, f[0] + j, f[1] + j, rho + j, N, &bonus), ds = 0, mean = 0, dot = 0;
                #pragma omp simd reduction(+:ds, mean, dot)
                for (num i = j; i < j + N; i++) {
                    float t = o[i], dn;
                    o[i] = t * f[3][i];  /* of what g multiplies */
                    f[3][i] = t * (n[i] * weight[i] + bias[i] + bonus * f[2][i]);
                    ds += o[i] * f[2][i];
                    f[2][i] = o[i] * bonus;
                    dn = o[i] * weight[i];
                    mean += dn, dot += dn * n[i];
                }
                mean /= N, dot /= N;
                for (num i = j; i < j + N; i++) {
                    float t = ds * rho[i], r_i = f[0][i];
                    drho[i] += ds * r_i * f[1][i];
                    dweight[i] += o[i] * n[i];
                    dbias[i] += o[i];
                    n[i] = rstd * (o[i] * weight[i] - mean - n[i] * dot);
                    f[0][i] = t * f[1][i];
                    f[1][i] = t * r_i;
                }
            }
            put(n, C, x16, dy, m * C);
            put(f[0], C, x16, dr, m * C);
            put(f[1], C, x16, dk, m * C);
            put(f[2], C, x16, dv, m * C);
            put(f[3], C, x16, dg, m * C);
        }
    }
}

void relu2(const void *x, void *y, num size, num x16) {
    #pragma omp parallel for schedule(static) if (size > 16384)
    for (num at = 0; at < size; at += RUN) {
        num n = size - at < RUN ? size - at : RUN;
        float room[RUN], out[RUN], *o = x16 ? out : (float *)y + at;
        const float *a = see(x, x16, at, n, room);
        #pragma omp simd
        for (num i = 0; i < n; i++) o[i] = a[i] > 0 ? a[i] * a[i] : 0;
        if (x16) put(o, n, 1, y, at);
    }
}

void relu2_backward(const void *y, const void *dy, void *dx, num size, num x16) {
    #pragma omp parallel for schedule(static) if (size > 16384)
    for (num at = 0; at < size; at += RUN) {
        num n = size - at < RUN ? size - at : RUN;
        float room[2][RUN], out[RUN], *o = x16 ? out : (float *)dx + at;
        const float *a = see(y, x16, at, n, room[0]), *d = see(dy, x16, at, n, room[1]);
        #pragma omp simd
        for (num i = 0; i < n; i++) o[i] = 2 * sqrtf(a[i]) * d[i];
        if (x16) put(o, n, 1, dx, at);
    }
}
"""


def compiles(*tensors):
    """Whether SOURCE can serve: on a CPU, fp32 or bf16, and those of (B, T, C) alike."""
    return (tensors[0].is_cpu and tensors[0].dtype in (torch.float32, torch.bfloat16)
            and len({t.dtype for t in tensors}) == 1 and not torch.compiler.is_compiling() and library() is not None)


@functools.cache
def library():
    return compiled(f"static const float FASTEST = {FASTEST!r}f, EPS = {EPS}f;" + SOURCE)


def split(x):
    """-> parts (one a thread; one alone for a few rows), M = B T."""
    M = x.numel() // x.shape[-1]
    return torch.get_num_threads() if M > 8 else 1, M


def floats(*tensors):
    return [t.float().contiguous() for t in tensors]


class CompiledShift(torch.autograd.Function):
    """Its outputs, which products take, are of autocast's dtype."""

    @staticmethod
    def forward(ctx, h, last, *mus):
        h, last = h.contiguous(), None if last is None else last.contiguous()
        dtype = torch.bfloat16 if narrow(h) else h.dtype
        wide, xs = floats(*mus), [torch.empty_like(h, dtype=dtype) for _ in mus]
        ctx.how = len(mus), *split(h), *h.shape[1:], *(int(t is not None and t.dtype == torch.bfloat16)
                                                       for t in (h, last, xs[0]))
        call(library().shift, h, last, wide, xs, *ctx.how)
        ctx.save_for_backward(h, last, *mus)
        return tuple(xs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dxs):
        h, last, *mus = ctx.saved_tensors
        dh, dlast = torch.empty_like(h), None if last is None else torch.empty_like(last)
        sums = h.new_empty(ctx.how[1], len(mus), h.shape[-1], dtype=torch.float32)
        call(library().shift_backward, h, last, floats(*mus), [dx.contiguous() for dx in dxs], dh, dlast, sums,
             *ctx.how)
        return dh, dlast, *(d.view_as(mu).to(mu.dtype) for d, mu in zip(sums.sum(0), mus))


class CompiledGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, w, a, k_k, k_a, N):
        k, w, a = (t.contiguous() for t in (k, w, a))
        ctx.how = *split(k), k.shape[-1], N, int(k.dtype == torch.bfloat16)
        outs = [torch.empty_like(k) for _ in range(4)]
        call(library().gates, k, w, a, *floats(k_k, k_a), *outs, *ctx.how)
        ctx.save_for_backward(k, w, a, k_k, k_a)
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *douts):
        k, w, a, k_k, k_a = ctx.saved_tensors
        grads = [torch.empty_like(k) for _ in range(3)]
        sums = k.new_empty(ctx.how[0], 2, k.shape[-1], dtype=torch.float32)
        call(library().gates_backward, k, w, a, *floats(k_k, k_a), *(d.contiguous() for d in douts), *grads, sums,
             *ctx.how)
        return *grads, *(d.view_as(t).to(t.dtype) for d, t in zip(sums.sum(0), (k_k, k_a))), None


class CompiledReadout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        tensors, params = [t.contiguous() for t in args[:5]], args[5:]
        out = torch.empty_like(tensors[-1])
        ctx.how = *split(out), out.shape[-1], params[0].shape[1], int(out.dtype == torch.bfloat16)
        call(library().readout, *tensors, *floats(*params), out, *ctx.how)
        ctx.save_for_backward(*tensors, *params)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        *tensors, rho, weight, bias = ctx.saved_tensors
        grads, params = [torch.empty_like(t) for t in tensors], (rho, weight, bias)
        sums = dout.new_empty(ctx.how[0], 3, dout.shape[-1], dtype=torch.float32)
        call(library().readout_backward, *tensors, *floats(*params), dout.contiguous(), *grads, sums, *ctx.how)
        return *grads, *(d.view_as(p).to(p.dtype) for d, p in zip(sums.sum(0), params))


class CompiledSquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k):
        k = k.contiguous()
        y = torch.empty_like(k)
        call(library().relu2, k, y, k.numel(), int(k.dtype == torch.bfloat16))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        dk = torch.empty_like(y)
        call(library().relu2_backward, y, dy.contiguous(), dk, y.numel(), int(y.dtype == torch.bfloat16))
        return dk


def narrow(h):
    """Whether autocast makes products take bf16 of fp32's h: then token_shift writes that, and no cast follows."""
    kind = h.device.type
    return (h.dtype == torch.float32 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
            and torch.get_autocast_dtype(kind) == torch.bfloat16)


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
            b_x = tl.where(b_x < 0, 0.0, b_x)  # a maximum would hide a NaN
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

    @custom_op("kernels::token_shift", mutates_args=())
    def token_shift_op(h: torch.Tensor, last: torch.Tensor | None, mus: Tensors, narrow: bool) -> Tensors:
        grid, how = shift_grid(h)
        xs = [torch.empty_like(h, dtype=torch.bfloat16 if narrow else h.dtype) for _ in mus]
        shift_fwd_kernel[grid](h, last, tuple(mus), tuple(xs), *h.shape[1:], M=len(mus), **how)
        return xs

    @custom_op("kernels::token_shift_bwd", mutates_args=())
    def token_shift_bwd_op(h: torch.Tensor, last: torch.Tensor | None, mus: Tensors, dxs: Tensors) -> Tensors:
        """-> dh, and (M, C) of all mus."""
        grid, how = shift_grid(h)
        dh, dmu = h.new_empty(h.shape), h.new_empty(len(mus), grid[1] * grid[2], h.shape[2], dtype=torch.float32)
        shift_bwd_kernel[grid](h, last, tuple(mus), tuple(dxs), dh, dmu, *h.shape[1:], M=len(mus), **how)
        return [dh, dmu.sum(1)]

    @custom_op("kernels::rwkv_gates", mutates_args=())
    def gates_op(k: torch.Tensor, w: torch.Tensor, a: torch.Tensor, k_k: torch.Tensor, k_a: torch.Tensor,
                 N: int) -> Tensors:
        grid, sizes, how = head_grid(k, N)
        outs = [k.new_empty(k.shape) for _ in range(4)]
        gates_fwd_kernel[grid](k, w, a, k_k, k_a, *outs, *sizes, FASTEST=FASTEST, **how)
        return outs

    @custom_op("kernels::rwkv_gates_bwd", mutates_args=())
    def gates_bwd_op(k: torch.Tensor, w: torch.Tensor, a: torch.Tensor, k_k: torch.Tensor, k_a: torch.Tensor, N: int,
                     douts: Tensors) -> Tensors:
        """-> dk, dw, da, and (2, C) for k_k and k_a."""
        grid, (R, C), how = head_grid(k, N)
        grads, dparams = [k.new_empty(k.shape) for _ in range(3)], k.new_empty(2, grid[1], C, dtype=torch.float32)
        gates_bwd_kernel[grid](k, w, a, k_k, k_a, *douts, *grads, dparams, R, C, FASTEST=FASTEST, **how)
        return [*grads, dparams.sum(1)]

    @custom_op("kernels::rwkv_readout", mutates_args=())
    def readout_op(y: torch.Tensor, r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
                   rho: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        grid, sizes, how = head_grid(g, rho.shape[1])
        out = g.new_empty(g.shape)
        readout_fwd_kernel[grid](y, r, k, v, g, rho, weight, bias, out, *sizes, EPS=EPS, **how)
        return out

    @custom_op("kernels::rwkv_readout_bwd", mutates_args=())
    def readout_bwd_op(y: torch.Tensor, r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
                       rho: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dout: torch.Tensor) -> Tensors:
        """-> dy, dr, dk, dv, dg, and (3, C) for rho, weight and bias."""
        grid, (R, C), how = head_grid(g, rho.shape[1])
        grads, dparams = ([x.new_empty(x.shape) for x in (y, r, k, v, g)],
                          g.new_empty(3, grid[1], C, dtype=torch.float32))
        readout_bwd_kernel[grid](y, r, k, v, g, rho, weight, bias, dout, *grads, dparams, R, C, EPS=EPS, **how)
        return [*grads, dparams.sum(1)]

    @custom_op("kernels::squared_relu", mutates_args=())
    def squared_relu_op(x: torch.Tensor, dy: torch.Tensor | None) -> torch.Tensor:
        """max(x, 0)^2; with dy, x being that square: the gradient of what it is the square of."""
        out = x.new_empty(x.shape)
        relu2_kernel[(triton.cdiv(x.numel(), 1024),)](x, dy, out, x.numel(), BLOCK=1024, num_warps=4)
        return out

    like = lambda *ts: [t.new_empty(t.shape) for t in ts]
    fp32 = lambda x, n: x.new_empty(n, x.shape[-1], dtype=torch.float32)
    token_shift_op.register_fake(
        lambda h, last, mus, narrow: [torch.empty_like(h, dtype=torch.bfloat16 if narrow else h.dtype) for _ in mus])
    token_shift_bwd_op.register_fake(lambda h, last, mus, dxs: [*like(h), fp32(h, len(mus))])
    gates_op.register_fake(lambda k, *_: like(k, k, k, k))
    gates_bwd_op.register_fake(lambda k, *_: [*like(k, k, k), fp32(k, 2)])
    readout_op.register_fake(lambda y, r, k, v, g, *_: g.new_empty(g.shape))
    readout_bwd_op.register_fake(lambda y, r, k, v, g, *_: [*like(y, r, k, v, g), fp32(g, 3)])
    squared_relu_op.register_fake(lambda x, dy: x.new_empty(x.shape))

    def save_inputs(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def save_shift(ctx, inputs, output):
        h, last, mus, _ = inputs
        ctx.save_for_backward(h, last, *mus)

    def token_shift_backward(ctx, dxs):
        h, last, *mus = ctx.saved_tensors
        dh, dmu = token_shift_bwd_op(h, last, mus, [dx.contiguous() for dx in dxs])
        dlast = None
        if last is not None:
            dlast = sum(dx[:, 0].float() * mu[0] for dx, mu in zip(dxs, mus)).to(last.dtype)
        return dh, dlast, [d.view(mu.shape).to(mu.dtype) for d, mu in zip(dmu, mus)], None

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

    token_shift_op.register_autograd(token_shift_backward, setup_context=save_shift)
    gates_op.register_autograd(gates_backward, setup_context=save_gates)
    readout_op.register_autograd(readout_backward, setup_context=save_inputs)
    squared_relu_op.register_autograd(
        lambda ctx, dy: (squared_relu_op(ctx.saved_tensors[0], dy.contiguous()), None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output))


def token_shift(h, last, mus):
    """h (B, T, C), last (B, C) or None, mus: some (1, 1, C) -> as many mixes (B, T, C)."""
    which = form(h)
    if which == "triton":
        return token_shift_op(h.contiguous(), None if last is None else last.contiguous(), list(mus), narrow(h))
    if which == "torch" and h.shape[1] == 1 and last is not None:  # of one token all mixes are one operation
        return torch.lerp(h, last[:, None].to(h.dtype), torch.stack(mus).to(h.dtype)).unbind()
    return CompiledShift.apply(h, last, *mus) if which == "torch" and compiles(h) else token_shift_ref(h, last, mus)


def gates(k, w, a, k_k, k_a, N):
    """k, w, a (B, T, C), k_k, k_a (1, 1, C), heads of N -> w', k', -kappa, a' kappa (B, T, C)."""
    which = form(k)
    if which == "triton":
        return gates_op(k.contiguous(), w.contiguous(), a.contiguous(), k_k, k_a, N)
    op = CompiledGates.apply if which == "torch" and compiles(k, w, a) else gates_ref
    return op(k, w, a, k_k, k_a, N)


def readout(y, r, k, v, g, rho, weight, bias):
    """y, r, k, v, g (B, T, C), rho (H, N), weight, bias (C,) -> (B, T, C) in g's dtype."""
    which = form(g)
    if which == "triton":
        return readout_op(*(x.contiguous() for x in (y, r, k, v, g)), rho, weight, bias)
    op = CompiledReadout.apply if which == "torch" and compiles(y, r, k, v, g) else readout_ref
    return op(y, r, k, v, g, rho, weight, bias)


def squared_relu(k):
    """max(k, 0)^2."""
    which = form(k)
    if which == "triton":
        return squared_relu_op(k.contiguous(), None)
    fast = which == "torch" and k.numel() > 4096 and compiles(k)
    return CompiledSquaredReLU.apply(k) if fast else squared_relu_ref(k)
