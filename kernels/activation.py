"""
The activations of feed-forward layers

    gelu(x)           x Phi(x) in the tanh form, which is a sigmoid:  x sigma(2u),   u = sqrt(2 / pi) (x + 0.044715 x^3)
                      Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2
    bias_gelu(x, b)   gelu(x + b)
    swiglu(gate, up)  silu(gate) up,   silu(a) = a sigma(a)             Shazeer 2020, arXiv:2002.05202, eq. 6
    relu2glu(gate, up)   relu(gate)^2 up        So et al. 2021, arXiv:2109.08668 (squared ReLU); BitNet b1.58 2B4T

x, gate, up (..., F), b (F,) -> (..., F) in the dtype of the first argument: fp32, bf16 or fp16; b may be fp32 beside
16-bit x. Autocast changes nothing. Saved for backward: the inputs. Recomputed: all else, cheaper than to read it again.

Bytes, E per element, n elements: gelu and bias_gelu 2 E n forward and 3 E n backward, swiglu and relu2glu 3 E n and
5 E n: each input read once, each output written once, which is the floor. bias_gelu: b once more per program, and one
fp32 partial row of db per 64 rows or more, summed in a fixed order. Ten to thirty FLOPs an element: nothing beside the
bytes. gate and up may be the halves of one (..., 2F) tensor: they are not copied.

Plain form: F.gelu, whose autograd keeps x (or x + b in place of x). For swiglu and relu2glu autograd would keep more
than the inputs, so their backward is written by hand; on a CPU both are loops in C. kernels/grouped_gemm.py uses these.
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


def gelu_ref(x):
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    u = (2 / torch.pi) ** 0.5 * (x32 + 0.044715 * x32**3)
    return (0.5 * x32 * (1 + torch.tanh(u))).to(x.dtype)


def bias_gelu_ref(x, b):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return gelu_ref(x.to(dtype) + b.to(dtype)).to(x.dtype)


def swiglu_ref(gate, up):
    a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (gate, up))
    return (a * torch.sigmoid(a) * b).to(gate.dtype)


def relu2glu_ref(gate, up):
    a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (gate, up))
    return (a.relu().square() * b).to(gate.dtype)


def gelu_torch(x):
    return F.gelu(x, approximate="tanh")


def bias_gelu_torch(x, b):
    return F.gelu(x + b.to(x.dtype), approximate="tanh")


# h = act(gate) up for a CPU, and back: rows of F numbers, each tensor's so far apart as its stride says. ACT: silu,
# relu2 or gelu, of which PARTS gives value and slope.
SOURCE = r"""
static inline void silu(float a, float *y, float *dy) {
    float s = sigmoid(a);
    *y = a * s, *dy = s + a * s * (1 - s);
}
static inline void relu2(float a, float *y, float *dy) {
    float r = a > 0 ? a : 0;
    *y = r * r, *dy = 2 * r;
}
static inline void gelu(float a, float *y, float *dy) {
    float q = 0.044715f * a * a, s = sigmoid(1.59576912f * a * (1 + q));
    *y = a * s, *dy = s + a * s * (1 - s) * 1.59576912f * (1 + 3 * q);
}

#define GLU(ACT) \
void ACT##_glu(const void *gate, const void *up, void *h, num M, num F, num s_gate, num s_up, num s_h, num x16) { \
    _Pragma("omp parallel for schedule(static) if (M * F > 16384)") \
    for (num m = 0; m < M; m++) \
        for (num f = 0; f < F; f += RUN) { \
            num n = F - f < RUN ? F - f : RUN; \
            float room[2][RUN], out[RUN], *o = x16 ? out : (float *)h + m * s_h + f; \
            const float *g = see(gate, x16, m * s_gate + f, n, room[0]), *u = see(up, x16, m * s_up + f, n, room[1]); \
            _Pragma("omp simd") \
            for (num i = 0; i < n; i++) { \
                float y, dy; \
                ACT(g[i], &y, &dy); \
                o[i] = y * u[i]; \
            } \
            if (x16) put(o, n, 1, h, m * s_h + f); \
        } \
} \
void ACT##_glu_grad(const void *gate, const void *up, const void *dh, void *dgate, void *dup, num M, num F, \
                    num s_gate, num s_up, num s_dh, num s_dgate, num s_dup, num x16) { \
    _Pragma("omp parallel for schedule(static) if (M * F > 16384)") \
    for (num m = 0; m < M; m++) \
        for (num f = 0; f < F; f += RUN) { \
            num n = F - f < RUN ? F - f : RUN; \
            float room[3][RUN], out[2][RUN]; \
            float *og = x16 ? out[0] : (float *)dgate + m * s_dgate + f; \
            float *ou = x16 ? out[1] : (float *)dup + m * s_dup + f; \
            const float *g = see(gate, x16, m * s_gate + f, n, room[0]), *u = see(up, x16, m * s_up + f, n, room[1]), \
                *d = see(dh, x16, m * s_dh + f, n, room[2]); \
            _Pragma("omp simd") \
            for (num i = 0; i < n; i++) { \
                float y, dy; \
                ACT(g[i], &y, &dy); \
                og[i] = d[i] * u[i] * dy, ou[i] = d[i] * y; \
            } \
            if (x16) put(og, n, 1, dgate, m * s_dgate + f), put(ou, n, 1, dup, m * s_dup + f); \
        } \
}
GLU(silu) GLU(relu2) GLU(gelu)
"""
PLAIN = {"silu": F.silu, "relu2": lambda a: F.relu(a).square(), "gelu": lambda a: F.gelu(a, approximate="tanh")}


def in_c(name, *tensors):
    """Call the loop of that name on rows of one width, each tensor's with its stride; False if it cannot serve."""
    kinds = {(t.dtype, t.is_cpu) for t in tensors}
    if kinds not in ({(torch.float32, True)}, {(torch.bfloat16, True)}) or torch.compiler.is_compiling():
        return False
    if any(t.ndim != 2 or t.stride(1) != 1 for t in tensors) or compiled(SOURCE) is None:
        return False
    call(getattr(compiled(SOURCE), name), *tensors, *tensors[0].shape, *(t.stride(0) for t in tensors),
         int(tensors[0].dtype == torch.bfloat16))
    return True


def glu(gate, up, act):
    """act(gate) up of (M, F) tensors; no gradient."""
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return h if in_c(f"{act}_glu", gate, up, h) else PLAIN[act](gate).mul_(up)


def glu_grad(gate, up, dh, dgate, dup, act):
    """dgate = dh up act'(gate), dup = dh act(gate), written into dgate and dup: all (M, F)."""
    if in_c(f"{act}_glu_grad", gate, up, dh, dgate, dup):
        return
    torch.mul(dh, PLAIN[act](gate), out=dup)
    d = dh * up
    if act == "relu2":
        torch.mul(d, 2 * F.relu(gate), out=dgate)
    elif act == "silu":
        torch.ops.aten.silu_backward.grad_input(d, gate, grad_input=dgate)
    else:
        torch.ops.aten.gelu_backward.grad_input(d, gate, approximate="tanh", grad_input=dgate)


class GLU(torch.autograd.Function):
    """Keeps its inputs; autograd would keep more."""

    @staticmethod
    def forward(ctx, gate, up, act):
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return glu(*(t.reshape(-1, t.shape[-1]) for t in (gate, up)), act).view(gate.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        gate, up, dh = (t.reshape(-1, t.shape[-1]) for t in (*ctx.saved_tensors, dy))
        dgate, dup = (torch.empty(dy.shape, dtype=dy.dtype, device=dy.device) for _ in range(2))
        glu_grad(gate, up, dh, dgate.view(gate.shape), dup.view(gate.shape), ctx.act)
        return dgate, dup, None


def swiglu_torch(gate, up):
    return GLU.apply(gate, up, "silu")


def relu2glu_torch(gate, up):
    return GLU.apply(gate, up, "relu2")


if triton is not None:
    # y = x s,   s = sigma(2u),   dy/dx = s + x s (1 - s) 2u',   2u' = 2 sqrt(2 / pi) (1 + 3 0.044715 x^2)
    @triton.jit
    def gelu_parts(x):
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))        # 2 sqrt(2 / pi)
        return x * s, s + x * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))

    @triton.jit
    def gelu_fwd_kernel(x, y, n, BLOCK: tl.constexpr):
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_y, _ = gelu_parts(tl.load(x + o, mask=o < n, other=0.0).to(tl.float32))
        tl.store(y + o, b_y, mask=o < n)

    @triton.jit
    def gelu_bwd_kernel(x, dy, dx, n, BLOCK: tl.constexpr):
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        _, b_d = gelu_parts(tl.load(x + o, mask=o < n, other=0.0).to(tl.float32))
        tl.store(dx + o, b_d * tl.load(dy + o, mask=o < n, other=0.0).to(tl.float32), mask=o < n)

    # A program of the bias kernels has BF columns and ROWS rows, so b is loaded once for all of them.
    @triton.jit
    def bias_gelu_fwd_kernel(x, b, y, N, n_cols, ROWS: tl.constexpr, BF: tl.constexpr):
        o_f = tl.program_id(1) * BF + tl.arange(0, BF)
        m_f = o_f < n_cols
        b_b = tl.load(b + o_f, mask=m_f, other=0.0).to(tl.float32)
        i0 = tl.program_id(0).to(tl.int64) * ROWS
        for i in range(i0, tl.minimum(i0 + ROWS, N)):
            b_y, _ = gelu_parts(tl.load(x + i * n_cols + o_f, mask=m_f, other=0.0).to(tl.float32) + b_b)
            tl.store(y + i * n_cols + o_f, b_y, mask=m_f)

    # dx = dy gelu'(x + b);   db = sum over rows of dx: a row of `part` per program, summed by PyTorch
    @triton.jit
    def bias_gelu_bwd_kernel(x, b, dy, dx, part, N, n_cols, ROWS: tl.constexpr, BF: tl.constexpr):
        o_f = tl.program_id(1) * BF + tl.arange(0, BF)
        m_f = o_f < n_cols
        b_b = tl.load(b + o_f, mask=m_f, other=0.0).to(tl.float32)
        b_db = tl.zeros((BF,), tl.float32)
        i0 = tl.program_id(0).to(tl.int64) * ROWS
        for i in range(i0, tl.minimum(i0 + ROWS, N)):
            _, b_d = gelu_parts(tl.load(x + i * n_cols + o_f, mask=m_f, other=0.0).to(tl.float32) + b_b)
            b_dx = b_d * tl.load(dy + i * n_cols + o_f, mask=m_f, other=0.0).to(tl.float32)
            tl.store(dx + i * n_cols + o_f, b_dx, mask=m_f)
            b_db += b_dx
        tl.store(part + tl.program_id(0).to(tl.int64) * n_cols + o_f, b_db, mask=m_f)

    # swiglu     y = a s u,   s = sigma(a);   da = dy u s (1 + a (1 - s)),   du = dy a s      (a = gate, u = up)
    # relu2glu   y = r r u,   r = relu(a);    da = dy u 2 r,                 du = dy r r
    @triton.jit
    def glu_fwd_kernel(gate, up, y, n_cols, stride_gate, stride_up, SQUARE: tl.constexpr, BF: tl.constexpr):
        i = tl.program_id(0).to(tl.int64)
        o_f = tl.program_id(1) * BF + tl.arange(0, BF)
        m_f = o_f < n_cols
        b_a = tl.load(gate + i * stride_gate + o_f, mask=m_f, other=0.0).to(tl.float32)
        b_u = tl.load(up + i * stride_up + o_f, mask=m_f, other=0.0).to(tl.float32)
        b_f = tl.maximum(b_a, 0.0) * b_a if SQUARE else b_a * tl.sigmoid(b_a)
        tl.store(y + i * n_cols + o_f, b_f * b_u, mask=m_f)

    @triton.jit
    def glu_bwd_kernel(gate, up, dy, dgate, dup, n_cols, stride_gate, stride_up, SQUARE: tl.constexpr,
                       BF: tl.constexpr):
        i = tl.program_id(0).to(tl.int64)
        o_f = tl.program_id(1) * BF + tl.arange(0, BF)
        m_f = o_f < n_cols
        b_a = tl.load(gate + i * stride_gate + o_f, mask=m_f, other=0.0).to(tl.float32)
        b_u = tl.load(up + i * stride_up + o_f, mask=m_f, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + i * n_cols + o_f, mask=m_f, other=0.0).to(tl.float32)
        if SQUARE:
            b_f = tl.maximum(b_a, 0.0) * b_a
            b_d = 2.0 * tl.maximum(b_a, 0.0)
        else:
            b_s = tl.sigmoid(b_a)
            b_f = b_a * b_s
            b_d = b_s * (1.0 + b_a * (1.0 - b_s))
        tl.store(dgate + i * n_cols + o_f, b_dy * b_u * b_d, mask=m_f)
        tl.store(dup + i * n_cols + o_f, b_dy * b_f, mask=m_f)

    BLOCK = 1024  # elements a program of 4 warps holds at once: 8 a thread, one 128-bit load in 16-bit types

    def columns(n_cols):
        """Elements of a row that a program takes, and how many programs a row needs."""
        bf = min(BLOCK, triton.next_power_of_2(n_cols))
        return bf, triton.cdiv(n_cols, bf)

    def bias_blocks(x):
        """Rows of a program: 64, or more so that at most 512 programs share a column; then its columns as above."""
        n_cols = x.shape[-1]
        N = x.numel() // max(1, n_cols)
        rows = max(64, triton.next_power_of_2(triton.cdiv(N, 512)))
        bf, blocks = columns(n_cols)
        return N, n_cols, (triton.cdiv(N, rows), blocks), dict(ROWS=rows, BF=bf)

    def rows_of(x):
        """(N, F) with stride 1 along F: a view where it can be, so halves of a larger tensor are not copied."""
        x = x.reshape(-1, x.shape[-1])
        return x if x.stride(1) == 1 else x.contiguous()

    @custom_op("kernels::gelu", mutates_args=())
    def gelu_op(x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        gelu_fwd_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK)
        return y

    @custom_op("kernels::gelu_bwd", mutates_args=())
    def gelu_bwd_op(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        x, dy = x.contiguous(), dy.contiguous()
        dx = torch.empty_like(x)
        gelu_bwd_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, dy, dx, x.numel(), BLOCK=BLOCK)
        return dx

    @custom_op("kernels::bias_gelu", mutates_args=())
    def bias_gelu_op(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x, b = x.contiguous(), b.contiguous()
        y = torch.empty_like(x)
        N, n_cols, grid, how = bias_blocks(x)
        bias_gelu_fwd_kernel[grid](x, b, y, N, n_cols, **how)
        return y

    @custom_op("kernels::bias_gelu_bwd", mutates_args=())
    def bias_gelu_bwd_op(x: torch.Tensor, b: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, b, dy = x.contiguous(), b.contiguous(), dy.contiguous()
        dx = torch.empty_like(x)
        N, n_cols, grid, how = bias_blocks(x)
        part = x.new_empty(grid[0], n_cols, dtype=torch.float32)
        bias_gelu_bwd_kernel[grid](x, b, dy, dx, part, N, n_cols, **how)
        return dx, part.sum(0).to(b.dtype)

    @custom_op("kernels::glu", mutates_args=())
    def glu_op(gate: torch.Tensor, up: torch.Tensor, square: bool) -> torch.Tensor:
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        gate, up = rows_of(gate), rows_of(up)
        bf, blocks = columns(gate.shape[1])
        glu_fwd_kernel[(gate.shape[0], blocks)](
            gate, up, y, gate.shape[1], gate.stride(0), up.stride(0), SQUARE=square, BF=bf)
        return y

    @custom_op("kernels::glu_bwd", mutates_args=())
    def glu_bwd_op(gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, square: bool
                   ) -> tuple[torch.Tensor, torch.Tensor]:
        dy = dy.contiguous()
        dgate, dup = torch.empty_like(dy), torch.empty_like(dy)
        gate, up = rows_of(gate), rows_of(up)
        bf, blocks = columns(gate.shape[1])
        glu_bwd_kernel[(gate.shape[0], blocks)](
            gate, up, dy, dgate, dup, gate.shape[1], gate.stride(0), up.stride(0), SQUARE=square, BF=bf)
        return dgate, dup

    dense = lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gelu_op.register_fake(dense)
    gelu_bwd_op.register_fake(lambda x, dy: dense(x))
    bias_gelu_op.register_fake(lambda x, b: dense(x))
    bias_gelu_bwd_op.register_fake(lambda x, b, dy: (dense(x), dense(b)))
    glu_op.register_fake(lambda gate, up, square: dense(gate))
    glu_bwd_op.register_fake(lambda gate, up, dy, square: (dense(dy), dense(dy)))

    save_inputs = lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    gelu_op.register_autograd(lambda ctx, dy: gelu_bwd_op(*ctx.saved_tensors, dy), setup_context=save_inputs)
    bias_gelu_op.register_autograd(lambda ctx, dy: bias_gelu_bwd_op(*ctx.saved_tensors, dy), setup_context=save_inputs)

    def save_glu(ctx, inputs, output):
        gate, up, ctx.square = inputs
        ctx.save_for_backward(gate, up)

    glu_op.register_autograd(lambda ctx, dy: (*glu_bwd_op(*ctx.saved_tensors, dy, ctx.square), None),
                             setup_context=save_glu)


def gelu(x):
    """Tanh-form GELU of x, any shape."""
    which = form(x)
    if which == "ref":
        return gelu_ref(x)
    return gelu_torch(x) if which == "torch" else gelu_op(x)


def bias_gelu(x, b):
    """gelu(x + b): x (..., F), b (F,) -> (..., F) in x's dtype."""
    if b.shape != x.shape[-1:]:
        raise ValueError(f"bias_gelu: b {tuple(b.shape)}, ({x.shape[-1]},) expected for x {tuple(x.shape)}")
    which = form(x)
    if which == "ref":
        return bias_gelu_ref(x, b)
    return bias_gelu_torch(x, b) if which == "torch" else bias_gelu_op(x, b)


def swiglu(gate, up):
    """silu(gate) up: two tensors of one shape and dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype} differ")
    which = form(gate)
    if which == "ref":
        return swiglu_ref(gate, up)
    return swiglu_torch(gate, up) if which == "torch" else glu_op(gate, up, False)


def relu2glu(gate, up):
    """relu(gate)^2 up: two tensors of one shape and dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"relu2glu: gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype} differ")
    which = form(gate)
    if which == "ref":
        return relu2glu_ref(gate, up)
    return relu2glu_torch(gate, up) if which == "torch" else glu_op(gate, up, True)
