"""
Matrix products in kernels of ours: a tiled GEMM, and the linear layer y = act(x w^T + b) forward and backward

    matmul(a, b)              a b                   a (..., K), b (K, N) -> (..., N)
    linear(x, w, b, act)      act(x w^T + b)        x (..., K), w (N, K), b (N,) or None -> (..., N); act None or "gelu"
    gelu(z) = z s(2u),   u = sqrt(2/pi) (z + 0.044715 z^3)       s the logistic function; equal to 0.5 z (1 + tanh u)

Backward, with dz = dy gelu'(z) (dz = dy without act):   dx = dz w,   dw = dz^T x,   db = sum over rows of dz.

Which form runs: the vendor's GEMM (on a CPU MKL or oneDNN, with GELU and one row without gradients as loops in C), on a
GPU too, unless KERNELS=triton asks for the kernels here. They were never timed against cuBLAS on a GPU, and it is hard
to beat; what they give is a GPT-2 whose every FLOP runs in this folder.

The tensors of a call share a dtype, fp32, bf16 or fp16; sums run in fp32 (products of fp32 are exact fp32, not TF32),
results are stored in that dtype. Any strides: a transposed operand is read where it lies. Under autocast x, w and b
are cast to the autocast dtype as F.linear does, and gradients come back in the parameters' dtype. Shapes that do not
fit raise ValueError, mixed dtypes TypeError.

One GEMM kernel serves the three products: strides do the transposing. Tiles BM x BN x BK come from `tile`; programs
run in groups of 8 row blocks, so that those in flight share operands in L2. A product with few tiles and a long K
(dw) is cut along K into slices that write fp32 partial results, added in a fixed order: no atomics, results repeat
bit for bit.

FLOPs: 2 M N K a product, three products a training step (torch.utils.flop_counter sees them).
Bytes issued are the floor of a tiled product, a once per column block, b once per row block, c once:
    size (ceil(N / BN) M K + ceil(M / BM) N K + M N)
From device memory they are nearer size (M K + N K + M N), L2 serving the re-reads.
Saved for backward: x, w and, with gelu, z in x's dtype. To write and read z costs 4 bytes an element in bf16 (8 ps on
an RTX 4070, 504 GB/s), to recompute it 2 K FLOPs (26 ps at K = 768, 58 TFLOP/s): so it is saved, and not even written
where no gradient is wanted. gelu' and db take one pass over dy.

GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415. Grouped order of tiles: Tillet, Kung & Cox 2019 (Triton).
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
from torch.utils.flop_counter import register_flop_formula

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


def matmul_ref(a, b):
    """c_ij = sum_k a_ik b_kj. a (..., K), b (K, N) -> (..., N), summed in at least fp32, returned in a's dtype."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.einsum("...k,kn->...n", a.to(wide), b.to(wide)).to(a.dtype)


def linear_ref(x, w, b=None, act=None):
    """act(x w^T + b). x (..., K), w (N, K), b (N,) -> (..., N), computed in at least fp32, returned in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = torch.einsum("...k,nk->...n", x.to(wide), w.to(wide))
    if b is not None:
        z = z + b.to(wide)
    if act == "gelu":
        z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return z.to(x.dtype)


if triton is not None:

    @triton.jit
    def gelu_parts(z):
        """s(2u), and the derivative of 2u: gelu and gelu' follow from them."""
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # 2 sqrt(2/pi)
        return s, 1.5957691216057308 * (1 + 0.134145 * z * z)  # 0.134145 = 3 * 0.044715

    @triton.jit
    def gemm_kernel(A, B, Bias, C, Z, M, N, K, slice_k, stride_am, stride_ak, stride_bk, stride_bn,
                    GELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
        """Z = A B + Bias (if wanted), C = act(Z), row-major. Program (tile, s) sums the s-th slice_k of k into C[s]."""
        # tiles in groups of 8 row blocks, down the rows first: few blocks of A and of B are live at a time
        pid, n_m, n_n = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
        first_m = pid // (8 * n_n) * 8
        rows = min(n_m - first_m, 8)
        i_m = first_m + pid % (8 * n_n) % rows
        i_n = pid % (8 * n_n) // rows
        i_s = tl.program_id(1)
        o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)  # int64: row * stride can pass 2^31
        o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
        m_m, m_n = o_m < M, o_n < N
        o_k = tl.arange(0, BK)
        left = min(K - i_s * slice_k, slice_k)  # k's of this slice
        start = i_s.to(tl.int64) * slice_k + o_k
        p_a = A + o_m[:, None] * stride_am + start[None, :] * stride_ak  # [BM, BK]
        p_b = B + start[:, None] * stride_bk + o_n[None, :] * stride_bn  # [BK, BN]
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, tl.cdiv(left, BK)):
            m_k = o_k < left - k * BK
            b_a = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_b = tl.load(p_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
            acc = tl.dot(b_a, b_b, acc, input_precision="ieee")  # matters for fp32 only: no TF32, torch's default too
            p_a += BK * stride_ak
            p_b += BK * stride_bk
        if Bias is not None:
            acc += tl.load(Bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        o_c = o_m[:, None] * N + o_n[None, :]
        m_c = m_m[:, None] & m_n[None, :]
        if Z is not None:
            tl.store(Z + o_c, acc, mask=m_c)
        if GELU:
            s, _ = gelu_parts(acc)
            acc = acc * s
        tl.store(C + i_s.to(tl.int64) * M * N + o_c, acc, mask=m_c)

    def tile(M, N, dtype):
        """BM, BN, BK, warps, stages: wide tiles where 64 of them keep a GPU busy, small ones elsewhere, thin ones for
        the few rows of generation. fp32 goes without tensor cores, all of it in registers: 64 x 64 at most."""
        if M <= 16:
            return (16, 64, 32, 4, 3) if dtype == torch.float32 else (16, 64, 64, 4, 4)
        if dtype == torch.float32:
            return 64, 64, 16, 4, 3
        if triton.cdiv(M, 128) * triton.cdiv(N, 128) >= 64:
            return 128, 128, 32, 8, 3
        return 64, 64, 32, 4, 4

    def gemm(a, b, bias=None, gelu=False, save=False):
        """act(a b + bias), and a b + bias if save or None. a (M, K), b (K, N) of any strides -> (M, N) in a's dtype."""
        (M, K), N = a.shape, b.shape[1]
        BM, BN, BK, warps, stages = tile(M, N, a.dtype)
        tiles = triton.cdiv(M, BM) * triton.cdiv(N, BN)
        # cut K while there are at most 128 programs and a slice has 512 k's or more: by shapes alone, so results repeat
        slices = 1 if bias is not None or gelu else max(1, min(128 // max(tiles, 1), K // 512))
        slice_k = triton.cdiv(triton.cdiv(K, slices), BK) * BK
        slices = triton.cdiv(K, slice_k) if K else 1
        c = torch.empty((slices, M, N), dtype=a.dtype if slices == 1 else torch.float32, device=a.device)
        z = torch.empty((M, N), dtype=a.dtype, device=a.device) if save else None
        if M * N:
            gemm_kernel[(tiles, slices)](a, b, bias, c, z, M, N, K, slice_k, *a.stride(), *b.stride(), GELU=gelu,
                                         BM=BM, BN=BN, BK=BK, num_warps=warps, num_stages=stages)
        return (c[0] if slices == 1 else c.sum(0).to(a.dtype)), z

    # dz = dy gelu'(z),   gelu'(z) = s + z s (1 - s) (2u)'
    # db = sum over rows of dz: each program sums one slice of the rows, PyTorch adds the slices
    @triton.jit
    def bias_act_bwd_kernel(DY, Z, DZ, DB, M, N, stride_m, stride_n, slice_m, BM: tl.constexpr, BN: tl.constexpr):
        i_s = tl.program_id(1)
        o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
        m_n = o_n < N
        end = min(M, (i_s + 1) * slice_m)
        db = tl.zeros((BM, BN), tl.float32)
        for start in range(i_s * slice_m, end, BM):
            o_m = start + tl.arange(0, BM).to(tl.int64)
            mask = (o_m < end)[:, None] & m_n[None, :]
            p_dy = DY + o_m[:, None] * stride_m + o_n[None, :] * stride_n
            dz = tl.load(p_dy, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
            if Z is not None:
                o_z = o_m[:, None] * N + o_n[None, :]
                z = tl.load(Z + o_z, mask=mask, other=0.0).to(tl.float32)
                s, slope = gelu_parts(z)
                dz = dz * (s + z * s * (1 - s) * slope)
                tl.store(DZ + o_z, dz, mask=mask)
            db += dz
        tl.store(DB + i_s.to(tl.int64) * N + o_n, tl.sum(db, 0), mask=m_n)

    @custom_op("kernels::matmul", mutates_args=())
    def matmul_op(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return gemm(a, b)[0]

    @custom_op("kernels::linear", mutates_args=())
    def linear_op(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None,
                  gelu: bool, save: bool) -> tuple[torch.Tensor, torch.Tensor]:
        y, z = gemm(x, w.t(), None if b is None else b.contiguous(), gelu, save)
        return y, x.new_empty(0) if z is None else z

    @custom_op("kernels::bias_act_grad", mutates_args=())
    def bias_act_grad_op(dy: torch.Tensor, z: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
        (M, N), BM, BN = dy.shape, 16, 128
        slices = max(1, min(64, M // 128))  # partial sums, written and read: 3% of dy's bytes in bf16
        slice_m = max(1, triton.cdiv(M, slices))
        dz = torch.empty((M, N) if gelu else 0, dtype=dy.dtype, device=dy.device)
        db = torch.empty((slices, N), dtype=torch.float32, device=dy.device)
        if N:
            bias_act_bwd_kernel[(triton.cdiv(N, BN), slices)](dy, z if gelu else None, dz, db, M, N, *dy.stride(),
                                                              slice_m, BM=BM, BN=BN)
        return dz, db.sum(0).to(dy.dtype)

    def matmul_setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def matmul_backward(ctx, dc):
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return matmul_op(dc, b.t()) if need_a else None, matmul_op(a.t(), dc) if need_b else None

    def linear_setup(ctx, inputs, output):
        x, w, _, ctx.gelu, save = inputs
        assert save or not ctx.gelu, "kernels::linear needs save=True where gradients are wanted"
        ctx.save_for_backward(x, w, output[1])
        ctx.set_materialize_grads(False)  # no zeros for z's gradient

    def linear_backward(ctx, dy, _):
        x, w, z = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        dz, db = dy, None
        if ctx.gelu or need_b:
            dz, db = bias_act_grad_op(dy, z, ctx.gelu)
            dz = dz if ctx.gelu else dy
        dx = matmul_op(dz, w) if need_x else None
        dw = matmul_op(dz.t(), x) if need_w else None
        return dx, dw, db if need_b else None, None, None

    @matmul_op.register_fake
    def _(a, b):
        return a.new_empty(a.shape[0], b.shape[1])

    @linear_op.register_fake
    def _(x, w, b, gelu, save):
        shape = x.shape[0], w.shape[0]
        return x.new_empty(shape), x.new_empty(shape if save else 0)

    @bias_act_grad_op.register_fake
    def _(dy, z, gelu):
        return dy.new_empty(dy.shape if gelu else 0), dy.new_empty(dy.shape[1])

    matmul_op.register_autograd(matmul_backward, setup_context=matmul_setup)
    linear_op.register_autograd(linear_backward, setup_context=linear_setup)

    @register_flop_formula(torch.ops.kernels.matmul)
    def matmul_flops(a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    @register_flop_formula(torch.ops.kernels.linear)
    def linear_flops(x, w, *_, **__):
        return 2 * x[0] * x[1] * w[0]


def operands(*tensors):
    """The tensors (or None) in the one dtype of the product: the autocast dtype where autocast is on."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        raise TypeError(f"the Triton form takes one dtype out of fp32, bf16, fp16; got {sorted(map(str, dtypes))}")
    return tensors


def matmul(a, b):
    """a b. a (..., K), b (K, N) -> (..., N), one dtype. The vendor's GEMM; ours where KERNELS=triton."""
    if b.ndim != 2 or a.shape[-1] != b.shape[0]:
        raise ValueError(f"matmul: a {tuple(a.shape)} and b {tuple(b.shape)} should be (..., K) and (K, N)")
    kind = form(a) if KERNELS else "torch"
    if kind == "ref":
        return matmul_ref(a, b)
    if kind == "torch":
        return torch.matmul(a, b)
    a, b = operands(a, b)
    return matmul_op(a.reshape(math.prod(a.shape[:-1]), a.shape[-1]), b).view(*a.shape[:-1], b.shape[1])


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


def onednn(x, w, b):
    """x w^T + b by oneDNN: this call has no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")


class OneDNN(torch.autograd.Function):
    """x w^T + b. y, and dx in fp32, by oneDNN."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        return onednn(x, w, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x, w), (need_x, need_w, need_b) = ctx.saved_tensors, ctx.needs_input_grad
        shape, dy = dy.shape[:-1], dy.reshape(-1, dy.shape[-1])
        dx, dw = product(dy, w.t()).view(*shape, w.shape[1]) if need_x else None, None
        if need_w:
            x = x.reshape(-1, x.shape[-1])
            dw = dy.t() @ x if w.is_contiguous() else (x.t() @ dy).t()  # laid out as w, whose .grad it becomes
        return dx, dw, dy.sum(0) if need_b else None


ONEDNN = torch.backends.mkldnn.is_available()
ONEDNN_BF16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def vector(x, w, b):
    """One row: x (..., K) with K elements in all, w (N, K) or a transposed view, b (N,) or None -> (..., N)."""
    (N, K), slices = w.shape, 0 if w.is_contiguous() else torch.get_num_threads()
    y, part = x.new_empty(*x.shape[:-1], N, dtype=torch.float32), x.new_empty(slices, N, dtype=torch.float32)
    x32, b = x.float().contiguous(), None if b is None else b.float().contiguous()
    call(compiled(SOURCE).vector, w, x32, b, y, N, K, part, slices, int(w.dtype == torch.bfloat16))
    return y.to(x.dtype)


def rows(x, w, b):
    """F.linear. On a CPU by oneDNN in fp32 where MKL is slow, and in bf16 with a bias, which F.linear copies into all
    rows first. Generation's one row without gradients has to wait for the weights: a loop in C reads them once from
    end to end, at the rate of the memory; MKL and oneDNN take several rows at once, on AMD's CPUs at half of it."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b))
    if torch.compiler.is_compiling() or not x.is_cpu or not x.numel():  # Inductor chooses among its own products
        return F.linear(x, w, b)
    if torch.is_autocast_enabled("cpu"):
        narrow = torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype != torch.float64
        if ONEDNN_BF16 and b is not None and narrow:
            x, w, b = (t.bfloat16() for t in (x, w, b))
            with torch.autocast("cpu", enabled=False):
                return OneDNN.apply(x, w, b) if wanted else onednn(x, w, b)
    else:
        alike = x.dtype == w.dtype in (torch.float32, torch.bfloat16) and (b is None or b.dtype == w.dtype)
        whole = w.numel() and (w.is_contiguous() or w.t().is_contiguous())
        if x.numel() == x.shape[-1] and not wanted and alike and whole and compiled(SOURCE):
            return vector(x, w, b)
        if MKL_IS_SLOW and x.dtype == w.dtype == torch.float32:
            return OneDNN.apply(x, w, b) if wanted else onednn(x, w, b)
    return F.linear(x, w, b)


# vector: y = w x + b. Rows of w, where they lie together, are multiplied one by one; where columns do (a transposed
# view), each thread adds up its slice of K of them, then the slices are added in their order. gelu and gelu' are as
# they stand at the top; PyTorch's own pass takes two to three times as long: its tanh is exact to the last bit.
SOURCE = r"""
void vector(const void *w, const float *x, const float *b, float *y, num N, num K, float *part, num slices, num w16) {
    const float *w32 = w;
    const uint16_t *w16s = w;
    #pragma omp parallel for schedule(static) if (N * K > 16384)
    for (num n = 0; n < (slices ? 0 : N); n++) {
        float s = 0;
        if (w16)
            #pragma omp simd reduction(+ : s)
            for (num k = 0; k < K; k++) s += from_bf16(w16s[n * K + k]) * x[k];
        else
            #pragma omp simd reduction(+ : s)
            for (num k = 0; k < K; k++) s += w32[n * K + k] * x[k];
        y[n] = s + (b ? b[n] : 0);
    }
    #pragma omp parallel for schedule(static) if (N * K > 16384)
    for (num i = 0; i < slices; i++) {
        float *s = part + i * N;
        memset(s, 0, 4 * N);
        for (num k = K * i / slices; k < K * (i + 1) / slices; k++)
            if (w16)
                #pragma omp simd
                for (num n = 0; n < N; n++) s[n] += x[k] * from_bf16(w16s[k * N + n]);
            else
                #pragma omp simd
                for (num n = 0; n < N; n++) s[n] += x[k] * w32[k * N + n];
    }
    for (num n = 0; n < (slices ? N : 0); n++) {
        y[n] = b ? b[n] : 0;
        for (num i = 0; i < slices; i++) y[n] += part[i * N + n];
    }
}

void gelu(const void *z, void *y, num size, num x16) {
    #pragma omp parallel for schedule(static) if (size > 16384)
    for (num at = 0; at < size; at += RUN) {
        num n = size - at < RUN ? size - at : RUN;
        float room[RUN], out[RUN], *o = x16 ? out : (float *)y + at;
        const float *a = see(z, x16, at, n, room);
        #pragma omp simd
        for (num i = 0; i < n; i++) o[i] = a[i] * sigmoid(1.59576912f * a[i] * (1 + 0.044715f * a[i] * a[i]));
        if (x16) put(o, n, 1, y, at);
    }
}

void gelu_backward(const void *z, const void *dy, void *dz, num size, num x16) {
    #pragma omp parallel for schedule(static) if (size > 16384)
    for (num at = 0; at < size; at += RUN) {
        num n = size - at < RUN ? size - at : RUN;
        float room[2][RUN], out[RUN], *o = x16 ? out : (float *)dz + at;
        const float *a = see(z, x16, at, n, room[0]), *d = see(dy, x16, at, n, room[1]);
        #pragma omp simd
        for (num i = 0; i < n; i++) {
            float q = 0.044715f * a[i] * a[i], s = sigmoid(1.59576912f * a[i] * (1 + q));
            o[i] = d[i] * (s + a[i] * s * (1 - s) * 1.59576912f * (1 + 3 * q));
        }
        if (x16) put(o, n, 1, dz, at);
    }
}
"""


class GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        y = torch.empty_like(z)
        call(compiled(SOURCE).gelu, z, y, z.numel(), int(z.dtype == torch.bfloat16))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (z,) = ctx.saved_tensors
        dy, dz = dy.contiguous(), torch.empty_like(z)
        call(compiled(SOURCE).gelu_backward, z, dy, dz, z.numel(), int(z.dtype == torch.bfloat16))
        return dz


def gelu(z):
    """Its tanh form. z: any shape."""
    fits = z.is_cpu and z.dtype in (torch.float32, torch.bfloat16) and z.is_contiguous() and z.numel() > 4096
    if fits and not torch.compiler.is_compiling() and compiled(SOURCE):
        return GELU.apply(z)
    return F.gelu(z, approximate="tanh")


def linear(x, w, b=None, act=None):
    """act(x w^T + b). x (..., K), w (N, K), b (N,) or None, act None or "gelu" (tanh form) -> (..., N).

    The vendor's GEMM (rows); ours where KERNELS=triton: see the top of the file."""
    if act not in (None, "gelu"):
        raise ValueError(f'linear: act is None or "gelu", got {act!r}')
    if w.ndim != 2 or x.shape[-1] != w.shape[1] or (b is not None and b.shape != w.shape[:1]):
        shapes = [None if t is None else tuple(t.shape) for t in (x, w, b)]
        raise ValueError("linear: x {}, w {} and b {} should be (..., K), (N, K) and (N,)".format(*shapes))
    kind = form(x) if KERNELS else "torch"
    if kind == "ref":
        return linear_ref(x, w, b, act)
    if kind == "torch":
        z = rows(x, w, b)
        return gelu(z) if act else z
    x, w, b = operands(x, w, b)
    save = act == "gelu" and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b))
    y, _ = linear_op(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), w, b, act == "gelu", save)
    return y.view(*x.shape[:-1], w.shape[0])
