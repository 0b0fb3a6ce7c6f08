"""
Causal depthwise convolution over time, with a SiLU after it: it mixes neighbouring tokens in Mamba, Mamba-2 and others
    Gu & Dao 2023, arXiv:2312.00752v2, section 3.4 and figure 3 (their package: causal-conv1d)

    a_t = b + sum_i w_i x_{t-W+1+i}      i = 0..W-1; each channel has its own W taps; x_t for t < 0 is `initial`, or 0
    y_t = a_t sigmoid(a_t)               activation="silu"; None: y = a
    backward   da = dy sigmoid(a) (1 + a (1 - sigmoid(a)));  dx_t = sum_i w_i da_{t+W-1-i}
               dw_i = sum_t da_t x_{t-W+1+i};  db = sum_t da_t;  dinitial is dx at the times before 0

Shapes, channels last: x (B, T, E), w (E, W), b (E,), initial (B, W-1, E) -> y (B, T, E) in x's dtype. fp32, bf16 or
fp16; w and b may be fp32 beside a 16-bit x. x may be some columns of a wider tensor (half of a projection's output):
the kernels take its strides, there is no copy. Arithmetic is fp32 whatever the tensors are: autocast changes nothing.

Saved for backward: x, w, b, initial. a is recomputed.
Bytes: forward reads x and writes y once, which is the floor, backward reads dy and x and writes dx once: a tile asks W
times (backward 2W-1 times) for overlapping rows, and gets all but the first from the multiprocessor's own cache. Each
program of backward writes its sums for dw and db, one row for 128 of x, which PyTorch adds up in a fixed order: results
repeat bit for bit. FLOPs an element: 2W + 5 forward, about W (2W + 12) + 4W backward, since a tile computes a at its
own rows and the W-1 after them W times over; with W = 4 in bf16 memory is still the bound (504 GB/s against 29 TFLOPS).

CPU: one pass each way as a loop in C, fp32 or bf16; without a compiler, in fp64 and under torch.compile the definition.
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


def causal_conv1d_ref(x, w, b=None, initial=None, activation="silu"):
    """The definition; fp32 inside, fp64 for fp64."""
    (B, T, E), W, dtype = x.shape, w.shape[1], torch.promote_types(x.dtype, torch.float32)
    before = x.new_zeros(B, W - 1, E, dtype=dtype) if initial is None else initial.to(dtype)
    inputs = torch.cat([before, x.to(dtype)], 1)  # (B, W-1+T, E)
    a = x.new_zeros(B, T, E, dtype=dtype) if b is None else b.to(dtype).expand(B, T, E)
    for i in range(W):
        a = a + w[:, i] * inputs[:, i:i + T]
    return (torch.nn.functional.silu(a) if activation == "silu" else a).to(x.dtype)


# W, the number of taps, is known when the loops are compiled. A thread has a run of one sequence's times, and the last
# W rows of x (backward: of dx, too, which da_t adds to) in a ring. x: `step` elements from one time to the next.
SOURCE = r"""
#define RING(t) (((t) + W) % W)

static void row(const void *x, const void *initial, num b, num t, num E, num step_b, num step, num x16, num i16,
                float *to) {
    if (t >= 0) get(x, x16, b * step_b + t * step, E, to);
    else if (initial) get(initial, i16, (b * (W - 1) + t + W - 1) * E, E, to);
    else memset(to, 0, 4 * E);
}

static void conv(const float *x, const float *taps, const float *bias, num t, num E, float *a) {
    const float *at[W];  /* x_t, x_{t-1}, ... */
    for (num k = 0; k < W; k++) at[k] = x + RING(t - k) * E;
    for (num e = 0; e < E; e++) {
        float sum = bias ? bias[e] : 0;
        for (num k = 0; k < W; k++) sum += taps[(W - 1 - k) * E + e] * at[k][e];
        a[e] = sum;
    }
}

void forward(const void *x, const float *taps, const float *bias, const void *initial, void *y, num B, num T, num E,
             num parts, num step_b, num step, num silu, num x16, num i16) {
    num run = (T + parts - 1) / parts;
    #pragma omp parallel for schedule(static) if (B * T > 8)
    for (num i = 0; i < B * parts; i++) {
        num b = i / parts, first = i % parts * run, end = first + run < T ? first + run : T;
        float ring[W * E], a[E];
        for (num t = first - W + 1; t < first; t++)
            row(x, initial, b, t, E, step_b, step, x16, i16, ring + RING(t) * E);
        for (num t = first; t < end; t++) {
            row(x, initial, b, t, E, step_b, step, x16, i16, ring + RING(t) * E);
            conv(ring, taps, bias, t, E, a);
            if (silu) for (num e = 0; e < E; e++) a[e] *= sigmoid(a[e]);
            put(a, E, x16, y, (b * T + t) * E);
        }
    }
}

/* dx_t is whole once da_{t+W-1} is there: a run goes on for W - 1 times after its end. sums (B parts, W + 1, E) */
void backward(const void *x, const float *taps, const float *bias, const void *initial, const void *dy, void *dx,
              void *dinitial, float *sums, num B, num T, num E, num parts, num step_b, num step, num silu, num x16,
              num i16) {
    num run = (T + parts - 1) / parts;
    #pragma omp parallel for schedule(static)
    for (num i = 0; i < B * parts; i++) {
        num b = i / parts, first = i % parts * run, end = first + run < T ? first + run : T;
        float ring[W * E], dring[W * E], a[E], da[E], *dtaps = sums + i * (W + 1) * E, *db = dtaps + W * E;
        memset(dtaps, 0, 4 * (W + 1) * E);
        memset(dring, 0, sizeof dring);
        for (num t = first - W + 1; t < first; t++)
            row(x, initial, b, t, E, step_b, step, x16, i16, ring + RING(t) * E);
        for (num t = first; t < end + W - 1; t++) {
            if (t < T) {
                row(x, initial, b, t, E, step_b, step, x16, i16, ring + RING(t) * E);
                conv(ring, taps, bias, t, E, a);
                get(dy, x16, (b * T + t) * E, E, da);
                if (silu) for (num e = 0; e < E; e++) {
                    float s = sigmoid(a[e]);
                    da[e] *= s * (1 + a[e] * (1 - s));
                }
                memset(dring + RING(t) * E, 0, 4 * E);
                for (num k = 0; k < W; k++) {
                    float *d = dring + RING(t - k) * E, *x_k = ring + RING(t - k) * E, *sum = dtaps + (W - 1 - k) * E;
                    const float *tap = taps + (W - 1 - k) * E;
                    #pragma omp simd
                    for (num e = 0; e < E; e++) d[e] += tap[e] * da[e];
                    if (t < end) {
                        #pragma omp simd
                        for (num e = 0; e < E; e++) sum[e] += da[e] * x_k[e];
                    }
                }
                if (t < end) for (num e = 0; e < E; e++) db[e] += da[e];
            }
            num u = t - W + 1;
            if (u >= first) put(dring + RING(u) * E, E, x16, dx, (b * T + u) * E);
            else if (u < 0 && initial) put(dring + RING(u) * E, E, i16, dinitial, (b * (W - 1) + t) * E);
        }
    }
}
"""


@functools.cache
def library(W):
    return compiled(f"enum {{ W = {W} }};" + SOURCE)


class CompiledConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, initial, silu):
        x = x if x.stride(2) == 1 else x.contiguous()
        initial = None if initial is None else initial.contiguous()
        ctx.save_for_backward(x, w, b, initial)
        B, T, E = x.shape
        parts = max(1, min(T // 16, -(-torch.get_num_threads() // B)))
        parts = -(-T // -(-T // parts))  # none of them without a time: it would read past the end
        ctx.how = B, T, E, parts, *x.stride()[:2], int(silu), *(int(t is not None and t.dtype == torch.bfloat16)
                                                                for t in (x, initial))
        y = torch.empty(x.shape, dtype=x.dtype)
        call(library(w.shape[1]).forward, x, *CompiledConv.wide(w, b), initial, y, *ctx.how)
        return y

    @staticmethod
    def wide(w, b):
        """-> taps (W, E) and b, fp32"""
        return w.t().float().contiguous(), None if b is None else b.float().contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, w, b, initial = ctx.saved_tensors
        (B, _, E, parts), W = ctx.how[:4], w.shape[1]
        dx, dinitial = torch.empty(x.shape, dtype=x.dtype), None if initial is None else torch.empty_like(initial)
        sums = dx.new_empty(B * parts, W + 1, E, dtype=torch.float32)
        call(library(W).backward, x, *CompiledConv.wide(w, b), initial, dy.contiguous(), dx, dinitial, sums, *ctx.how)
        sums = sums.sum(0)
        return dx, sums[:-1].t().to(w.dtype), None if b is None else sums[-1].to(b.dtype), dinitial, None


def causal_conv1d_torch(x, w, b=None, initial=None, activation="silu"):
    """A loop in C for fp32 and bf16 on a CPU; the definition elsewhere."""
    narrow = (torch.float32, torch.bfloat16)
    if (x.is_cpu and x.dtype in narrow and (initial is None or initial.dtype in narrow) and x.numel()
            and not torch.compiler.is_compiling() and library(w.shape[1])):
        return CompiledConv.apply(x, w, b, initial, activation == "silu")
    return causal_conv1d_ref(x, w, b, initial, activation)


if triton is not None:
    # A program has BE channels of one sequence and BT rows of time at once. w is (E, W): row e holds a channel's taps.

    @triton.jit
    def rows_at(x, initial, o_t, o_e, T, E, stride_t, W: tl.constexpr):
        """Inputs at times o_t [BT, 1]: x's from 0 on, before that initial's, or 0. x, initial: the sequence's first."""
        m_e = o_e < E
        b_x = tl.load(x + o_t * stride_t + o_e, mask=(o_t >= 0) & (o_t < T) & m_e, other=0.0).to(tl.float32)  # [BT, BE]
        if initial is not None:
            m = (o_t >= 1 - W) & (o_t < 0) & m_e
            b_x += tl.load(initial + (o_t + W - 1) * E + o_e, mask=m, other=0.0).to(tl.float32)
        return b_x

    @triton.jit
    def conv_rows(x, w, b, initial, o_t, o_e, T, E, stride_t, W: tl.constexpr):
        """a at the times o_t"""
        a = (rows_at(x, initial, o_t, o_e, T, E, stride_t, W)
             * tl.load(w + o_e * W + W - 1, mask=o_e < E, other=0.0).to(tl.float32))
        for k in tl.static_range(1, W):
            taps = tl.load(w + o_e * W + W - 1 - k, mask=o_e < E, other=0.0).to(tl.float32)  # [1, BE]
            a += rows_at(x, initial, o_t - k, o_e, T, E, stride_t, W) * taps
        if b is not None:
            a += tl.load(b + o_e, mask=o_e < E, other=0.0).to(tl.float32)
        return a

    @triton.jit
    def conv_fwd_kernel(x, w, b, initial, y, T, E, stride_b, stride_t, SILU: tl.constexpr, W: tl.constexpr,
                        BT: tl.constexpr, BE: tl.constexpr):
        i_b = tl.program_id(2).to(tl.int64)
        o_t = (tl.program_id(0) * BT + tl.arange(0, BT)[:, None]).to(tl.int64)  # [BT, 1]; t * stride can pass 2^31
        o_e = tl.program_id(1) * BE + tl.arange(0, BE)[None, :]
        if initial is not None:
            initial += i_b * (W - 1) * E
        a = conv_rows(x + i_b * stride_b, w, b, initial, o_t, o_e, T, E, stride_t, W)
        if SILU:
            a = a * tl.sigmoid(a)
        tl.store(y + i_b * T * E + o_t * E + o_e, a, mask=(o_t < T) & (o_e < E))

    # y = a s, s = sigmoid(a):   da = dy s (1 + a (1 - s)),   dx_t = sum_k w_{W-1-k} da_{t+k},
    #   dw_{W-1-k} = sum_t da_t x_{t-k}
    # A program has several tiles of time one after the other and holds the sums for dw, and in row W for db. With
    # initial the times begin at -(W-1), where dx is dinitial and da is 0.

    @triton.jit
    def conv_bwd_kernel(dy, x, w, b, initial, dx, dinitial, dw, T, E, stride_b, stride_t, SILU: tl.constexpr,
                        W: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BW: tl.constexpr, TILES: tl.constexpr):
        i_b = tl.program_id(2).to(tl.int64)
        o_e = tl.program_id(1) * BE + tl.arange(0, BE)[None, :]
        m_e = o_e < E
        o_w = tl.arange(0, BW)[:, None]
        b_dw = tl.zeros((BW, BE), tl.float32)
        x += i_b * stride_b
        dy += i_b * T * E
        dx += i_b * T * E
        first = 0
        if initial is not None:
            initial += i_b * (W - 1) * E
            dinitial += i_b * (W - 1) * E
            first = 1 - W
        for i in range(TILES):
            o_t = (first + (tl.program_id(0) * TILES + i) * BT + tl.arange(0, BT)[:, None]).to(tl.int64)  # [BT, 1]
            b_dx = tl.zeros((BT, BE), tl.float32)
            for k in tl.static_range(W):
                m = (o_t + k >= 0) & (o_t + k < T) & m_e
                da = tl.load(dy + (o_t + k) * E + o_e, mask=m, other=0.0).to(tl.float32)  # [BT, BE], at t + k
                if SILU:
                    a = conv_rows(x, w, b, initial, o_t + k, o_e, T, E, stride_t, W)
                    s = tl.sigmoid(a)
                    da *= s * (1 + a * (1 - s))
                b_dx += da * tl.load(w + o_e * W + W - 1 - k, mask=m_e, other=0.0).to(tl.float32)
                if k == 0:
                    for j in tl.static_range(W):
                        b_x = rows_at(x, initial, o_t - j, o_e, T, E, stride_t, W)
                        b_dw += tl.where(o_w == W - 1 - j, tl.sum(da * b_x, 0, keep_dims=True), 0.0)
                    b_dw += tl.where(o_w == W, tl.sum(da, 0, keep_dims=True), 0.0)
            tl.store(dx + o_t * E + o_e, b_dx, mask=(o_t >= 0) & (o_t < T) & m_e)
            if initial is not None:
                tl.store(dinitial + (o_t + W - 1) * E + o_e, b_dx, mask=(o_t < 0) & m_e)
        i_p = i_b * tl.num_programs(0) + tl.program_id(0)
        tl.store(dw + (i_p * (W + 1) + o_w) * E + o_e, b_dw, mask=(o_w <= W) & m_e)

    BE, TILES = 64, 16
    # rows of a tile, forward and backward: 8 and 4 elements a thread, since backward has about six tiles in registers
    BT_FWD, BT_BWD = 16, 8

    def side_by_side(x):
        return x if x.stride(2) == 1 else x.contiguous()

    @custom_op("kernels::causal_conv1d", mutates_args=())
    def conv_op(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, initial: torch.Tensor | None,
                silu: bool) -> torch.Tensor:
        x, w, initial = side_by_side(x), w.contiguous(), None if initial is None else initial.contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        B, T, E = x.shape
        grid = max(1, triton.cdiv(T, BT_FWD)), triton.cdiv(E, BE), B
        conv_fwd_kernel[grid](x, w, b, initial, y, T, E, *x.stride()[:2], SILU=silu, W=w.shape[1], BT=BT_FWD, BE=BE,
                              num_warps=4)
        return y

    @conv_op.register_fake
    def _(x, w, b, initial, silu):
        return x.new_empty(x.shape)

    @custom_op("kernels::causal_conv1d_bwd", mutates_args=())
    def conv_bwd_op(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None,
                    initial: torch.Tensor | None, silu: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> dx, dw with db in a last column (E, W+1) fp32, dinitial (empty without initial)."""
        x, w, initial = side_by_side(x), w.contiguous(), None if initial is None else initial.contiguous()
        (B, T, E), W = x.shape, w.shape[1]
        rows = T if initial is None else T + W - 1
        grid = max(1, triton.cdiv(rows, BT_BWD * TILES)), triton.cdiv(E, BE), B
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dinitial = x.new_empty(0) if initial is None else torch.empty_like(initial)
        dw = torch.empty(grid[0] * grid[2], W + 1, E, dtype=torch.float32, device=x.device)
        conv_bwd_kernel[grid](dy, x, w, b, initial, dx, dinitial, dw, T, E, *x.stride()[:2], SILU=silu, W=W,
                              BT=BT_BWD, BE=BE, BW=triton.next_power_of_2(W + 1), TILES=TILES, num_warps=4)
        return dx, dw.sum(0).t().contiguous(), dinitial

    @conv_bwd_op.register_fake
    def _(dy, x, w, b, initial, silu):
        dinitial = x.new_empty(0) if initial is None else initial.new_empty(initial.shape)
        return x.new_empty(x.shape), x.new_empty(w.shape[0], w.shape[1] + 1, dtype=torch.float32), dinitial

    def save_for_backward(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.silu = inputs[4]

    def conv_backward(ctx, dy):
        x, w, b, initial = ctx.saved_tensors
        dx, dw, dinitial = conv_bwd_op(dy.contiguous(), x, w, b, initial, ctx.silu)
        return (dx, dw[:, :-1].to(w.dtype), None if b is None else dw[:, -1].to(b.dtype),
                None if initial is None else dinitial, None)

    conv_op.register_autograd(conv_backward, setup_context=save_for_backward)


def causal_conv1d(x, w, b=None, initial=None, activation="silu"):
    """x (B, T, E), w (E, W), b (E,), initial (B, W-1, E): the inputs before x (None: zeros); activation "silu" or None
    -> y (B, T, E) in x's dtype. ValueError: shapes that do not fit, another activation."""
    shapes = [None if t is None else tuple(t.shape) for t in (x, w, b, initial)]
    (B, _, E), W = shapes[0], shapes[1][1]
    if shapes[1][0] != E or shapes[2] not in (None, (E,)) or shapes[3] not in (None, (B, W - 1, E)):
        raise ValueError(f"causal_conv1d: shapes {shapes}, expected x (B, T, E), w (E, W), b (E,), initial (B, W-1, E)")
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation {activation!r}, expected 'silu' or None")
    which = form(x)
    if which == "triton":
        return conv_op(x, w, b, initial, activation == "silu")
    return (causal_conv1d_ref if which == "ref" else causal_conv1d_torch)(x, w, b, initial, activation)
