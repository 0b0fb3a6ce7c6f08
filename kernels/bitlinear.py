"""
BitLinear: a linear layer with ternary weights and 8-bit activations, behind an RMSNorm
    Ma et al. 2024, "The Era of 1-bit LLMs", arXiv:2402.17764 (eq. 1 to 3);  2025, BitNet b1.58 2B4T, arXiv:2504.12285

    h     = RMSNorm(x) g              per token:   a = 127 / max(max |h|, 1e-5),   xq = round(a h),      in -127..127
    s     = max(mean |W|, 1e-5)       per matrix:  Wq = clip(round(W / s), -1, 1)
    y     = xq Wq^T s / a             all sums are exact integers
    backward (straight-through: both roundings count as the identity), with xh = xq / a, Wh = s Wq:
    dW    = dy^T xh,   dh = dy Wh,    then RMSNorm's backward; nothing flows into a or s

    bit_linear(x, g, weights, eps)    the layers that read RMSNorm(x): (y_i) for the master weights W_i. Training.
    packed_linear(x, g, packs, eps)   the same for packed weights (bytes, s). Inference.
    quantize_weight(w), pack(wq), unpack(bytes)     -> (Wq int8, s);  2 bits a weight as on the Hugging Face hub: bits
                                      2j, 2j+1 of byte (r, k) hold Wq + 1 of row r + j N/4, so N must be divisible by 4

Shapes: x (..., K), g (K,), W (N, K), bytes (N/4, K) uint8, s fp32 -> y (..., N) in x's (or autocast's) dtype.
K <= 16384 in kernels. Saved for backward: x, 1 / rms, xq with 1 / a, Wq with s: 5 K bytes a token beside x on a GPU (on
a CPU xh and Wh in fp32, which backward multiplies with as they are). Wq is made anew in each forward pass: one pass
over W, nothing beside the product of a batch.

Kernels: norm and quantisation in one pass over x (E + 1 bytes an element, which is the floor); a weight is read twice,
as its mean must be known first (2 E + 1 bytes; floor E + 1). int8 products on tensor cores (IMMA), xq Wq^T with s / a
in the epilogue; from packed weights each program decodes a tile of bytes into four tiles of Wq, one for each of its
rows' quarters: at batch 1 N K / 4 bytes move instead of 2 N K, which is the bound. Backward's products are the
vendor's, norm's backward is kernels/norm.py's.

CPU: where a C compiler is, quantising and norm's backward take a pass each, and a product of few tokens reads packed
bytes; without one, and for many tokens, slices are decoded and multiplied: weights are never whole.
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


def quantize_weight_ref(w):
    """w (N, K) -> Wq (N, K) int8 of -1, 0, 1 and s, a scalar."""
    w = w.detach().to(torch.promote_types(w.dtype, torch.float32))
    s = w.abs().mean().clamp(min=1e-5)
    return (w * (1 / s)).round().clamp(-1, 1).to(torch.int8), s


def quantize_ref(x, g, eps=1e-5):
    """x (..., K), g (K,) -> xq (..., K) int8 and 1 / a (..., 1) of RMSNorm(x) g; fp32 inside, fp64 for fp64."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * g
    top = h.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (h * (127 / top)).round().clamp(-128, 127).to(torch.int8), top / 127


def bit_linear_ref(x, g, weights, eps=1e-5):
    """The definition; straight-through estimator: v + (quantised v - v).detach() is quantised v, its gradient v's."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * g.to(wide)
    xq, a_inv = quantize_ref(x.detach(), g.detach(), eps)
    h = h + (xq * a_inv - h).detach()
    out = []
    for w in weights:
        wq, s = quantize_weight_ref(w)
        out.append(F.linear(h, w.to(wide) + (wq * s - w.to(wide)).detach()).to(x.dtype))
    return tuple(out)


def pack(wq):
    """Wq (N, K) int8 -> (N / 4, K) uint8."""
    if wq.shape[0] % 4:
        raise ValueError(f"pack: {wq.shape[0]} rows; four share a byte, so a multiple of 4 is expected")
    a, b, c, d = (wq + 1).to(torch.uint8).chunk(4)
    return a | b << 2 | c << 4 | d << 6


def unpack(packed, dtype=torch.int8):
    """(N / 4, K) uint8 -> Wq (N, K)."""
    return torch.cat([(packed >> 2 * j & 3).to(dtype) - 1 for j in range(4)])


def packed_linear_ref(x, g, packs, eps=1e-5):
    xq, a_inv = quantize_ref(x, g, eps)
    return tuple((F.linear(xq.to(a_inv.dtype), unpack(p, a_inv.dtype)) * (a_inv * s)).to(x.dtype) for p, s in packs)


# ---------------------------------------------------------------- plain PyTorch
def out_dtype(x):
    """What F.linear would give for x: autocast's dtype, or x's own."""
    kind = "cpu" if x.device.type == "meta" else x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


def quantize_torch(x, g, eps):
    """x (M, K) -> xq, integers in fp32, 1 / a and 1 / rms (M, 1). A row's norm factor falls out of xq: few passes."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[1]).add_(eps).rsqrt_()  # (M, 1)
    xq = x * g.to(x.dtype)
    top = torch.maximum(xq.amax(-1, keepdim=True), -xq.amin(-1, keepdim=True))  # max |x g|: |h| is rstd times that
    a_inv = (top * rstd).clamp_(min=1e-5).div_(127)
    return xq.mul_(rstd / a_inv).round_(), a_inv, rstd


def quantize_weight_torch(w, scaled=False):
    """w (N, K) -> Wq, or Wh = s Wq, in w's dtype (at least fp32), and s."""
    w = w.detach().to(torch.promote_types(w.dtype, torch.float32))
    s = w.abs().mean().clamp_(min=1e-5)
    wq = (w * (1 / s)).round_().clamp_(-1, 1)
    return wq.mul_(s) if scaled else wq, s


def in_c(*tensors):
    """SOURCE's functions where they can serve, else None."""
    fits = all(t.is_cpu and t.dtype in (torch.float32, torch.bfloat16) and t.is_contiguous() for t in tensors)
    return compiled(SOURCE) if fits and not torch.compiler.is_compiling() else None


def is16(*tensors):
    return [int(t.dtype == torch.bfloat16) for t in tensors]


class BitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g, eps, *weights):
        dtype, shape, x = out_dtype(x), x.shape[:-1], x.reshape(-1, x.shape[-1])
        c, ctx.g_dtype = in_c(x, *weights), g.dtype
        if c and dtype in (torch.float32, torch.bfloat16):
            g, rstd = g.float().contiguous(), x.new_empty(len(x), 1, dtype=torch.float32)
            xh, whs = torch.empty_like(x, dtype=dtype), [torch.empty_like(w, dtype=dtype) for w in weights]
            call(c.quantize, x, g, xh, rstd, *x.shape, torch.tensor(eps, dtype=torch.float32), *is16(x, xh))
            for w, wh in zip(weights, whs):
                call(c.ternary, w, wh, rstd.new_empty(-(-w.numel() // 1024)), w.numel(), *is16(w, wh))
        else:
            xh, a_inv, rstd = quantize_torch(x, g, eps)
            xh = xh.mul_(a_inv).to(dtype)
            whs = [quantize_weight_torch(w, scaled=True)[0].to(dtype) for w in weights]
        ctx.save_for_backward(x, g, rstd, xh, *whs)
        ctx.w_dtypes, ctx.shape = [w.dtype for w in weights], shape
        return tuple(product(xh, wh).view(*shape, len(wh)) for wh in whs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        x, g, rstd, xh, *whs = ctx.saved_tensors
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dws = [(dy.t() @ xh).to(dtype) for dy, dtype in zip(dys, ctx.w_dtypes)]
        dh = product(dys[0], whs[0].t())
        for dy, wh in zip(dys[1:], whs[1:]):
            product(dy, wh.t(), out=dh, add=True)
        c = in_c(dh, x)
        if c:
            dx, threads = torch.empty_like(x), torch.get_num_threads()
            dg = rstd.new_empty(threads, x.shape[1])
            call(c.backward, dh, x, g.float().contiguous(), rstd, dx, dg, *x.shape, *is16(dh, x), threads)
            return dx.view(*ctx.shape, x.shape[-1]), dg.sum(0).to(ctx.g_dtype), None, *dws
        # n = x rstd;  dg = sum over rows of dh n;  dx = rstd (dh g - n mean(dh g n))
        wide = rstd.dtype
        dh, xw = dh.to(wide), x.to(wide)
        p = dh * xw
        dg = p.t() @ rstd[:, 0]
        c = (p @ g.to(wide)).unsqueeze(1).mul_(rstd**3).div_(-x.shape[1])
        dx = dh.mul_(g.to(wide)).mul_(rstd).addcmul_(xw, c)
        return dx.to(x.dtype).view(*ctx.shape, x.shape[-1]), dg.to(ctx.g_dtype), None, *dws


def packed_linear_torch(x, g, packs, eps):
    dtype, shape = out_dtype(x), x.shape[:-1]
    xq, a_inv, _ = quantize_torch(x.reshape(-1, x.shape[-1]), g, eps)  # (M, K)
    few = compiled(SOURCE) if len(xq) <= 8 and x.device.type == "cpu" else None
    bytes_ = xq.to(torch.int8) if few else None
    out = []
    for packed, s in packs:
        (R, K), M = packed.shape, len(xq)
        y = torch.empty(M, 4 * R, dtype=torch.float32 if few else xq.dtype, device=x.device)
        if few:
            call(few.product, packed, bytes_, y, R, K, M)
        else:  # 256 rows of bytes at a time, which are four times 256 rows of W
            for r in range(0, R, 256):
                part = packed[r : r + 256]
                for j in range(4):
                    y[:, j * R + r :][:, : len(part)] = xq @ ((part >> 2 * j & 3).to(xq.dtype) - 1).t()
        out.append((y * (a_inv * s)).to(dtype).view(*shape, y.shape[-1]))
    return tuple(out)


# For a CPU. product: y[m, r + j R] = sum over k of x[m, k] (w - 1), w two bits of p[r, k]: w is summed, and the sum of
# x taken off at the end. Plain C that gcc and clang turn into vectors: 16-bit products, added in pairs to 32 bits. The
# others are quantize_torch, quantize_weight_torch (scaled) and what BitLinear's backward does to dh, in one pass each.
SOURCE = r"""
void product(const uint8_t *p, const int8_t *x, float *y, num R, num K, num M) {
    for (num m = 0; m < M; m++) {
        int16_t wide[K];
        int32_t off = 0;
        for (num k = 0; k < K; k++) { wide[k] = x[m * K + k]; off += wide[k]; }
        #pragma omp parallel for schedule(static) if (R * K > 65536)
        for (num r = 0; r < R; r++) {
            const uint8_t *b = p + r * K;
            const int16_t *v = wide;
            int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (num k = 0; k < K; k++) {
                int16_t w = b[k];
                s0 += (int16_t)(w & 3) * v[k];
                s1 += (int16_t)(w >> 2 & 3) * v[k];
                s2 += (int16_t)(w >> 4 & 3) * v[k];
                s3 += (int16_t)(w >> 6) * v[k];
            }
            float *out = y + m * 4 * R + r;
            out[0] = s0 - off; out[R] = s1 - off; out[2 * R] = s2 - off; out[3 * R] = s3 - off;
        }
    }
}

/* x (M, K) -> xh (M, K) = xq / a, rstd (M,) */
void quantize(const void *x, const float *g, void *xh, float *rstd, num M, num K, const float *eps, num x16, num h16) {
    #pragma omp parallel for schedule(static)
    for (num m = 0; m < M; m++) {
        float v[K], sum = 0, top = 0;
        get(x, x16, m * K, K, v);
        #pragma omp simd reduction(+:sum)
        for (num k = 0; k < K; k++) sum += v[k] * v[k];
        float r = 1 / sqrtf(sum / K + *eps);
        #pragma omp simd reduction(max:top)
        for (num k = 0; k < K; k++) {
            v[k] *= r * g[k];
            top = fabsf(v[k]) > top ? fabsf(v[k]) : top;
        }
        top = top > 1e-5f ? top : 1e-5f;
        float a = 127 / top, a_inv = top / 127;
        for (num k = 0; k < K; k++) v[k] = rintf(v[k] * a) * a_inv;
        put(v, K, h16, xh, m * K);
        rstd[m] = r;
    }
}

/* w (n,) -> wh = s wq, s = the mean of |w|, by way of the sums of CHUNK each */
enum { CHUNK = 1024 };
void ternary(const void *w, void *wh, float *sums, num n, num w16, num h16) {
    double total = 0;
    #pragma omp parallel for schedule(static)
    for (num j = 0; j < n; j += CHUNK) {
        num m = n - j < CHUNK ? n - j : CHUNK;
        float v[CHUNK], sum = 0;
        get(w, w16, j, m, v);
        #pragma omp simd reduction(+:sum)
        for (num i = 0; i < m; i++) sum += fabsf(v[i]);
        sums[j / CHUNK] = sum;
    }
    for (num j = 0; j < n; j += CHUNK) total += sums[j / CHUNK];
    float s = total / n > 1e-5 ? total / n : 1e-5f, s_inv = 1 / s;
    #pragma omp parallel for schedule(static)
    for (num j = 0; j < n; j += CHUNK) {
        num m = n - j < CHUNK ? n - j : CHUNK;
        float v[CHUNK];
        get(w, w16, j, m, v);
        for (num i = 0; i < m; i++) {
            float q = rintf(v[i] * s_inv);
            v[i] = s * (q > 1 ? 1 : q < -1 ? -1 : q);
        }
        put(v, m, h16, wh, j);
    }
}

/* n = x rstd:  dx = rstd (dh g - n mean(dh g n)),  dg (threads, K) = sums over each thread's rows of dh n */
void backward(const void *dh, const void *x, const float *g, const float *rstd, void *dx, float *dg, num M, num K,
              num d16, num x16, num threads) {
    #pragma omp parallel for num_threads(threads)
    for (num t = 0; t < threads; t++) {
        float n[K], d[K], *dg_t = dg + t * K;
        memset(dg_t, 0, 4 * K);
        for (num m = M * t / threads; m < M * (t + 1) / threads; m++) {
            float r = rstd[m], mean = 0;
            get(x, x16, m * K, K, n), get(dh, d16, m * K, K, d);
            #pragma omp simd reduction(+:mean)
            for (num k = 0; k < K; k++) {
                n[k] *= r;
                dg_t[k] += d[k] * n[k];
                d[k] *= g[k];
                mean += d[k] * n[k];
            }
            mean /= K;
            for (num k = 0; k < K; k++) d[k] = r * (d[k] - mean * n[k]);
            put(d, K, x16, dx, m * K);
        }
    }
}
"""


# ---------------------------------------------------------------- Triton
if triton is not None:
    from .norm import norm_bwd_op


    # A program takes BM rows at a time: their norm, their largest value, their integers, in one pass.
    @triton.jit
    def rms_norm_quant_kernel(x, g, xq, a_inv, rstd, M, K, eps, BM: tl.constexpr, BK: tl.constexpr):
        o_k = tl.arange(0, BK)[None, :]
        m_k = o_k < K
        b_g = tl.load(g + o_k, mask=m_k, other=0.0).to(tl.float32)  # [1, BK]
        for i in range(tl.program_id(0), tl.cdiv(M, BM), tl.num_programs(0)):
            o_m = (i * BM + tl.arange(0, BM)[:, None]).to(tl.int64)  # [BM, 1]; int64: row * K can pass 2^31
            m_m = o_m < M
            b_x = tl.load(x + o_m * K + o_k, mask=m_m & m_k, other=0.0).to(tl.float32)  # [BM, BK]
            r = tl.rsqrt(tl.sum(b_x * b_x, 1, keep_dims=True) / K + eps)
            b_h = b_x * r * b_g
            top = tl.maximum(tl.max(tl.abs(b_h), 1, keep_dims=True), 1e-5)
            b_q = tl.extra.libdevice.rint(b_h * (127.0 / top))
            tl.store(xq + o_m * K + o_k, b_q.to(tl.int8), mask=m_m & m_k)
            finite = tl.sum(b_h * b_h, 1, keep_dims=True) < float("inf")  # integers and a maximum hide a NaN
            inverse = tl.where(finite, top / 127.0, float("nan"))
            tl.store(a_inv + o_m, inverse, mask=m_m)
            tl.store(rstd + o_m, r, mask=m_m)

    # s needs all of W: each program writes a partial sum of |W|, PyTorch adds them in a fixed order.
    @triton.jit
    def abs_sum_kernel(w, part, n, per, BLOCK: tl.constexpr):
        start = tl.program_id(0).to(tl.int64) * per
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(start, tl.minimum(start + per, n), BLOCK):
            o = i + tl.arange(0, BLOCK)
            total += tl.abs(tl.load(w + o, mask=o < tl.minimum(start + per, n), other=0.0).to(tl.float32))
        tl.store(part + tl.program_id(0), tl.sum(total, 0))

    @triton.jit
    def ternary_kernel(w, s, wq, n, BLOCK: tl.constexpr):
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_w = tl.load(w + o, mask=o < n, other=0.0).to(tl.float32) * (1.0 / tl.load(s))
        b_q = tl.minimum(tl.maximum(tl.extra.libdevice.rint(b_w), -1.0), 1.0)
        tl.store(wq + o, b_q.to(tl.int8), mask=o < n)

    # y = (xq Wq^T) s / a: int8 products summed in int32, exactly
    @triton.jit
    def int8_kernel(xq, a_inv, wq, s, y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
        n_n = tl.cdiv(N, BN)
        o_m = (tl.program_id(0) // n_n).to(tl.int64) * BM + tl.arange(0, BM)
        o_n = (tl.program_id(0) % n_n).to(tl.int64) * BN + tl.arange(0, BN)
        m_m, m_n = o_m < M, o_n < N
        acc = tl.zeros((BM, BN), tl.int32)
        for k in range(0, K, BK):
            o_k = k + tl.arange(0, BK)
            b_x = tl.load(xq + o_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & (o_k < K)[None, :], other=0)
            b_w = tl.load(wq + o_n[:, None] * K + o_k[None, :], mask=m_n[:, None] & (o_k < K)[None, :], other=0)
            acc = tl.dot(b_x, tl.trans(b_w), acc, out_dtype=tl.int32)  # [BM, BK] [BK, BN]
        b_a = tl.load(a_inv + o_m, mask=m_m, other=0.0) * tl.load(s)
        tl.store(y + o_m[:, None] * N + o_n[None, :], acc.to(tl.float32) * b_a[:, None],
                 mask=m_m[:, None] & m_n[None, :])

    # The same from bytes (R = N / 4 rows): a byte of row r has a weight of each of the rows r, r + R, r + 2 R, r + 3 R.
    @triton.jit
    def packed_kernel(xq, a_inv, packed, s, y, M, R, K, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
        n_r = tl.cdiv(R, BR)
        o_m = (tl.program_id(0) // n_r).to(tl.int64) * BM + tl.arange(0, BM)
        o_r = (tl.program_id(0) % n_r).to(tl.int64) * BR + tl.arange(0, BR)
        m_m, m_r = o_m < M, o_r < R
        acc0 = tl.zeros((BM, BR), tl.int32)
        acc1 = tl.zeros((BM, BR), tl.int32)
        acc2 = tl.zeros((BM, BR), tl.int32)
        acc3 = tl.zeros((BM, BR), tl.int32)
        for k in range(0, K, BK):
            o_k = k + tl.arange(0, BK)  # past K b_x is 0
            b_x = tl.load(xq + o_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & (o_k < K)[None, :], other=0)
            b_p = tl.load(packed + o_r[:, None] * K + o_k[None, :], mask=m_r[:, None] & (o_k < K)[None, :], other=0)
            b_p = tl.trans(b_p)  # [BK, BR]
            acc0 = tl.dot(b_x, (b_p & 3).to(tl.int8) - 1, acc0, out_dtype=tl.int32)
            acc1 = tl.dot(b_x, (b_p >> 2 & 3).to(tl.int8) - 1, acc1, out_dtype=tl.int32)
            acc2 = tl.dot(b_x, (b_p >> 4 & 3).to(tl.int8) - 1, acc2, out_dtype=tl.int32)
            acc3 = tl.dot(b_x, (b_p >> 6).to(tl.int8) - 1, acc3, out_dtype=tl.int32)
        b_a = (tl.load(a_inv + o_m, mask=m_m, other=0.0) * tl.load(s))[:, None]
        p_y = y + o_m[:, None] * (4 * R) + o_r[None, :]
        m = m_m[:, None] & m_r[None, :]
        tl.store(p_y, acc0.to(tl.float32) * b_a, mask=m)
        tl.store(p_y + R, acc1.to(tl.float32) * b_a, mask=m)
        tl.store(p_y + 2 * R, acc2.to(tl.float32) * b_a, mask=m)
        tl.store(p_y + 3 * R, acc3.to(tl.float32) * b_a, mask=m)

    @custom_op("kernels::rms_norm_quant", mutates_args=())
    def rms_norm_quant_op(x: torch.Tensor, g: torch.Tensor, eps: float
                          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (M, K) -> xq int8, 1 / a (M,), 1 / rms (M,)."""
        M, K = x.shape
        xq = torch.empty_like(x, dtype=torch.int8)
        a_inv, rstd = (torch.empty(M, dtype=torch.float32, device=x.device) for _ in range(2))
        BK = triton.next_power_of_2(K)
        BM = max(1, 1024 // BK)
        sm = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 46
        grid = (max(1, min(2 * sm, triton.cdiv(M, BM))),)
        if M:
            rms_norm_quant_kernel[grid](x, g, xq, a_inv, rstd, M, K, eps, BM=BM, BK=BK,
                                        num_warps=4 if BK <= 1024 else 8 if BK <= 4096 else 16)
        return xq, a_inv, rstd

    @custom_op("kernels::quantize_weight", mutates_args=())
    def quantize_weight_op(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n, programs = w.numel(), 256
        per = triton.cdiv(triton.cdiv(n, programs), 1024) * 1024
        programs = triton.cdiv(n, per)
        part = torch.empty(programs, dtype=torch.float32, device=w.device)
        abs_sum_kernel[(programs,)](w, part, n, per, BLOCK=1024)
        s = (part.sum() / n).clamp(min=1e-5)
        wq = torch.empty_like(w, dtype=torch.int8)
        ternary_kernel[(triton.cdiv(n, 1024),)](w, s, wq, n, BLOCK=1024)
        return wq, s

    @custom_op("kernels::int8_linear", mutates_args=())
    def int8_linear_op(xq: torch.Tensor, a_inv: torch.Tensor, wq: torch.Tensor, s: torch.Tensor,
                       dtype: torch.dtype) -> torch.Tensor:
        (M, K), N = xq.shape, wq.shape[0]
        y = torch.empty(M, N, dtype=dtype, device=xq.device)
        BM, BN, BK, warps, stages = (128, 128, 64, 8, 3) if M > 64 and N > 64 else (64, 64, 64, 4, 4)
        if K % 16:  # zeros, so that rows begin where 16 bytes are one load
            xq, wq = (torch.nn.functional.pad(t, (0, -K % 16)) for t in (xq, wq))
            K = xq.shape[1]
        if M:
            int8_kernel[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](xq, a_inv, wq, s, y, M, N, K, BM=BM, BN=BN, BK=BK,
                                                                    num_warps=warps, num_stages=stages)
        return y

    @custom_op("kernels::packed_linear", mutates_args=())
    def packed_linear_op(xq: torch.Tensor, a_inv: torch.Tensor, packed: torch.Tensor, s: torch.Tensor,
                         dtype: torch.dtype) -> torch.Tensor:
        (M, K), R = xq.shape, packed.shape[0]
        y = torch.empty(M, 4 * R, dtype=dtype, device=xq.device)
        # generation: thin tiles, long K, so that many bytes are on their way; else four tiles of 64 x 32. Where 16 does
        # not divide K, bytes are loaded one by one, each with its own address: smaller ones
        BM, BR, BK, warps, stages = (16, 16, 128 if K % 16 else 256, 4, 4) if M <= 16 else (
            64, 16 if K % 16 else 32, 64, 4, 3)
        if M:
            packed_kernel[(triton.cdiv(M, BM) * triton.cdiv(R, BR),)](xq, a_inv, packed, s, y, M, R, K, BM=BM, BR=BR,
                                                                      BK=BK, num_warps=warps, num_stages=stages)
        return y

    @rms_norm_quant_op.register_fake
    def _(x, g, eps):
        row = lambda: x.new_empty(x.shape[0], dtype=torch.float32)
        return torch.empty_like(x, dtype=torch.int8), row(), row()

    @quantize_weight_op.register_fake
    def _(w):
        return torch.empty_like(w, dtype=torch.int8), w.new_empty((), dtype=torch.float32)

    @int8_linear_op.register_fake
    def _(xq, a_inv, wq, s, dtype):
        return xq.new_empty(xq.shape[0], wq.shape[0], dtype=dtype)

    @packed_linear_op.register_fake
    def _(xq, a_inv, packed, s, dtype):
        return xq.new_empty(xq.shape[0], 4 * packed.shape[0], dtype=dtype)

    class BitLinearTriton(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, g, eps, *weights):
            dtype, shape, x = out_dtype(x), x.shape[:-1], x.reshape(-1, x.shape[-1]).contiguous()
            xq, a_inv, rstd = rms_norm_quant_op(x, g, eps)
            wqs = [quantize_weight_op(w.detach().contiguous()) for w in weights]
            ctx.save_for_backward(x, g, rstd, xq, a_inv, *(t for pair in wqs for t in pair))
            ctx.w_dtypes, ctx.shape = [w.dtype for w in weights], shape
            return tuple(int8_linear_op(xq, a_inv, wq, s, dtype).view(*shape, len(wq)) for wq, s in wqs)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *dys):
            x, g, rstd, xq, a_inv, *wqs = ctx.saved_tensors
            dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
            xh = (xq * a_inv[:, None]).to(dys[0].dtype)
            dws = [(dy.t() @ xh).to(dtype) for dy, dtype in zip(dys, ctx.w_dtypes)]
            dh = None
            for dy, wq, s in zip(dys, wqs[::2], wqs[1::2]):
                w = wq * s.to(dy.dtype)
                dh = dy @ w if dh is None else dh.addmm_(dy, w)
            if x.shape[1] <= 8192:
                dx, dg = norm_bwd_op(dh, None, x, g, rstd[None], False)
                dg = dg[0]
            else:  # too wide for that kernel's registers
                n, dh = x * rstd[:, None], dh.float()
                dx, dg = dh * g, (dh * n).sum(0)
                dx = rstd[:, None] * (dx - n * (dx * n).mean(1, keepdim=True))
            return dx.to(x.dtype).view(*ctx.shape, x.shape[-1]), dg.to(g.dtype), None, *dws


def check(x, g, matrices, columns):
    shapes = [tuple(t.shape) for t in (x, g, *matrices)]
    if g.shape != x.shape[-1:] or any(w.ndim != 2 or w.shape[1] != x.shape[-1] for w in matrices):
        raise ValueError(f"bit_linear: shapes {shapes}, expected x (..., K), g (K,) and {columns}")
    if form(x) == "triton" and x.shape[-1] > 16384:
        raise ValueError(f"bit_linear: rows of {x.shape[-1]} are too wide, at most 16384")


def quantize_weight(w):
    """w (N, K) -> Wq (N, K) int8 of -1, 0, 1 and s, a scalar."""
    which = form(w)
    if which == "ref":
        return quantize_weight_ref(w)
    if which == "triton":
        return quantize_weight_op(w.detach().contiguous())
    wq, s = quantize_weight_torch(w)
    return wq.to(torch.int8), s


def bit_linear(x, g, weights, eps=1e-5):
    """x (..., K), g (K,), weights: several (N_i, K) -> (..., N_i) each, in x's (or autocast's) dtype.
    ValueError: shapes that do not fit."""
    check(x, g, weights, "W (N, K)")
    which = form(x)
    if which == "ref":
        return bit_linear_ref(x, g, weights, eps)
    return (BitLinear if which == "torch" else BitLinearTriton).apply(x, g, eps, *weights)


@torch.no_grad()
def packed_linear(x, g, packs, eps=1e-5):
    """x (..., K), g (K,), packs: bytes (N_i/4, K), s -> (..., N_i) each, in x's (or autocast's) dtype; no gradient."""
    check(x, g, [p for p, _ in packs], "bytes (N / 4, K)")
    which = form(x)
    if which == "ref":
        return packed_linear_ref(x, g, packs, eps)
    if which == "torch":
        return packed_linear_torch(x, g, packs, eps)
    dtype, rows = out_dtype(x), x.reshape(-1, x.shape[-1]).contiguous()
    xq, a_inv, _ = rms_norm_quant_op(rows, g, eps)
    return tuple(packed_linear_op(xq, a_inv, p, s, dtype).view(*x.shape[:-1], 4 * len(p)) for p, s in packs)
