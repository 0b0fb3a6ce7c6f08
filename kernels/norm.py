"""
LayerNorm and RMSNorm, alone or fused with the residual add before them; adaLN's modulation; GroupNorm with SiLU
    Ba, Kiros & Hinton 2016, arXiv:1607.06450 (eq. 4);  Zhang & Sennrich 2019, arXiv:1910.07467 (eq. 4)
    Peebles & Xie 2022, arXiv:2212.09748 (adaLN-zero);  Wu & He 2018, arXiv:1803.08494 (GroupNorm)

    layer_norm       n = (x - mean(x)) rstd,   rstd = 1 / sqrt(mean((x - mean(x))^2) + eps),   y = n w + b
    rms_norm         n = x rstd,               rstd = 1 / sqrt(mean(x^2) + eps),               y = n w
    add_layer_norm,  s = x + r, then the same on s; returns (y, s): s is the residual stream, which goes on
    add_rms_norm
    backward         g = w dy;  dx = rstd (g - mean(g) - n mean(g n)) + ds;  dw = sum_rows dy n;  db = sum_rows dy
                     (rms_norm: no mean(g).  ds: what comes back along the stream.  dr = dx.)

Shapes: x, r (..., C), w, b (C,); C <= 8192. fp32, bf16 or fp16; w and b may be fp32 beside a 16-bit x. y and s have
the dtype of x (of x + r). All arithmetic is fp32 whatever the tensors are, so autocast changes nothing: a 16-bit x
gives a 16-bit y.

Saved for backward: x (or s), w and rstd (LayerNorm: mean too), 4 or 8 bytes a row. n is recomputed.
Bytes: forward reads x, w, b and writes y (add: reads r, writes s too) once, which is the floor, and w and b again for
each of at most 2 programs per multiprocessor. Backward reads dy, x (and ds) and writes dx once, and each program writes
its sums for dw and db, which PyTorch adds up in a fixed order: results repeat bit for bit. (1024, 768) in bf16 moves
1.04 (without b) to 1.09 times the floor forward, 1.05 to 1.10 backward; more rows, less.
FLOPs: about 8 an element forward, 12 backward: memory is the bound on every GPU. It is on a CPU, too, where they are
loops in C (but LayerNorm alone, which is PyTorch's): one pass over the rows each way.

    modulate         y = n (1 + scale) + shift, n as in layer_norm; shift and scale (B, C) are a sample's, x (B, T, C)
    add_modulate     s = x + gate r, then the same on s; returns (y, s)
    backward         g = (1 + scale) dy, dx as above;  dr = gate dx;
                     dshift, dscale, dgate = sums over a sample's rows of dy, dy n, dx r
Saved: x (or s, and r and gate), scale, mean and rstd. Programs stay within a sample: each reads shift, scale and gate
once, and in backward writes its sums of them. Every other tensor is read or written once, which is the floor.

    group_norm_silu  z = n w + b, n over the C / groups channels and all pixels of a group of a sample;  y = z sigma(z)
    backward         dz = dy sigma(z) (1 + z (1 - sigma(z))), then as above with means over the group
Saved: x, w, b, mean and rstd; z is recomputed. A program does a group: up to 4,096 numbers are read once; more are read
twice (x forward, x and dy backward), the second time from the cache: they are what the program has just read, 80 kB for
10 channels of 64 x 64 in bf16.
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


def layer_norm_ref(x, w, b=None, eps=1e-5):
    """The definition; fp32 inside, fp64 for fp64."""
    h = x if x.dtype == torch.float64 else x.float()
    h = h - h.mean(-1, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * w
    return (y if b is None else y + b).to(x.dtype)


def rms_norm_ref(x, w, eps=1e-6):
    """The definition; fp32 inside, fp64 for fp64."""
    h = x if x.dtype == torch.float64 else x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * w).to(x.dtype)


def layer_norm_torch(x, w, b=None, eps=1e-5):
    if w.dtype == x.dtype:
        return torch.nn.functional.layer_norm(x, w.shape, w, b, eps).to(x.dtype)  # .to: under autocast it returns fp32
    b = None if b is None else b.float()
    return torch.nn.functional.layer_norm(x.float(), w.shape, w.float(), b, eps).to(x.dtype)


def rms_norm_torch(x, w, eps=1e-6):
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.rms_norm(x.to(wide), w.shape, w.to(wide), eps).to(x.dtype)


# All norms of this file but GroupNorm, for a CPU: the formulas at the top, in one pass over the rows. They come in
# parts: samples, with a w, b and gate of their own (adaLN), or each thread's share of the rows. ..16: is it bf16?
SOURCE = r"""
/* stats (M, 2): mean and rstd. own: C where a part has its own w, b and gate, else 0 */
void forward(const void *x, const void *r, const float *gate, const float *w, const float *b, void *y, void *s,
             float *stats, num parts, num M, num C, num own, const float *eps, num center, num x16, num r16, num y16) {
    num T = (M + parts - 1) / parts;
    #pragma omp parallel for schedule(static)
    for (num p = 0; p < parts; p++)
        for (num m = p * T; m < M && m < (p + 1) * T; m++) {
            float v[C], u[C], mean = 0, var = 0;
            const float *w_p = w + p * own, *b_p = b + p * own, *g_p = gate + p * own;
            get(x, x16, m * C, C, v);
            if (r) {
                get(r, r16, m * C, C, u);
                if (gate) for (num c = 0; c < C; c++) v[c] += g_p[c] * u[c];
                else for (num c = 0; c < C; c++) v[c] += u[c];
                put(v, C, y16, s, m * C);
                if (y16) get(s, 1, m * C, C, v);  /* s as it is stored */
            }
            #pragma omp simd reduction(+:mean)
            for (num c = 0; c < C; c++) mean += v[c];
            mean = center ? mean / C : 0;
            #pragma omp simd reduction(+:var)
            for (num c = 0; c < C; c++) var += (v[c] - mean) * (v[c] - mean);
            float rstd = 1 / sqrtf(var / C + *eps);
            if (b) for (num c = 0; c < C; c++) v[c] = (v[c] - mean) * rstd * w_p[c] + b_p[c];
            else for (num c = 0; c < C; c++) v[c] = (v[c] - mean) * rstd * w_p[c];
            put(v, C, y16, y, m * C);
            stats[2 * m] = mean, stats[2 * m + 1] = rstd;
        }
}

/* sums (parts, 3, C): dw, db, dgate. dr: where it is not dx; r: where there is a gate */
void backward(const void *dy, const void *ds, const void *s, const void *r, const float *gate, const float *w,
              const float *stats, void *dx, void *dr, float *sums, num parts, num M, num C, num own, num center,
              num x16, num r16, num y16) {
    num T = (M + parts - 1) / parts;
    #pragma omp parallel for schedule(static)
    for (num p = 0; p < parts; p++) {
        float *dw = sums + p * 3 * C, *db = dw + C, *dg = db + C;
        const float *w_p = w + p * own, *g_p = gate + p * own;
        memset(dw, 0, 12 * C);
        for (num m = p * T; m < M && m < (p + 1) * T; m++) {
            float n[C], g[C], u[C], mean_g = 0, mean_gn = 0, mean = stats[2 * m], rstd = stats[2 * m + 1];
            get(s, y16, m * C, C, n);
            get(dy, y16, m * C, C, g);
            #pragma omp simd reduction(+:mean_g, mean_gn)
            for (num c = 0; c < C; c++) {
                n[c] = (n[c] - mean) * rstd;
                dw[c] += g[c] * n[c], db[c] += g[c];
                g[c] *= w_p[c];
                mean_g += g[c], mean_gn += g[c] * n[c];
            }
            mean_g = center ? mean_g / C : 0, mean_gn /= C;
            for (num c = 0; c < C; c++) g[c] = rstd * (g[c] - mean_g - n[c] * mean_gn);
            if (ds) {
                get(ds, y16, m * C, C, u);
                for (num c = 0; c < C; c++) g[c] += u[c];
            }
            put(g, C, x16, dx, m * C);
            if (gate) {
                get(r, r16, m * C, C, u);
                for (num c = 0; c < C; c++) dg[c] += g[c] * u[c], g[c] *= g_p[c];
            }
            if (dr) put(g, C, r16, dr, m * C);
        }
    }
}
"""


class CompiledNorm(torch.autograd.Function):
    """-> y, or with r: y, s. w, b and gate (C,), or (B, C) for x (B, T, C)."""

    @staticmethod
    def forward(ctx, x, r, gate, w, b, eps, center):
        want = (x.shape[0], x.shape[-1])[2 - w.ndim:]
        if r is not None and r.shape != x.shape or any(t is not None and t.shape != want for t in (gate, w, b)):
            shapes = [tuple(t.shape) for t in (x, r, gate, w, b) if t is not None]
            raise ValueError(f"norm: shapes {shapes}, expected x, r (..., C) and w, b (C,), or a sample's own (B, C)")
        x, r = x.contiguous(), None if r is None else r.contiguous()
        C, parts = x.shape[-1], len(w) if w.ndim == 2 else torch.get_num_threads()
        s = x if r is None else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, r.dtype))
        y, stats = torch.empty_like(s), x.new_empty(x.numel() // C, 2, dtype=torch.float32)
        wide = [None if t is None else t.float().contiguous() for t in (gate, w, b)]
        ctx.how = parts, x.numel() // C, C, C if w.ndim == 2 else 0
        ctx.center, ctx.dtypes = int(center), [None if t is None else t.dtype for t in (x, r, gate, w, b)]
        ctx.is16 = [int(t is not None and t.dtype == torch.bfloat16) for t in (x, r, y)]
        eps = torch.tensor(eps, dtype=torch.float32)
        call(compiled(SOURCE).forward, x, r, *wide, y, s, stats, *ctx.how, eps, ctx.center, *ctx.is16)
        ctx.save_for_backward(s, None if gate is None else r, *wide[:2], stats)
        ctx.set_materialize_grads(False)  # where s is not used on: not a tensor of zeros to read
        return y if r is None else (y, s)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, ds=None):
        s, r, gate, w, stats = ctx.saved_tensors
        x_type, r_type, *others = ctx.dtypes
        dy = torch.zeros_like(s) if dy is None else dy.contiguous()
        dx = torch.empty_like(s, dtype=x_type)
        dr = torch.empty_like(s, dtype=r_type) if r_type and (r_type != x_type or gate is not None) else None
        sums = w.new_empty(ctx.how[0], 3, w.shape[-1])
        call(compiled(SOURCE).backward, dy, None if ds is None else ds.contiguous(), s, r, gate, w, stats, dx, dr, sums,
             *ctx.how, ctx.center, *ctx.is16)
        dw, db, dgate = (sums if w.ndim == 2 else sums.sum(0, keepdim=True)).unbind(1)
        dgate, dw, db = (None if t is None else (d if w.ndim == 2 else d[0]).to(t)
                         for d, t in zip((dgate, dw, db), others))
        return dx, None if not r_type else dx if dr is None else dr, dgate, dw, db, None, None


def compiles(*tensors):
    """Whether SOURCE can serve: on a CPU, fp32 or bf16, and enough of it to be worth the call."""
    x = tensors[0]
    dtypes = {t.dtype for t in tensors if t is not None}
    return (x.is_cpu and x.numel() >= 16384 and dtypes <= {torch.float32, torch.bfloat16}
            and not torch.compiler.is_compiling() and compiled(SOURCE) is not None)


if triton is not None:
    # A program takes BM rows at a time (several when they are narrow) and strides over the matrix: it reads w once and
    # holds the sums for dw. num_stages: the next rows load while these are computed, so few programs keep memory busy.

    @triton.jit
    def norm_fwd_kernel(x, r, w, b, y, s, stats, M, C, eps, CENTER: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
                        STAGES: tl.constexpr):
        o_c = tl.arange(0, BC)[None, :]
        m_c = o_c < C
        b_w = tl.load(w + o_c, mask=m_c, other=0.0).to(tl.float32)  # [1, BC]
        if b is not None:
            b_b = tl.load(b + o_c, mask=m_c, other=0.0).to(tl.float32)
        for i in tl.range(tl.program_id(0), tl.cdiv(M, BM), tl.num_programs(0), num_stages=STAGES):
            o_m = (i * BM + tl.arange(0, BM)[:, None]).to(tl.int64)  # [BM, 1]; int64: row * C can pass 2^31
            m_m = o_m < M
            m = m_m & m_c
            o = o_m * C + o_c
            b_x = tl.load(x + o, mask=m, other=0.0).to(tl.float32)  # [BM, BC]
            if r is not None:
                b_x += tl.load(r + o, mask=m, other=0.0).to(tl.float32)
                b_x = b_x.to(s.dtype.element_ty).to(tl.float32)  # what backward will read
                tl.store(s + o, b_x, mask=m)
            if CENTER:
                mean = tl.sum(b_x, 1, keep_dims=True) / C  # [BM, 1]
                tl.store(stats + M + o_m, mean, mask=m_m)
                b_x = tl.where(m_c, b_x - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(b_x * b_x, 1, keep_dims=True) / C + eps)
            tl.store(stats + o_m, rstd, mask=m_m)
            b_y = b_x * rstd * b_w
            if b is not None:
                b_y += b_b
            tl.store(y + o, b_y, mask=m)

    # n = (x - mean) rstd, y = n w + b, g = w dy. The two means over the row come from d(rstd)/dx and d(mean)/dx:
    #   dx = rstd (g - mean(g) - n mean(g n)),   dw = sum over rows of dy n,   db = sum over rows of dy

    @triton.jit
    def norm_bwd_kernel(dy, ds, x, w, stats, dx, dw, db, M, C, CENTER: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
                        STAGES: tl.constexpr):
        o_c = tl.arange(0, BC)[None, :]
        m_c = o_c < C
        b_w = tl.load(w + o_c, mask=m_c, other=0.0).to(tl.float32)  # [1, BC]
        b_dw = tl.zeros((BM, BC), tl.float32)  # summed over BM after the loop
        b_db = tl.zeros((BM, BC), tl.float32)
        for i in tl.range(tl.program_id(0), tl.cdiv(M, BM), tl.num_programs(0), num_stages=STAGES):
            o_m = (i * BM + tl.arange(0, BM)[:, None]).to(tl.int64)  # [BM, 1]
            m_m = o_m < M
            m = m_m & m_c
            o = o_m * C + o_c
            b_dy = tl.load(dy + o, mask=m, other=0.0).to(tl.float32)  # [BM, BC]
            b_n = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
            rstd = tl.load(stats + o_m, mask=m_m, other=0.0)  # [BM, 1]
            if CENTER:
                b_n -= tl.load(stats + M + o_m, mask=m_m, other=0.0)
            b_n *= rstd  # past the row's end it is not zero; dy is
            b_dw += b_dy * b_n
            if db is not None:
                b_db += b_dy
            b_g = b_dy * b_w
            b_dx = b_g - b_n * (tl.sum(b_g * b_n, 1, keep_dims=True) / C)
            if CENTER:
                b_dx -= tl.sum(b_g, 1, keep_dims=True) / C
            b_dx *= rstd
            if ds is not None:
                b_dx += tl.load(ds + o, mask=m, other=0.0).to(tl.float32)
            tl.store(dx + o, b_dx, mask=m)
        o = tl.program_id(0) * C + tl.arange(0, BC)
        tl.store(dw + o, tl.sum(b_dw, 0), mask=tl.arange(0, BC) < C)
        if db is not None:
            tl.store(db + o, tl.sum(b_db, 0), mask=tl.arange(0, BC) < C)

    def launch_config(x, tensors, rows):
        """-> M, C, grid, constexprs for a kernel that loads so many tensors like x, at least so many rows a program."""
        M, C = x.numel() // max(1, x.shape[-1]), x.shape[-1]
        BC = triton.next_power_of_2(C)
        if BC > 8192:
            raise ValueError(f"norm: rows of {C} are too wide, at most 8192")
        BM = max(1, 1024 // BC)
        # 8 elements a thread, 16 at 8192: backward's five rows then stay in registers (sm_89: 128 of them, no spills)
        warps = 4 if BC <= 1024 else 8 if BC <= 2048 else 16
        # up to 3 tiles of each tensor on their way, within 48 KiB of shared memory (8192 wide: one tile is work enough)
        stages = max(1, min(4, 1 + 49152 // (tensors * BM * BC * 4)))
        # two programs per multiprocessor hide each other's reductions (46: an RTX 4070, for the interpreter on a CPU)
        sm = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 46
        grid = (max(1, min(2 * sm, triton.cdiv(M, max(rows, BM)))),)
        return M, C, grid, dict(BM=BM, BC=BC, STAGES=stages, num_warps=warps)

    @custom_op("kernels::norm", mutates_args=())
    def norm_op(x: torch.Tensor, r: torch.Tensor | None, w: torch.Tensor, b: torch.Tensor | None, eps: float,
                center: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> y, s (empty without r), stats (rstd; with center also mean) for backward."""
        M, C, grid, config = launch_config(x, 1 if r is None else 2, 1)
        y = torch.empty_like(x, dtype=x.dtype if r is None else torch.promote_types(x.dtype, r.dtype))
        s = y.new_empty(0) if r is None else torch.empty_like(y)
        stats = torch.empty(1 + center, M, dtype=torch.float32, device=x.device)
        norm_fwd_kernel[grid](x, r, w, b, y, s, stats, M, C, eps, CENTER=center, **config)
        return y, s, stats

    @norm_op.register_fake
    def _(x, r, w, b, eps, center):
        y = torch.empty_like(x, dtype=x.dtype if r is None else torch.promote_types(x.dtype, r.dtype))
        return y, y.new_empty(0) if r is None else torch.empty_like(y), x.new_empty(
            1 + center, x.numel() // x.shape[-1], dtype=torch.float32)

    @custom_op("kernels::norm_bwd", mutates_args=())
    def norm_bwd_op(dy: torch.Tensor, ds: torch.Tensor | None, x: torch.Tensor, w: torch.Tensor, stats: torch.Tensor,
                    bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """-> dx (x is s after an add), and dw with db below it: (1 or 2, C) fp32."""
        M, C, grid, config = launch_config(x, 2 if ds is None else 3, 32)  # 32: dw and db cost a program 3 rows' bytes
        dx = torch.empty_like(x)
        dw = torch.empty(1 + bias, grid[0], C, dtype=torch.float32, device=x.device)  # one row a program
        norm_bwd_kernel[grid](dy, ds, x, w, stats, dx, dw[0], dw[1] if bias else None, M, C,
                              CENTER=stats.shape[0] == 2, **config)
        return dx, dw.sum(1)

    @norm_bwd_op.register_fake
    def _(dy, ds, x, w, stats, bias):
        return torch.empty_like(x), x.new_empty(1 + bias, x.shape[-1], dtype=torch.float32)

    def save_for_backward(ctx, inputs, output):
        x, r, w, b, _, _ = inputs
        ctx.save_for_backward(x if r is None else output[1], w, output[2])
        ctx.x_dtype, ctx.r_dtype, ctx.b_dtype = x.dtype, r is not None and r.dtype, b is not None and b.dtype
        ctx.set_materialize_grads(False)  # an unused s brings no gradient: not a tensor of zeros to read

    def norm_backward(ctx, dy, ds, _):
        x, w, stats = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        ds = ds.contiguous() if ctx.r_dtype and ds is not None else None
        dx, dw = norm_bwd_op(dy, ds, x, w, stats, bool(ctx.b_dtype))
        dr = dx.to(ctx.r_dtype) if ctx.r_dtype else None
        return dx.to(ctx.x_dtype), dr, dw[0].to(w.dtype), dw[1].to(ctx.b_dtype) if ctx.b_dtype else None, None, None

    norm_op.register_autograd(norm_backward, setup_context=save_for_backward)

    def norm_triton(x, r, w, b, eps, center):
        if w.shape != x.shape[-1:] or b is not None and b.shape != w.shape or r is not None and r.shape != x.shape:
            shapes = [tuple(t.shape) for t in (x, r, w, b) if t is not None]
            raise ValueError(f"norm: shapes {shapes}, expected x, r (..., C) and w, b (C,)")
        x, r, w, b = (None if t is None else t.contiguous() for t in (x, r, w, b))
        return norm_op(x, r, w, b, eps, center)[:2]


def norm(x, r, w, b, eps, center):
    """-> y, s, where s = x or x + r. form() has said "torch"."""
    if not (center and r is None) and compiles(x, r, w, b):  # PyTorch's own LayerNorm takes one pass, too
        out = CompiledNorm.apply(x, r, None, w, b, eps, center)
        return (out, x) if r is None else out
    s = x if r is None else x + r
    return layer_norm_torch(s, w, b, eps) if center else rms_norm_torch(s, w, eps), s


def layer_norm(x, w, b=None, eps=1e-5):
    """x (..., C), w and b (C,) -> y (..., C) in x's dtype. ValueError: shapes that do not fit, C > 8192 (on a GPU)."""
    which = form(x)
    if which == "ref":
        return layer_norm_ref(x, w, b, eps)
    return (norm_triton if which == "triton" else norm)(x, None, w, b, eps, True)[0]


def rms_norm(x, w, eps=1e-6):
    """x (..., C), w (C,) -> y (..., C) in x's dtype. Errors as layer_norm."""
    which = form(x)
    if which == "ref":
        return rms_norm_ref(x, w, eps)
    return (norm_triton if which == "triton" else norm)(x, None, w, None, eps, False)[0]


def add_layer_norm(x, r, w, b=None, eps=1e-5):
    """x, r (..., C), w and b (C,) -> y = layer_norm(s), s = x + r, both in x + r's dtype. Errors as layer_norm."""
    which = form(x)
    if which == "ref":
        s = x + r
        return layer_norm_ref(s, w, b, eps), s
    return (norm_triton if which == "triton" else norm)(x, r, w, b, eps, True)


def add_rms_norm(x, r, w, eps=1e-6):
    """x, r (..., C), w (C,) -> y = rms_norm(s), s = x + r, both in x + r's dtype. Errors as layer_norm."""
    which = form(x)
    if which == "ref":
        s = x + r
        return rms_norm_ref(s, w, eps), s
    return (norm_triton if which == "triton" else norm)(x, r, w, None, eps, False)


# ---------------------------------------------------------------- adaLN's modulation


def modulate_ref(x, shift, scale, eps=1e-6):
    """The definition; fp32 inside, fp64 for fp64."""
    h = x if x.dtype == torch.float64 else x.float()
    h = h - h.mean(-1, keepdim=True)
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * (1 + scale[:, None])
            + shift[:, None]).to(x.dtype)


def add_modulate_ref(x, r, gate, shift, scale, eps=1e-6):
    """The definition."""
    s = x + gate[:, None] * r
    s = s.to(torch.promote_types(x.dtype, r.dtype))
    return modulate_ref(s, shift, scale, eps), s


def modulate_torch(x, shift, scale, eps=1e-6):
    if compiles(x, shift, scale):
        return CompiledNorm.apply(x, None, None, 1 + scale.float(), shift, eps, True)
    n = torch.nn.functional.layer_norm(x.float() if x.dtype != torch.float64 else x, x.shape[-1:], eps=eps)
    return (n * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


if triton is not None:
    # A program takes a sample's rows, BM at a time: shift, scale and gate are read once; PyTorch adds programs' sums.

    @triton.jit
    def modulate_fwd_kernel(x, r, gate, shift, scale, y, s, stats, M, T, C, s_gate, s_shift, s_scale, eps,
                            BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr):
        i_b = tl.program_id(1).to(tl.int64)
        o_c = tl.arange(0, BC)[None, :]
        m_c = o_c < C
        b_shift = tl.load(shift + i_b * s_shift + o_c, mask=m_c, other=0.0).to(tl.float32)  # [1, BC]
        b_scale = 1 + tl.load(scale + i_b * s_scale + o_c, mask=m_c, other=0.0).to(tl.float32)
        if r is not None:
            b_gate = tl.load(gate + i_b * s_gate + o_c, mask=m_c, other=0.0).to(tl.float32)
        for i in tl.range(tl.program_id(0), tl.cdiv(T, BM), tl.num_programs(0), num_stages=STAGES):
            o_t = i * BM + tl.arange(0, BM)[:, None]
            m_t = o_t < T
            m = m_t & m_c
            o_m = i_b * T + o_t  # [BM, 1] int64
            o = o_m * C + o_c
            b_x = tl.load(x + o, mask=m, other=0.0).to(tl.float32)  # [BM, BC]
            if r is not None:
                b_x += b_gate * tl.load(r + o, mask=m, other=0.0).to(tl.float32)
                b_x = b_x.to(s.dtype.element_ty).to(tl.float32)  # what backward will read
                tl.store(s + o, b_x, mask=m)
            mean = tl.sum(b_x, 1, keep_dims=True) / C  # [BM, 1]
            b_x = tl.where(m_c, b_x - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(b_x * b_x, 1, keep_dims=True) / C + eps)
            tl.store(stats + o_m, rstd, mask=m_t)
            tl.store(stats + M + o_m, mean, mask=m_t)
            tl.store(y + o, b_x * rstd * b_scale + b_shift, mask=m)

    # n = (s - mean) rstd, g = (1 + scale) dy; s's gradient: dx = rstd (g - mean(g) - n mean(g n)) + ds;  dr = gate dx
    #   dshift = sum over a sample's rows of dy,   dscale = sum of dy n,   dgate = sum of dx r

    @triton.jit
    def modulate_bwd_kernel(dy, ds, s, r, gate, scale, stats, dx, dr, sums, M, T, C, s_gate, s_scale, BM: tl.constexpr,
                            BC: tl.constexpr, STAGES: tl.constexpr):
        i_b = tl.program_id(1).to(tl.int64)
        o_c = tl.arange(0, BC)[None, :]
        m_c = o_c < C
        b_scale = 1 + tl.load(scale + i_b * s_scale + o_c, mask=m_c, other=0.0).to(tl.float32)  # [1, BC]
        if r is not None:
            b_gate = tl.load(gate + i_b * s_gate + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_dshift = tl.zeros((BM, BC), tl.float32)  # summed over BM after the loop
        b_dscale = tl.zeros((BM, BC), tl.float32)
        b_dgate = tl.zeros((BM, BC), tl.float32)
        for i in tl.range(tl.program_id(0), tl.cdiv(T, BM), tl.num_programs(0), num_stages=STAGES):
            o_t = i * BM + tl.arange(0, BM)[:, None]
            m_t = o_t < T
            m = m_t & m_c
            o_m = i_b * T + o_t
            o = o_m * C + o_c
            b_dy = tl.load(dy + o, mask=m, other=0.0).to(tl.float32)  # [BM, BC]
            rstd = tl.load(stats + o_m, mask=m_t, other=0.0)  # [BM, 1]
            b_n = (tl.load(s + o, mask=m, other=0.0).to(tl.float32)
                   - tl.load(stats + M + o_m, mask=m_t, other=0.0)) * rstd
            b_dshift += b_dy
            b_dscale += b_dy * b_n
            b_g = b_dy * b_scale
            b_dx = (b_g - b_n * (tl.sum(b_g * b_n, 1, keep_dims=True) / C) - tl.sum(b_g, 1, keep_dims=True) / C) * rstd
            if ds is not None:
                b_dx += tl.load(ds + o, mask=m, other=0.0).to(tl.float32)
            tl.store(dx + o, b_dx, mask=m)
            if r is not None:
                b_dgate += b_dx * tl.load(r + o, mask=m, other=0.0).to(tl.float32)
                tl.store(dr + o, b_dx * b_gate, mask=m)
        B, P, i_p = tl.num_programs(1), tl.num_programs(0), tl.program_id(0)
        o, m_c = (i_b * P + i_p) * C + tl.arange(0, BC), tl.arange(0, BC) < C  # sums (2 or 3, B, P, C)
        tl.store(sums + o, tl.sum(b_dshift, 0), mask=m_c)
        tl.store(sums + B.to(tl.int64) * P * C + o, tl.sum(b_dscale, 0), mask=m_c)
        if r is not None:
            tl.store(sums + 2 * B.to(tl.int64) * P * C + o, tl.sum(b_dgate, 0), mask=m_c)

    def modulate_config(x, tensors, rows):
        """launch_config for programs that stay within a sample."""
        B, T, C = x.shape
        _, _, _, config = launch_config(x, tensors, 1)
        sm = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 46
        per = max(1, min(triton.cdiv(2 * sm, max(1, B)), triton.cdiv(T, max(rows, config["BM"]))))
        return B * T, T, C, (per, B), config

    @custom_op("kernels::modulate", mutates_args=())
    def modulate_op(x: torch.Tensor, r: torch.Tensor | None, gate: torch.Tensor | None, shift: torch.Tensor,
                    scale: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> y, s (empty without r), stats (rstd, mean) for backward."""
        M, T, C, grid, config = modulate_config(x, 1 if r is None else 2, 8)
        y = torch.empty_like(x, dtype=x.dtype if r is None else torch.promote_types(x.dtype, r.dtype))
        s = y.new_empty(0) if r is None else torch.empty_like(y)
        stats = torch.empty(2, M, dtype=torch.float32, device=x.device)
        if M:
            modulate_fwd_kernel[grid](
                x, r, gate, shift, scale, y, s, stats, M, T, C,
                0 if r is None else gate.stride(0), shift.stride(0), scale.stride(0), eps, **config)
        return y, s, stats

    @modulate_op.register_fake
    def _(x, r, gate, shift, scale, eps):
        y = torch.empty_like(x, dtype=x.dtype if r is None else torch.promote_types(x.dtype, r.dtype))
        return (y, y.new_empty(0) if r is None else torch.empty_like(y),
                x.new_empty(2, x.shape[0] * x.shape[1], dtype=torch.float32))

    @custom_op("kernels::modulate_bwd", mutates_args=())
    def modulate_bwd_op(dy: torch.Tensor, ds: torch.Tensor | None, s: torch.Tensor, r: torch.Tensor | None,
                        gate: torch.Tensor | None, scale: torch.Tensor, stats: torch.Tensor
                        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> dx, dr (empty without r), and dshift, dscale (, dgate): (2 or 3, B, C) fp32."""
        M, T, C, grid, config = modulate_config(s, 2 + (ds is not None) + (r is not None), 48)  # 48: sums are written
        dx = torch.empty_like(s)
        dr = s.new_empty(0) if r is None else torch.empty_like(r)
        sums = (torch.empty if M else torch.zeros)(2 if r is None else 3, grid[1], grid[0], C, dtype=torch.float32,
                                                   device=s.device)
        if M:
            modulate_bwd_kernel[grid](dy, ds, s, r, gate, scale, stats, dx, dr, sums, M, T, C,
                                      0 if r is None else gate.stride(0), scale.stride(0), **config)
        return dx, dr, sums.sum(2)

    @modulate_bwd_op.register_fake
    def _(dy, ds, s, r, gate, scale, stats):
        dr = s.new_empty(0) if r is None else torch.empty_like(r)
        return torch.empty_like(s), dr, s.new_empty(2 if r is None else 3, s.shape[0], s.shape[2], dtype=torch.float32)

    def save_for_modulate(ctx, inputs, output):
        x, r, gate, shift, scale, _ = inputs
        ctx.save_for_backward(x if r is None else output[1], r, gate, scale, output[2])
        ctx.dtypes = [None if t is None else t.dtype for t in (x, r, gate, shift, scale)]
        ctx.set_materialize_grads(False)  # an unused s brings no gradient: not a tensor of zeros to read

    def modulate_backward(ctx, dy, ds, _):
        s, r, gate, scale, stats = ctx.saved_tensors
        dy = torch.zeros_like(s) if dy is None else dy.contiguous()
        ds = ds.contiguous() if r is not None and ds is not None else None
        dx, dr, sums = modulate_bwd_op(dy, ds, s, r, gate, scale, stats)
        x_type, _, gate_type, shift_type, scale_type = ctx.dtypes
        dr, dgate = (None, None) if r is None else (dr, sums[2].to(gate_type))
        return dx.to(x_type), dr, dgate, sums[0].to(shift_type), sums[1].to(scale_type), None

    modulate_op.register_autograd(modulate_backward, setup_context=save_for_modulate)

    def modulate_triton(x, r, gate, shift, scale, eps):
        per_sample = [v for v in (gate, shift, scale) if v is not None]
        if any(v.shape != x.shape[::2] for v in per_sample) or r is not None and r.shape != x.shape:
            shapes = [tuple(t.shape) for t in (x, r, *per_sample) if t is not None]
            raise ValueError(f"modulate: shapes {shapes}, expected x, r (B, T, C) and gate, shift, scale (B, C)")
        gate, shift, scale = (v if v is None or v.stride(-1) == 1 else v.contiguous() for v in (gate, shift, scale))
        return modulate_op(x.contiguous(), None if r is None else r.contiguous(), gate, shift, scale, eps)[:2]


def modulate(x, shift, scale, eps=1e-6):
    """x (B, T, C), shift and scale (B, C), any stride of B -> (B, T, C) in x's dtype.
    ValueError: shapes that do not fit, C > 8192 (on a GPU)."""
    which = form(x)
    if which == "triton":
        return modulate_triton(x, None, None, shift, scale, eps)[0]
    return modulate_ref(x, shift, scale, eps) if which == "ref" else modulate_torch(x, shift, scale, eps)


def add_modulate(x, r, gate, shift, scale, eps=1e-6):
    """x, r (B, T, C), gate, shift and scale (B, C) -> y = modulate(s), s = x + gate r, both in x + r's dtype.
    Errors as modulate."""
    which = form(x)
    if which == "triton":
        return modulate_triton(x, r, gate, shift, scale, eps)
    if which == "torch" and compiles(x, r, gate, shift, scale):
        return CompiledNorm.apply(x, r, gate, 1 + scale.float(), shift, eps, True)
    s = torch.addcmul(x, gate[:, None], r).to(torch.promote_types(x.dtype, r.dtype))
    return modulate(s, shift, scale, eps), s


# ---------------------------------------------------------------- GroupNorm and SiLU


def group_norm_silu_ref(x, w, b, groups, eps=1e-5, silu=True):
    """The definition; fp32 inside, fp64 for fp64."""
    h = (x if x.dtype == torch.float64 else x.float()).reshape(x.shape[0], groups, -1)
    h = h - h.mean(-1, keepdim=True)
    h = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).reshape(x.shape)
    z = h * w.view(-1, *[1] * (x.ndim - 2)) + b.view(-1, *[1] * (x.ndim - 2))
    return (z * torch.sigmoid(z) if silu else z).to(x.dtype)


# For a CPU, channels last: a thread takes a sample, three times forward, twice backward, which then lies in its cache.
GROUPS = r"""
/* the mean of each group's sums over n numbers, for each of its channels */
static inline void share(const float *sums, num C, num G, num n, float *to) {
    for (num g = 0; g < G; g++) {
        float all = 0;
        for (num c = g * (C / G); c < (g + 1) * (C / G); c++) all += sums[c];
        for (num c = g * (C / G); c < (g + 1) * (C / G); c++) to[c] = all / n;
    }
}

/* x, y (B, P, C); stats (B, 2, C): mean and rstd of the channel's group */
void forward(const void *x, const float *w, const float *b, void *y, float *stats, num B, num P, num C, num G,
             const float *eps, num silu, num x16) {
    num n = P * (C / G);
    #pragma omp parallel for schedule(static)
    for (num i = 0; i < B; i++) {
        float v[C], sum[C], *mean = stats + i * 2 * C, *rstd = mean + C;
        memset(sum, 0, sizeof sum);
        for (num p = 0; p < P; p++) {
            get(x, x16, (i * P + p) * C, C, v);
            for (num c = 0; c < C; c++) sum[c] += v[c];
        }
        share(sum, C, G, n, mean);
        memset(sum, 0, sizeof sum);
        for (num p = 0; p < P; p++) {
            get(x, x16, (i * P + p) * C, C, v);
            for (num c = 0; c < C; c++) sum[c] += (v[c] - mean[c]) * (v[c] - mean[c]);
        }
        share(sum, C, G, n, rstd);
        for (num c = 0; c < C; c++) rstd[c] = 1 / sqrtf(rstd[c] + *eps);
        for (num p = 0; p < P; p++) {
            get(x, x16, (i * P + p) * C, C, v);
            for (num c = 0; c < C; c++) v[c] = (v[c] - mean[c]) * rstd[c] * w[c] + b[c];
            if (silu) for (num c = 0; c < C; c++) v[c] *= sigmoid(v[c]);
            put(v, C, x16, y, (i * P + p) * C);
        }
    }
}

/* d = dL/dz of a pixel; n: x normed */
static inline void step(const void *dy, const void *x, const float *w, const float *b, const float *mean,
                        const float *rstd, num at, num C, num silu, num x16, float *d, float *n) {
    get(dy, x16, at, C, d), get(x, x16, at, C, n);
    for (num c = 0; c < C; c++) {
        n[c] = (n[c] - mean[c]) * rstd[c];
        float z = n[c] * w[c] + b[c], s = sigmoid(z);
        d[c] *= silu ? s * (1 + z * (1 - s)) : 1;
    }
}

/* sums (B, 2, C): of d and of d n */
void backward(const void *dy, const void *x, const float *w, const float *b, const float *stats, void *dx, float *sums,
              num B, num P, num C, num G, num silu, num x16) {
    #pragma omp parallel for schedule(static)
    for (num i = 0; i < B; i++) {
        const float *mean = stats + i * 2 * C, *rstd = mean + C;
        float d[C], n[C], a[C], c1[C], c2[C], *s1 = sums + i * 2 * C, *s2 = s1 + C;
        memset(s1, 0, 8 * C);
        for (num p = 0; p < P; p++) {
            step(dy, x, w, b, mean, rstd, (i * P + p) * C, C, silu, x16, d, n);
            for (num c = 0; c < C; c++) s1[c] += d[c], s2[c] += d[c] * n[c];
        }
        for (num c = 0; c < C; c++) a[c] = w[c] * s1[c];
        share(a, C, G, P * (C / G), c1);
        for (num c = 0; c < C; c++) a[c] = w[c] * s2[c];
        share(a, C, G, P * (C / G), c2);
        for (num p = 0; p < P; p++) {
            step(dy, x, w, b, mean, rstd, (i * P + p) * C, C, silu, x16, d, n);
            for (num c = 0; c < C; c++) d[c] = rstd[c] * (d[c] * w[c] - c1[c] - n[c] * c2[c]);
            put(d, C, x16, dx, (i * P + p) * C);
        }
    }
}
"""


class CompiledGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, groups, eps, silu):
        (B, C), y, wide = x.shape[:2], torch.empty_like(x), [t.float().contiguous() for t in (w, b)]
        stats = x.new_empty(B, 2, C, dtype=torch.float32)
        ctx.how, ctx.dtypes = (B, x[0, 0].numel(), C, groups), (w.dtype, b.dtype)
        ctx.flags = int(silu), int(x.dtype == torch.bfloat16)
        call(compiled(GROUPS).forward, x, *wide, y, stats, *ctx.how, torch.tensor(eps, dtype=torch.float32), *ctx.flags)
        ctx.save_for_backward(x, *wide, stats)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, *wide, stats = ctx.saved_tensors
        dx, sums = torch.empty_like(x), torch.empty_like(stats)
        dy = dy.contiguous(memory_format=torch.channels_last)
        call(compiled(GROUPS).backward, dy, x, *wide, stats, dx, sums, *ctx.how, *ctx.flags)
        db, dw = (s.to(t) for s, t in zip(sums.sum(0), ctx.dtypes[::-1]))
        return dx, dw, db, None, None, None


def group_norm_silu_torch(x, w, b, groups, eps=1e-5, silu=True):
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if last and compiles(x, w, b) and w.shape == b.shape == x.shape[1:2] and x.shape[1] % groups == 0:
        return CompiledGroupNorm.apply(x, w, b, groups, eps, silu)
    wide = x if w.dtype == x.dtype else x.float()
    z = torch.nn.functional.group_norm(wide, groups, w.to(wide.dtype), b.to(wide.dtype), eps)
    return (torch.nn.functional.silu(z) if silu else z).to(x.dtype)


if triton is not None:
    # A program takes one group of one sample: CG channels of P pixels, which lie together (contiguous) or CG in every
    # pixel's C (channels last). What fits one tile is read once; otherwise the second pass finds it in the cache.

    @triton.jit
    def group_norm_fwd_kernel(x, w, b, y, stats, G, CG, P, eps, LAST: tl.constexpr, SILU: tl.constexpr,
                              ONE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
        i = tl.program_id(0).to(tl.int64)
        i_g = i % G
        base = i // G * G * CG * P + (i_g * CG if LAST else i_g * CG * P)
        o_c, o_p = tl.arange(0, BC)[:, None], tl.arange(0, BP)[None, :]
        m_c = o_c < CG
        b_w = tl.load(w + i_g * CG + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BC, 1]
        b_b = tl.load(b + i_g * CG + o_c, mask=m_c, other=0.0).to(tl.float32)
        mean, m2 = tl.zeros((1, 1), tl.float32), tl.zeros((1, 1), tl.float32)
        if ONE:
            m = m_c & (o_p < P)
            o = base + (o_c + o_p.to(tl.int64) * G * CG if LAST else o_c.to(tl.int64) * P + o_p)
            b_x = tl.load(x + o, mask=m, other=0.0).to(tl.float32)  # [BC, BP]
            mean += tl.sum(tl.sum(b_x, 1, keep_dims=True), 0, keep_dims=True) / (CG * P)
            d = tl.where(m, b_x - mean, 0.0)
            m2 += tl.sum(tl.sum(d * d, 1, keep_dims=True), 0, keep_dims=True)
        else:  # tile by tile: means and squared distances combine (Chan et al. 1979)
            for p in range(0, P, BP):
                m = m_c & (p + o_p < P)
                o = base + (o_c + (p + o_p).to(tl.int64) * G * CG if LAST else o_c.to(tl.int64) * P + p + o_p)
                b_x = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
                n, had = CG * tl.minimum(BP, P - p) * 1.0, CG * p * 1.0
                here = tl.sum(tl.sum(b_x, 1, keep_dims=True), 0, keep_dims=True) / n
                d = tl.where(m, b_x - here, 0.0)
                m2 += (tl.sum(tl.sum(d * d, 1, keep_dims=True), 0, keep_dims=True)
                       + (here - mean) * (here - mean) * (had * n / (had + n)))
                mean += (here - mean) * (n / (had + n))
        rstd = tl.rsqrt(m2 / (CG * P) + eps)
        o_1 = tl.zeros((1, 1), tl.int32)
        tl.store(stats + i + o_1, rstd)
        tl.store(stats + tl.num_programs(0).to(tl.int64) + i + o_1, mean)
        for p in range(0, P, BP):
            m = m_c & (p + o_p < P)
            o = base + (o_c + (p + o_p).to(tl.int64) * G * CG if LAST else o_c.to(tl.int64) * P + p + o_p)
            if not ONE:
                b_x = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
            z = (b_x - mean) * rstd * b_w + b_b
            if SILU:
                z = z * tl.sigmoid(z)
            tl.store(y + o, z, mask=m)

    # z = n w + b, y = z sigma(z): dz = dy sigma(z) (1 + z (1 - sigma(z))); g = w dz, means over the group's N numbers:
    #   dx = rstd (g - mean(g) - n mean(g n)),   dw = sum over samples and pixels of dz n,   db = sum of dz

    @triton.jit
    def silu_grad(z, dy):
        q = tl.sigmoid(z)
        return dy * q * (1 + z * (1 - q))

    @triton.jit
    def group_norm_bwd_kernel(dy, x, w, b, stats, dx, sums, G, CG, P, LAST: tl.constexpr, SILU: tl.constexpr,
                              ONE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
        i = tl.program_id(0).to(tl.int64)
        i_g = i % G
        base = i // G * G * CG * P + (i_g * CG if LAST else i_g * CG * P)
        o_c, o_p = tl.arange(0, BC)[:, None], tl.arange(0, BP)[None, :]
        m_c = o_c < CG
        b_w = tl.load(w + i_g * CG + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BC, 1]
        b_b = tl.load(b + i_g * CG + o_c, mask=m_c, other=0.0).to(tl.float32)
        rstd, mean = tl.load(stats + i), tl.load(stats + tl.num_programs(0).to(tl.int64) + i)
        b_dz, b_n = tl.zeros((BC, BP), tl.float32), tl.zeros((BC, BP), tl.float32)
        b_db, b_dw = tl.zeros((BC, BP), tl.float32), tl.zeros((BC, BP), tl.float32)  # summed over BP after the loop
        for p in range(0, P, BP):
            m = m_c & (p + o_p < P)
            o = base + (o_c + (p + o_p).to(tl.int64) * G * CG if LAST else o_c.to(tl.int64) * P + p + o_p)
            b_n = (tl.load(x + o, mask=m, other=0.0).to(tl.float32) - mean) * rstd
            b_dz = tl.load(dy + o, mask=m, other=0.0).to(tl.float32)
            if SILU:
                b_dz = silu_grad(b_n * b_w + b_b, b_dz)
            b_db += b_dz
            b_dw += b_dz * b_n
        db, dw = tl.sum(b_db, 1, keep_dims=True), tl.sum(b_dw, 1, keep_dims=True)  # [BC, 1]
        o_s = i * CG + o_c  # sums (2, B, C): (sample, group, channel)
        tl.store(sums + o_s, dw, mask=m_c)
        tl.store(sums + tl.num_programs(0).to(tl.int64) * CG + o_s, db, mask=m_c)
        g0, g1 = tl.sum(db * b_w, 0, keep_dims=True) / (CG * P), tl.sum(dw * b_w, 0, keep_dims=True) / (CG * P)
        for p in range(0, P, BP):
            m = m_c & (p + o_p < P)
            o = base + (o_c + (p + o_p).to(tl.int64) * G * CG if LAST else o_c.to(tl.int64) * P + p + o_p)
            if not ONE:
                b_n = (tl.load(x + o, mask=m, other=0.0).to(tl.float32) - mean) * rstd
                b_dz = tl.load(dy + o, mask=m, other=0.0).to(tl.float32)
                if SILU:
                    b_dz = silu_grad(b_n * b_w + b_b, b_dz)
            tl.store(dx + o, (b_dz * b_w - g0 - b_n * g1) * rstd, mask=m)

    def last(x):
        """Whether x (B, C, h, w) lies channels last; otherwise it is to be contiguous."""
        return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()

    def group_config(x, groups):
        CG, P = x.shape[1] // groups, x[0, 0].numel()
        BC, BP = triton.next_power_of_2(CG), triton.next_power_of_2(P)
        one = BC * BP <= 4096
        BP = BP if one else max(1, 2048 // BC)
        return CG, P, dict(LAST=last(x), ONE=one, BC=BC, BP=BP, num_warps=8 if BC * BP >= 2048 else 4)

    @custom_op("kernels::group_norm_silu", mutates_args=())
    def group_norm_op(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, groups: int, eps: float, silu: bool
                      ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> y, stats (rstd, mean) for backward."""
        y, stats = torch.empty_like(x), torch.empty(2, x.shape[0] * groups, dtype=torch.float32, device=x.device)
        if x.numel():
            CG, P, config = group_config(x, groups)
            group_norm_fwd_kernel[(x.shape[0] * groups,)](x, w, b, y, stats, groups, CG, P, eps, SILU=silu, **config)
        return y, stats

    @group_norm_op.register_fake
    def _(x, w, b, groups, eps, silu):
        return torch.empty_like(x), x.new_empty(2, x.shape[0] * groups, dtype=torch.float32)

    @custom_op("kernels::group_norm_silu_bwd", mutates_args=())
    def group_norm_bwd_op(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, stats: torch.Tensor,
                          groups: int, silu: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """-> dx, and dw with db below it: (2, C) fp32."""
        dx, sums = torch.empty_like(x), torch.zeros(2, *x.shape[:2], dtype=torch.float32, device=x.device)
        if x.numel():
            CG, P, config = group_config(x, groups)
            group_norm_bwd_kernel[(x.shape[0] * groups,)](dy, x, w, b, stats, dx, sums, groups, CG, P,
                                                          SILU=silu, **config)
        return dx, sums.sum(1)

    @group_norm_bwd_op.register_fake
    def _(dy, x, w, b, stats, groups, silu):
        return torch.empty_like(x), x.new_empty(2, x.shape[1], dtype=torch.float32)

    def save_for_group_norm(ctx, inputs, output):
        x, w, b, ctx.groups, _, ctx.silu = inputs
        ctx.save_for_backward(x, w, b, output[1])

    def group_norm_backward(ctx, dy, _):
        x, w, b, stats = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last if last(x) else torch.contiguous_format)
        dx, sums = group_norm_bwd_op(dy, x, w, b, stats, ctx.groups, ctx.silu)
        return dx, sums[0].to(w.dtype), sums[1].to(b.dtype), None, None, None

    group_norm_op.register_autograd(group_norm_backward, setup_context=save_for_group_norm)


def group_norm_silu(x, w, b, groups, eps=1e-5, silu=True):
    """x (B, C, ...), contiguous or channels last, w and b (C,) -> the same shape, layout and dtype; without silu
    GroupNorm alone. ValueError: shapes that do not fit."""
    which = form(x)
    if which != "triton":
        return (group_norm_silu_ref if which == "ref" else group_norm_silu_torch)(x, w, b, groups, eps, silu)
    if w.shape != x.shape[1:2] or b.shape != w.shape or x.shape[1] % groups:
        raise ValueError(f"group_norm_silu: shapes {[tuple(t.shape) for t in (x, w, b)]} and {groups} groups, "
                         "expected x (B, C, ...), w, b (C,), C % groups == 0")
    return group_norm_op(x if last(x) else x.contiguous(), w.contiguous(), b.contiguous(), groups, eps, silu)[0]
