"""
Rotary position embedding: each pair of channels of a query or key is turned by an angle that grows with its position
    Su et al. 2021, arXiv:2104.09864v5, eq. 34

    (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin)      for the D/2 pairs (x1, x2) of a head, cos and sin of the position
    pairs        half-split: x1 = x[:D/2], x2 = x[D/2:] (Llama, "rotate_half");
                 interleaved: x1 = x[::2], x2 = x[1::2] (the paper)
    backward     the inverse turn, dx = rope(dy, cos, -sin);  cos and sin take no gradient

Shapes: x (B, T, H, D), any strides (the kernel copies only where the last dimension is not contiguous); cos, sin
(T, D/2), or (T, H, D/2) where they differ by head -> y (B, T, H, D), contiguous, in x's dtype. A factor on the tables
(RetNet's 1 / sqrt(K), YaRN's temperature) is a factor on y, and is there in backward too. fp32 arithmetic.
Saved for backward: the tables. Bytes: x, y and the tables once when T has blocks enough to fill the GPU, which is the
floor; else the tables once for each of the programs that share out the batch. FLOPs: 3 an element: memory is the bound.
CPU: a loop in C, fp32 or bf16; without a compiler, in fp64 and under torch.compile the definition.
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


def rope_ref(x, cos, sin, interleaved=False):
    """The definition; fp32 inside, fp64 for fp64."""
    cos, sin = (t if t.ndim == 3 else t[:, None] for t in (cos, sin))  # (T, 1 or H, D/2)
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    x1, x2 = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)  # (B, T, H, D/2) each
    y = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return (torch.stack(y, -1).flatten(-2) if interleaved else torch.cat(y, -1)).to(x.dtype)


SOURCE = r"""
/* strides (batch, time, head) of x; tables of head h begin at h * per_head; sign -1: the inverse turn */
void rope(const void *x, const float *cos, const float *sin, void *y, num B, num T, num H, num D2, num step_b,
          num step_t, num step_h, num per_head, num interleaved, num sign, num x16) {
    #pragma omp parallel for schedule(static) if (B * T * H * D2 > 8192)
    for (num i = 0; i < B * T; i++)
        for (num h = 0; h < H; h++) {
            float u[2 * D2], v[2 * D2];
            const float *c = cos + (i % T * (per_head ? H : 1) + h * per_head) * D2, *s = sin + (c - cos);
            get(x, x16, i / T * step_b + i % T * step_t + h * step_h, 2 * D2, u);
            if (interleaved) for (num d = 0; d < D2; d++) {
                float turn = sign * s[d];
                v[2 * d] = u[2 * d] * c[d] - u[2 * d + 1] * turn;
                v[2 * d + 1] = u[2 * d + 1] * c[d] + u[2 * d] * turn;
            } else for (num d = 0; d < D2; d++) {
                float turn = sign * s[d];
                v[d] = u[d] * c[d] - u[D2 + d] * turn;
                v[D2 + d] = u[D2 + d] * c[d] + u[d] * turn;
            }
            put(v, 2 * D2, x16, y, (i * H + h) * 2 * D2);
        }
}
"""


class CompiledRope(torch.autograd.Function):
    @staticmethod
    def turn(x, cos, sin, interleaved, sign):
        x = x if x.stride(3) == 1 else x.contiguous()
        (B, T, H, D), y = x.shape, torch.empty(x.shape, dtype=x.dtype)
        call(compiled(SOURCE).rope, x, cos, sin, y, B, T, H, D // 2, *x.stride()[:3], int(cos.ndim == 3),
             int(interleaved), sign, int(x.dtype == torch.bfloat16))
        return y

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        cos, sin = (t.float().contiguous() for t in (cos, sin))
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return CompiledRope.turn(x, cos, sin, interleaved, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return CompiledRope.turn(dy, *ctx.saved_tensors, ctx.interleaved, -1), None, None, None


def rope_torch(x, cos, sin, interleaved=False):
    """A loop in C for fp32 and bf16 on a CPU; the definition elsewhere."""
    if (x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 4096
            and not torch.compiler.is_compiling() and compiled(SOURCE)):
        return CompiledRope.apply(x, cos, sin, interleaved)
    return rope_ref(x, cos, sin, interleaved)


if triton is not None:

    @triton.jit
    def rope_kernel(x, cos, sin, y, sx, B, T, H, D2, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, BT: tl.constexpr,
                    BH: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
        """sx: strides (batch, time, head). A program holds BT tokens' angles and turns all heads of its sequences."""
        o_t, o_h = tl.program_id(0) * BT + tl.arange(0, BT)[:, None, None], tl.arange(0, BH)[None, :, None]
        o_c, o_d = tl.arange(0, BC)[None, :, None], tl.arange(0, BD)[None, None, :]  # BC: 1 row of angles or one a head
        o = (o_t.to(tl.int64) * (1 if BC == 1 else H) + o_c) * D2 + o_d  # [BT, BC, BD]
        m = (o_t < T) & (o_c < H) & (o_d < D2)
        b_cos = tl.load(cos + o, mask=m, other=0.0).to(tl.float32)
        b_sin = tl.load(sin + o, mask=m, other=0.0).to(tl.float32)
        if INVERSE:
            b_sin = -b_sin
        m = (o_t < T) & (o_h < H)
        for i in range(tl.program_id(1), B, tl.num_programs(1)):
            i_b = i.to(tl.int64)
            p_x = x + i_b * sx[0] + o_t.to(tl.int64) * sx[1] + o_h.to(tl.int64) * sx[2]  # [BT, BH, 1]
            p_y = y + ((i_b * T + o_t) * H + o_h) * (2 * D2)
            if INTERLEAVED:
                o_p = tl.arange(0, 2 * BD)[None, None, :]
                b_x = tl.load(p_x + o_p, mask=m & (o_p < 2 * D2), other=0.0).to(tl.float32)  # [BT, BH, 2 BD]
                b_1, b_2 = tl.split(tl.reshape(b_x, (BT, BH, BD, 2)))
                b_y = tl.join(b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin)
                tl.store(p_y + o_p, tl.reshape(b_y, (BT, BH, 2 * BD)), mask=m & (o_p < 2 * D2))
            else:
                b_1 = tl.load(p_x + o_d, mask=m & (o_d < D2), other=0.0).to(tl.float32)  # [BT, BH, BD]
                b_2 = tl.load(p_x + D2 + o_d, mask=m & (o_d < D2), other=0.0).to(tl.float32)
                tl.store(p_y + o_d, b_1 * b_cos - b_2 * b_sin, mask=m & (o_d < D2))
                tl.store(p_y + D2 + o_d, b_2 * b_cos + b_1 * b_sin, mask=m & (o_d < D2))

    @custom_op("kernels::rope", mutates_args=())
    def rope_op(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool,
                inverse: bool) -> torch.Tensor:
        x = x if x.stride(3) == 1 else x.contiguous()
        (B, T, H, D), y = x.shape, x.new_empty(x.shape)
        BH, BD = triton.next_power_of_2(H), triton.next_power_of_2(D // 2)
        BT = max(1, 2048 // (BH * BD))
        n_t = triton.cdiv(T, BT)
        # above 1 if T alone does not give each multiprocessor (46: an RTX 4070) two
        n_b = max(1, min(B, 2 * 46 // max(1, n_t)))
        rope_kernel[(n_t, n_b)](
            x, cos.contiguous(), sin.contiguous(), y, x.stride()[:3], B, T, H, D // 2, INVERSE=inverse,
            INTERLEAVED=interleaved, BT=BT, BH=BH, BC=1 if cos.ndim == 2 else BH, BD=BD,
            num_warps=4 if BH * BD <= 4096 else 8)
        return y

    @rope_op.register_fake
    def _(x, cos, sin, interleaved, inverse):
        return x.new_empty(x.shape)

    def save_for_backward(ctx, inputs, output):
        _, cos, sin, ctx.interleaved, ctx.inverse = inputs
        ctx.save_for_backward(cos, sin)

    def rope_backward(ctx, dy):
        return rope_op(dy, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None

    rope_op.register_autograd(rope_backward, setup_context=save_for_backward)


def rope(x, cos, sin, interleaved=False):
    """x (B, T, H, D), cos and sin (T, D/2) or (T, H, D/2) -> y like x. ValueError: shapes that do not fit."""
    B, T, H, D = x.shape
    if cos.shape != sin.shape or cos.shape not in ((T, D // 2), (T, H, D // 2)) or D % 2:
        raise ValueError(f"rope: shapes {[tuple(t.shape) for t in (x, cos, sin)]}; expected x (B, T, H, D), D even, "
                         "and cos, sin (T, D/2) or (T, H, D/2)")
    which = form(x)
    if which == "triton":
        return rope_op(x, cos, sin, interleaved, False)
    return (rope_ref if which == "ref" else rope_torch)(x, cos, sin, interleaved)
