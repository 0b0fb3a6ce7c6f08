"""
Selective scan: the recurrence of Mamba-1
    Gu & Dao 2023, arXiv:2312.00752v2, eq. 2a, 2b and algorithm 2

    d_t = softplus(dt_t + dt_bias),  a_t = exp(d_t A)                (E,) and (E, N): a decay for each channel and state
    s_t = a_t s_{t-1} + d_t u_t B_t                                  (E, N)
    y_t = (sum_n C_tn s_tn + D u_t) silu(z_t)                              D, z, dt_bias, initial: None leaves them out
    backward, with o = dy silu(z), g_t = dL/ds_t = C_t o_t + a_{t+1} g_{t+1} (after T: dfinal), w_t = g_t a_t s_{t-1}:
    dC_t = sum_e o_t s_t,   dB_t = sum_e d_t u_t g_t,   q_t = sum_n B_t g_t,   du_t = d_t q_t + D o_t,   dD = sum o u
    dd_t = u_t q_t + sum_n A w_t,   ddt_t = dd_t (1 - exp(-d_t)),   dA = sum_t d_t w_t,   dz = dy silu'(z) (ungated y)

Shapes: u, dt, z (B, T, E), A (E, N), B, C (B, T, N), D, dt_bias (E,), initial (B, E, N) -> y (B, T, E) in u's dtype,
final (B, E, N) fp32 (fp64 for fp64). fp32, bf16 or fp16, A, D and dt_bias may be fp32 beside 16-bit tensors; u, dt, z,
B and C may be columns of wider tensors, as those of a projection are: the kernels take their strides. State and
arithmetic are fp32.

Saved for backward: the inputs and the state after every 64 tokens. Backward makes the states again: from 64 tokens to
64 tokens back, first those before each tile of 4, which stay in registers, then in each tile all of them.
Bytes: (B, T, E, N) is never in memory. Forward reads and writes each tensor once, and N/64 fp32 states an element of u
(N = 16, bf16: 1/8 of the floor). Backward reads those, and writes what each block of 64 channels has of dB and dC,
which PyTorch adds up in a fixed order: results repeat bit for bit. Rows of B and C that all blocks read come from L2.
FLOPs: about 6 a state element forward, 22 backward, and 2 exponentials there: no matrix product, so no tensor cores.

CPU: the recurrence as a loop in C, 16 channels at once (CompiledScan); without a compiler, in fp64, and under
torch.compile, chunks of 8 tokens in PyTorch's operations (SelectiveScan).
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


def selective_scan_ref(u, dt, A, B, C, D=None, z=None, dt_bias=None, initial=None):
    """The definition, one step of time after the other; fp32 inside, fp64 for fp64."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, dt, A, B, C = (t.to(dtype) for t in (u, dt, A, B, C))
    delta = F.softplus(dt if dt_bias is None else dt + dt_bias)  # (B, T, E)
    s = x.new_zeros(x.shape[0], *A.shape) if initial is None else initial.to(dtype)  # (B, E, N)
    y = []
    for t in range(x.shape[1]):
        s = torch.exp(delta[:, t, :, None] * A) * s + (delta[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        y.append((s * C[:, t, None, :]).sum(2))  # (B, E)
    y = torch.stack(y, 1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), s


LOG2E = 1.4426950408889634
CHUNK = 8  # steps of time at once in the form below


class SelectiveScan(torch.autograd.Function):
    """The fast plain-PyTorch form. What does not depend on the state is computed for CHUNK steps at once, in buffers
    that stay in the cache; one multiply-add a step is left. Kept: the state at the start of each chunk. Backward takes
    the chunks from the last to the first, runs each again, then backwards. States are (B, N, E) here: with E innermost
    a product with B_t or C_t is a row times a matrix."""

    @staticmethod
    def chunk(x, d, b, A2, a, s):
        """a_t = exp(d_t A) and s_t = a_t s_{t-1} + d_t x_t B_t for each step of a chunk that starts with state s[0]."""
        torch.mul(d[:, :, None], A2, out=a).exp2_()  # (Q, B, N, E)
        torch.mul((d * x)[:, :, None], b[..., None], out=s[1:])
        before, *after = s.unbind(0)
        for a_t, s_t in zip(a.unbind(0), after):
            s_t.addcmul_(a_t, before)
            before = s_t

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, z, dt_bias, initial):
        (batch, T, E), N = u.shape, A.shape[1]
        dtype = torch.promote_types(u.dtype, torch.float32)
        dt = dt.to(dtype)
        delta = F.softplus(dt if dt_bias is None else dt + dt_bias)  # (B, T, E)
        A2 = A.to(dtype).t().contiguous() * LOG2E  # (N, E); exp(x) = exp2(x log2 e): PyTorch's exp2 is the faster
        a, s = delta.new_empty(CHUNK, batch, N, E), delta.new_empty(CHUNK + 1, batch, N, E)
        states = delta.new_empty(-(-T // CHUNK), batch, N, E)
        s[0] = 0 if initial is None else initial.transpose(1, 2)
        y, Q = torch.empty_like(u), 0
        with torch.autocast(u.device.type, enabled=False):
            for i in range(0, T, CHUNK):
                d, x, b, c, g = (None if v is None else v[:, i:i + CHUNK].transpose(0, 1).to(dtype)
                                 for v in (delta, u, B, C, z))  # (Q, B, E) and (Q, B, N)
                states[i // CHUNK] = s[0] = s[Q]
                Q = len(d)
                SelectiveScan.chunk(x, d, b, A2, a[:Q], s[:Q + 1])
                out = torch.matmul(c[:, :, None], s[1:Q + 1])[:, :, 0]  # (Q, B, E)
                if D is not None:
                    out.addcmul_(x, D)
                if z is not None:
                    out.mul_(F.silu(g))
                y[:, i:i + CHUNK] = out.transpose(0, 1)
        ctx.save_for_backward(u, delta, A, B, C, D, z, states)
        ctx.optional = dt_bias is not None, initial is not None
        ctx.set_materialize_grads(False)  # an unused final brings no gradient
        return y, s[Q].transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal):
        u, delta, A, B, C, D, z, states = ctx.saved_tensors
        (_, batch, N, E), T, dtype = states.shape, u.shape[1], delta.dtype
        At = A.to(dtype).t().contiguous()  # (N, E)
        A2 = At * LOG2E
        a, s, h = (delta.new_empty(CHUNK + n, batch, N, E) for n in (0, 1, 0))
        dA, dD, G = delta.new_zeros(N, E), delta.new_zeros(E), torch.zeros_like(states[0])
        if dfinal is not None:
            G.copy_(dfinal.transpose(1, 2))
        dy = torch.zeros_like(u) if dy is None else dy
        du, ddt, dz = (None if v is None else torch.empty_like(v) for v in (u, delta, z))
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        with torch.autocast(u.device.type, enabled=False):
            for i in reversed(range(0, T, CHUNK)):
                d, x, b, c, g, do = (None if v is None else v[:, i:i + CHUNK].transpose(0, 1).to(dtype)
                                     for v in (delta, u, B, C, z, dy))
                Q = len(d)
                a_, s_, h_ = a[:Q], s[:Q + 1], h[:Q]
                s_[0] = states[i // CHUNK]
                SelectiveScan.chunk(x, d, b, A2, a_, s_)
                if z is not None:
                    out = torch.matmul(c[:, :, None], s_[1:])[:, :, 0]  # (Q, B, E)
                    if D is not None:
                        out.addcmul_(x, D)
                    dz[:, i:i + CHUNK] = torch.ops.aten.silu_backward(out.mul_(do), g).transpose(0, 1)
                    do = do * F.silu(g)
                # g_t = dL/ds_t = C_t dy_t + a_{t+1} g_{t+1}, here in h
                torch.mul(do[:, :, None], c[..., None], out=h_)
                *before, after = h_.unbind(0)
                after += G
                for a_t, h_t in zip(reversed(a_.unbind(0)), reversed(before)):
                    h_t.addcmul_(a_t, after)
                    after = h_t
                torch.mul(a_[0], h_[0], out=G)
                dC[:, i:i + CHUNK] = torch.matmul(do[:, :, None], s_[1:].transpose(2, 3))[:, :, 0].transpose(0, 1)
                dB[:, i:i + CHUNK] = torch.matmul((d * x)[:, :, None], h_.transpose(2, 3))[:, :, 0].transpose(0, 1)
                dx = torch.matmul(b[:, :, None], h_)[:, :, 0]  # of d x: (Q, B, E)
                # dL/d(d_t A) = g_t a_t s_{t-1}
                h_.mul_(a_).mul_(s_[:-1])
                dd = torch.mul(h_, At, out=a_).sum(2).addcmul_(dx, x)
                # softplus'(v) = sigmoid(v) = 1 - exp(-softplus(v)), and d is the softplus
                dd.mul_(torch.expm1(-d).neg_())
                dA += torch.mul(h_, d[:, :, None], out=a_).sum((0, 1))
                dx *= d
                if D is not None:
                    dx.addcmul_(do, D)
                    dD += (do * x).sum((0, 1))
                du[:, i:i + CHUNK] = dx.transpose(0, 1)
                ddt[:, i:i + CHUNK] = dd.transpose(0, 1)
        bias, initial = ctx.optional
        return (du, ddt, dA.t(), dB, dC, dD if D is not None else None, dz, ddt.sum((0, 1)) if bias else None,
                G.transpose(1, 2) if initial else None)


# The recurrence as it is written at the top, for V channels at once, whose N states lie next to each other. Kept: the
# state before every Q tokens. Backward takes those Q tokens from the last to the first: makes their states again, then
# goes back through them; what a token's B and C collect from all channels is summed per lane until the Q tokens are
# done, and per thread until the call is: results repeat bit for bit on the same number of threads.
V, Q = 16, 32
SOURCE = f"enum {{ V = {V}, Q = {Q} }};" + r"""
static const float LOG2E = 1.44269504f, LN2 = 0.693147181f;

static void load(const float *from, float *to, num m) {
    for (num l = 0; l < V; l++) to[l] = 0;
    memcpy(to, from, 4 * m);
}

void forward(const float *u, const float *d, const float *A, const float *B, const float *C, const float *D,
             const float *z, float *y, float *states, float *state,
             num batch, num T, num E, num N, num u_b, num u_t, num z_b, num z_t) {
    num blocks = (E + V - 1) / V, chunks = (T + Q - 1) / Q;
    #pragma omp parallel for schedule(static) if (batch * T * E * N > 32768)
    for (num i = 0; i < batch * blocks; i++) {
        num b = i / blocks, e = i % blocks * V, m = E - e < V ? E - e : V;
        float a2[N][V], s[N][V], skip[V], x[V], dt[V], dx[V], o[V], gate[V];
        memset(a2, 0, sizeof a2), memset(s, 0, sizeof s), memset(skip, 0, sizeof skip);
        for (num l = 0; l < m; l++) {
            if (D) skip[l] = D[e + l];
            for (num n = 0; n < N; n++) a2[n][l] = A[(e + l) * N + n] * LOG2E, s[n][l] = state[(b * E + e + l) * N + n];
        }
        for (num t = 0; t < T; t++) {
            if (states && t % Q == 0)
                for (num n = 0; n < N; n++) memcpy(states + ((b * chunks + t / Q) * N + n) * E + e, s[n], 4 * m);
            const float *b_t = B + (b * T + t) * N, *c_t = C + (b * T + t) * N;
            load(u + b * u_b + t * u_t + e, x, m), load(d + (b * T + t) * E + e, dt, m);
            for (num l = 0; l < V; l++) dx[l] = dt[l] * x[l], o[l] = skip[l] * x[l];
            for (num n = 0; n < N; n++)
                for (num l = 0; l < V; l++) {
                    s[n][l] = ex2(dt[l] * a2[n][l]) * s[n][l] + dx[l] * b_t[n];
                    o[l] += c_t[n] * s[n][l];
                }
            if (z) {
                load(z + b * z_b + t * z_t + e, gate, m);
                for (num l = 0; l < V; l++) o[l] *= gate[l] * sigmoid(gate[l]);
            }
            memcpy(y + (b * T + t) * E + e, o, 4 * m);
        }
        for (num l = 0; l < m; l++)
            for (num n = 0; n < N; n++) state[(b * E + e + l) * N + n] = s[n][l];
    }
}

/* g: dL/dfinal before, dL/dinitial after. dB, dC: (threads, batch, T, N). dd: dL/dd. dA, dD are added to. */
void backward(const float *u, const float *d, const float *A, const float *B, const float *C, const float *D,
              const float *z, const float *states, const float *dy, float *du, float *dd, float *dA, float *dB,
              float *dC, float *dD, float *dz, float *g,
              num batch, num T, num E, num N, num u_b, num u_t, num z_b, num z_t, num threads) {
    num blocks = (E + V - 1) / V, chunks = (T + Q - 1) / Q;
    #pragma omp parallel for num_threads(threads)
    for (num k = 0; k < threads; k++) {  /* each thread has its share of the channels */
        float (*s)[N][V] = malloc((4 * Q + 1) * N * V * 4), (*a)[N][V] = s + Q + 1,
              (*sB)[N][V] = a + Q, (*sC)[N][V] = sB + Q;
        for (num b = 0; b < batch; b++)
            for (num c = chunks - 1; c >= 0; c--) {
                num first = c * Q, count = T - first < Q ? T - first : Q;
                memset(sB, 0, 2 * Q * N * V * 4);
                for (num e = blocks * k / threads * V; e < blocks * (k + 1) / threads * V; e += V) {
                    num m = E - e < V ? E - e : V;
                    float a2[N][V], G[N][V], sA[N][V], skip[V], sD[V],
                          x[V], dt[V], dx[V], o[V], q[V], r[V], gate[V], y[Q][V];
                    memset(a2, 0, sizeof a2), memset(G, 0, sizeof G), memset(sA, 0, sizeof sA);
                    memset(skip, 0, sizeof skip), memset(sD, 0, sizeof sD);
                    for (num l = 0; l < m; l++) {
                        if (D) skip[l] = D[e + l];
                        for (num n = 0; n < N; n++)
                            a2[n][l] = A[(e + l) * N + n] * LOG2E, G[n][l] = g[(b * E + e + l) * N + n];
                    }
                    for (num n = 0; n < N; n++) load(states + ((b * chunks + c) * N + n) * E + e, s[0][n], m);
                    for (num t = 0; t < count; t++) {
                        const float *b_t = B + (b * T + first + t) * N, *c_t = C + (b * T + first + t) * N;
                        load(u + b * u_b + (first + t) * u_t + e, x, m), load(d + (b * T + first + t) * E + e, dt, m);
                        for (num l = 0; l < V; l++) dx[l] = dt[l] * x[l], y[t][l] = skip[l] * x[l];
                        for (num n = 0; n < N; n++)
                            for (num l = 0; l < V; l++) {
                                a[t][n][l] = ex2(dt[l] * a2[n][l]);
                                s[t + 1][n][l] = a[t][n][l] * s[t][n][l] + dx[l] * b_t[n];
                                y[t][l] += c_t[n] * s[t + 1][n][l];
                            }
                    }
                    for (num t = count - 1; t >= 0; t--) {
                        const float *b_t = B + (b * T + first + t) * N, *c_t = C + (b * T + first + t) * N;
                        num at = (b * T + first + t) * E + e;
                        load(u + b * u_b + (first + t) * u_t + e, x, m), load(d + at, dt, m), load(dy + at, o, m);
                        if (z) {
                            load(z + b * z_b + (first + t) * z_t + e, gate, m);
                            for (num l = 0; l < V; l++) {
                                float p = 1 / (1 + ex2(-LOG2E * gate[l])), slope = p * (1 + gate[l] * (1 - p));
                                y[t][l] *= o[l] * slope;
                                o[l] *= gate[l] * p;
                            }
                            memcpy(dz + at, y[t], 4 * m);
                        }
                        for (num l = 0; l < V; l++) dx[l] = dt[l] * x[l], q[l] = r[l] = 0;
                        for (num n = 0; n < N; n++)
                            for (num l = 0; l < V; l++) {
                                float g_t = c_t[n] * o[l] + G[n][l], w = a[t][n][l] * g_t;
                                sC[t][n][l] += o[l] * s[t + 1][n][l];
                                sB[t][n][l] += dx[l] * g_t;
                                q[l] += b_t[n] * g_t;
                                G[n][l] = w;
                                w *= s[t][n][l];
                                r[l] += a2[n][l] * w;
                                sA[n][l] += dt[l] * w;
                            }
                        for (num l = 0; l < V; l++) {
                            sD[l] += x[l] * o[l];
                            o[l] = dt[l] * q[l] + skip[l] * o[l];
                            q[l] = x[l] * q[l] + LN2 * r[l];
                        }
                        memcpy(du + at, o, 4 * m), memcpy(dd + at, q, 4 * m);
                    }
                    for (num l = 0; l < m; l++) {
                        if (D) dD[e + l] += sD[l];
                        for (num n = 0; n < N; n++)
                            g[(b * E + e + l) * N + n] = G[n][l], dA[(e + l) * N + n] += sA[n][l];
                    }
                }
                for (num t = 0; t < count; t++)
                    for (num n = 0; n < N; n++) {
                        float totalB = 0, totalC = 0;
                        for (num l = 0; l < V; l++) totalB += sB[t][n][l], totalC += sC[t][n][l];
                        dB[((k * batch + b) * T + first + t) * N + n] = totalB;
                        dC[((k * batch + b) * T + first + t) * N + n] = totalC;
                    }
            }
        free(s);
    }
}
"""


def dense(t, dtype):
    """t in this dtype, its last dimension contiguous; None stays None."""
    t = None if t is None else t.to(dtype)
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


class CompiledScan(torch.autograd.Function):
    """The C form, in fp32."""

    @staticmethod
    def inputs(u, delta, A, B, C, D, z):
        u, z = dense(u, torch.float32), dense(z, torch.float32)
        A, B, C, D = (None if t is None else t.to(torch.float32).contiguous() for t in (A, B, C, D))
        return (u, delta, A, B, C, D, z), (*u.shape, A.shape[1], *u.stride()[:2],
                                           *((0, 0) if z is None else z.stride()[:2]))

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, z, dt_bias, initial):
        (batch, T, E), N = u.shape, A.shape[1]
        dt = dt.float()
        delta = F.softplus(dt if dt_bias is None else dt + dt_bias)  # (B, T, E)
        final = delta.new_zeros(batch, E, N) if initial is None else initial.to(delta.dtype, copy=True).contiguous()
        y, states = (torch.empty_like(delta),
                     delta.new_empty(batch, -(-T // Q), N, E) if any(ctx.needs_input_grad) else None)
        tensors, sizes = CompiledScan.inputs(u, delta, A, B, C, D, z)
        call(compiled(SOURCE).forward, *tensors, y, states, final, *sizes)
        ctx.save_for_backward(u, delta, A, B, C, D, z, states)
        ctx.optional = dt_bias is not None, initial is not None
        ctx.set_materialize_grads(False)  # an unused final brings no gradient
        return y.to(u.dtype), final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal):
        *saved, states = ctx.saved_tensors
        (tensors, sizes), (u, delta, A, _, _, D, z) = CompiledScan.inputs(*saved), saved
        (batch, T, E), N = u.shape, A.shape[1]
        dy = torch.zeros_like(delta) if dy is None else dy.to(delta.dtype).contiguous()
        g = delta.new_zeros(batch, E, N) if dfinal is None else dfinal.to(delta.dtype, copy=True).contiguous()
        du, ddt, dz = torch.empty_like(delta), torch.empty_like(delta), None if z is None else torch.empty_like(delta)
        threads = min(torch.get_num_threads(), -(-E // V))
        dA, dB, dC, dD = (delta.new_zeros(E, N), *delta.new_empty(2, threads, batch, T, N),
                          None if D is None else delta.new_zeros(E))
        call(compiled(SOURCE).backward, *tensors, states, dy, du, ddt, dA, dB, dC, dD, dz, g, *sizes, threads)
        ddt *= torch.expm1(-delta).neg_()  # softplus'(v) = sigmoid(v) = 1 - exp(-softplus(v)); delta is the softplus
        bias, initial = ctx.optional
        return (du.to(u.dtype), ddt, dA, dB.sum(0), dC.sum(0), dD, dz, ddt.sum((0, 1)) if bias else None,
                g if initial else None)


if triton is not None:
    # A program has BE channels of one sequence, all their N states, and goes through time in tiles of BT tokens: a tile
    # is [BT, BN, BE], laid out so that a thread has all BT of its elements, and the recurrence is multiply-adds between
    # its registers: that is why tile() loads row by row. Sums over states or channels, which go through shared memory,
    # are done once a tile.

    @triton.jit
    def at(x, o_t, k: tl.constexpr):
        """x[k] of a tile; -0.0, so that the compiler sees that nothing is added."""
        return tl.sum(tl.where(o_t == k, x, -0.0), 0)

    @triton.jit
    def softplus(v):
        """log(1 + e), e = exp(v), which for small e is e / (w - 1) times the log of w, e + 1 as it was rounded."""
        e = tl.exp(-tl.abs(v))
        w = 1 + e
        return tl.maximum(v, 0.0) + tl.where(w == 1, e, tl.log(w) * (e / tl.where(w == 1, 1.0, w - 1)))

    @triton.jit
    def tile(x, i, T, s, o_t, o_e, m_e, BT: tl.constexpr, BE: tl.constexpr):
        """[BT, 1, BE] of x (T, E) from row i; loaded at once its tokens, then the state's, would spread over warps."""
        b = tl.zeros([BT, 1, BE], tl.float32)
        for k in tl.static_range(BT):
            row = tl.load(x + (i + k).to(tl.int64) * s + o_e, mask=m_e & (i + k < T), other=0.0).to(tl.float32)
            b = tl.where(o_t == k, row[None], b)  # row [1, BE]
        return b

    @triton.jit
    def inputs(u, dt, B, i, T, su, sdt, sB, o_t, o_e, o_n, m_e, m, m_n, b_bias,
               BT: tl.constexpr, BE: tl.constexpr):
        """A tile's d, u [BT, 1, BE] and B [BT, BN, 1]; d = 0 past the end leaves the state as it is."""
        b_d = tl.where(m, softplus(tile(dt, i, T, sdt, o_t, o_e, m_e, BT, BE) + b_bias), 0.0)
        b_u = tile(u, i, T, su, o_t, o_e, m_e, BT, BE)
        return b_d, b_u, tl.load(B + (i + o_t).to(tl.int64) * sB + o_n[None], mask=m_n, other=0.0).to(tl.float32)

    @triton.jit
    def states(b_d, b_u, b_B, b_A, b_s, o_t, BT: tl.constexpr):
        """-> all s_t and a_t of a tile that begins with the state b_s [BN, BE], and the last s_t."""
        b_a = tl.exp2(b_d * b_A[None])  # [BT, BN, BE]
        b_all = b_d * b_u * b_B
        for k in tl.static_range(BT):
            b_s = at(b_a, o_t, k) * b_s + at(b_all, o_t, k)
            b_all = tl.where(o_t == k, b_s[None], b_all)
        return b_all, b_a, b_s

    @triton.jit
    def scan_fwd_kernel(u, dt, A, B, C, D, z, dt_bias, initial, y, final, saved, T, E, N, su, sdt, sB, sC, sz,
                        EVERY: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr):
        """Strides (batch, time) of u, dt, B, C, z; a sequence's states: (N, E) in saved, (E, N) in initial, final."""
        i_b = tl.program_id(1).to(tl.int64)
        u += i_b * su[0]
        dt += i_b * sdt[0]
        B += i_b * sB[0]
        C += i_b * sC[0]
        y += i_b * T * E
        o_t = tl.arange(0, BT)[:, None, None]
        o_n, o_e = tl.arange(0, BN)[:, None], tl.program_id(0) * BE + tl.arange(0, BE)[None, :]
        m_e = o_e < E
        m_s = (o_n < N) & m_e
        o_s, n_saved = i_b * E * N + o_e * N + o_n, (T - 1) // EVERY
        b_A = tl.load(A + o_e * N + o_n, mask=m_s, other=0.0).to(tl.float32) * 1.4426950408889634  # log2(e)
        b_bias = 0.0 if dt_bias is None else tl.load(dt_bias + o_e, mask=m_e, other=0.0).to(tl.float32)[None]
        b_D = 0.0 if D is None else tl.load(D + o_e, mask=m_e, other=0.0).to(tl.float32)[None]
        b_s = tl.zeros([BN, BE], tl.float32)
        if initial is not None:
            b_s = tl.load(initial + o_s, mask=m_s, other=0.0).to(tl.float32)
        for i in range(0, T, BT):
            if (i % EVERY == 0) & (i > 0):
                tl.store(saved + (i_b * n_saved + i // EVERY - 1) * N * E + o_n * E + o_e, b_s, mask=m_s)
            o = (i + o_t).to(tl.int64)
            m, m_n = (o < T) & m_e[None], (o < T) & (o_n < N)[None]
            b_d, b_u, b_B = inputs(u, dt, B, i, T, su[1], sdt[1], sB[1], o_t, o_e, o_n, m_e, m, m_n, b_bias, BT, BE)
            b_C = tl.load(C + o * sC[1] + o_n[None], mask=m_n, other=0.0).to(tl.float32)  # [BT, BN, 1]
            b_all, _, b_s = states(b_d, b_u, b_B, b_A, b_s, o_t, BT)
            b_y = tl.sum(b_all * b_C, 1, keep_dims=True) + b_D * b_u  # [BT, 1, BE]
            if z is not None:
                b_z = tile(z + i_b * sz[0], i, T, sz[1], o_t, o_e, m_e, BT, BE)
                b_y *= b_z * tl.sigmoid(b_z)
            tl.store(y + o * E + o_e[None], b_y, mask=m)
        tl.store(final + o_s, b_s, mask=m_s)

    @triton.jit
    def scan_bwd_kernel(dy, dfinal, u, dt, A, B, C, D, z, dt_bias, initial, saved, du, ddt, dz, dB, dC, dA, dvec,
                        dinitial, T, E, N, sdy, su, sdt, sB, sC, sz,
                        EVERY: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr):
        """dB, dC (blocks of channels, B, T, N), dA (B, E, N), dvec: dD, ddt_bias (2, B, E), each program its part."""
        i_e, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
        dy += i_b * sdy[0]
        u += i_b * su[0]
        dt += i_b * sdt[0]
        B += i_b * sB[0]
        C += i_b * sC[0]
        du += i_b * T * E
        ddt += i_b * T * E
        dB += (i_e * tl.num_programs(1) + i_b) * T * N
        dC += (i_e * tl.num_programs(1) + i_b) * T * N
        TILES: tl.constexpr = EVERY // BT
        o_t, o_j = tl.arange(0, BT)[:, None, None], tl.arange(0, TILES)[:, None, None]
        o_n, o_e = tl.arange(0, BN)[:, None], i_e * BE + tl.arange(0, BE)[None, :]
        m_e = o_e < E
        m_s = (o_n < N) & m_e
        o_s, n_saved = i_b * E * N + o_e * N + o_n, (T - 1) // EVERY
        b_A = tl.load(A + o_e * N + o_n, mask=m_s, other=0.0).to(tl.float32) * 1.4426950408889634
        b_bias = 0.0 if dt_bias is None else tl.load(dt_bias + o_e, mask=m_e, other=0.0).to(tl.float32)[None]
        b_D = 0.0 if D is None else tl.load(D + o_e, mask=m_e, other=0.0).to(tl.float32)[None]
        b_g = tl.zeros([BN, BE], tl.float32)  # a_{t+1} g_{t+1}
        if dfinal is not None:
            b_g = tl.load(dfinal + o_s, mask=m_s, other=0.0).to(tl.float32)
        b_dA, b_dD, b_dbias = (tl.zeros([BN, BE], tl.float32), tl.zeros([1, BE], tl.float32),
                               tl.zeros([1, BE], tl.float32))
        for i in range(n_saved, -1, -1):
            b_s = tl.zeros([BN, BE], tl.float32)
            if i > 0:
                b_s = tl.load(saved + (i_b * n_saved + i - 1) * N * E + o_n * E + o_e, mask=m_s, other=0.0)
            elif initial is not None:
                b_s = tl.load(initial + o_s, mask=m_s, other=0.0).to(tl.float32)
            n_tiles = tl.cdiv(tl.minimum(T - i * EVERY, EVERY), BT)
            b_before = tl.zeros([TILES, BN, BE], tl.float32)  # the state before each tile
            for j in range(n_tiles):
                b_before = tl.where(o_j == j, b_s[None], b_before)
                first = i * EVERY + j * BT
                o = (first + o_t).to(tl.int64)
                m, m_n = (o < T) & m_e[None], (o < T) & (o_n < N)[None]
                b_d, b_u, b_B = inputs(u, dt, B, first, T, su[1], sdt[1], sB[1], o_t, o_e, o_n, m_e, m, m_n, b_bias,
                                       BT, BE)
                _, _, b_s = states(b_d, b_u, b_B, b_A, b_s, o_t, BT)
            for j in range(n_tiles - 1, -1, -1):
                first = i * EVERY + j * BT
                o = (first + o_t).to(tl.int64)
                m, m_n = (o < T) & m_e[None], (o < T) & (o_n < N)[None]
                b_d, b_u, b_B = inputs(u, dt, B, first, T, su[1], sdt[1], sB[1], o_t, o_e, o_n, m_e, m, m_n, b_bias,
                                       BT, BE)
                b_all, b_a, _ = states(b_d, b_u, b_B, b_A, tl.sum(tl.where(o_j == j, b_before, 0.0), 0), o_t, BT)
                b_C = tl.load(C + o * sC[1] + o_n[None], mask=m_n, other=0.0).to(tl.float32)
                b_o = tile(dy, first, T, sdy[1], o_t, o_e, m_e, BT, BE)  # [BT, 1, BE]
                if z is not None:
                    b_z = tile(z + i_b * sz[0], first, T, sz[1], o_t, o_e, m_e, BT, BE)
                    b_sig = tl.sigmoid(b_z)
                    b_y = tl.sum(b_all * b_C, 1, keep_dims=True) + b_D * b_u
                    b_dz = b_o * b_y * b_sig * (1 + b_z * (1 - b_sig))
                    tl.store(dz + (i_b * T + o) * E + o_e[None], b_dz, mask=m)
                    b_o *= b_z * b_sig
                tl.store(dC + o * N + o_n[None], tl.sum(b_o * b_all, 2, keep_dims=True), mask=m_n)
                b_gs = b_C * b_o  # [BT, BN, BE]
                for k in tl.static_range(BT):
                    b_g += at(b_gs, o_t, BT - 1 - k)
                    b_gs = tl.where(o_t == BT - 1 - k, b_g[None], b_gs)
                    b_g *= at(b_a, o_t, BT - 1 - k)
                b_du = b_d * b_u
                tl.store(dB + o * N + o_n[None], tl.sum(b_du * b_gs, 2, keep_dims=True), mask=m_n)
                b_q = tl.sum(b_B * b_gs, 1, keep_dims=True)  # [BT, 1, BE]
                b_w = b_gs * (b_all - b_du * b_B)  # a_t s_{t-1} = s_t - d_t u_t B_t
                b_dA += tl.sum(b_d * b_w, 0)
                b_dd = b_u * b_q + tl.sum(b_w * b_A[None], 1, keep_dims=True) * 0.6931471805599453  # b_A is A log2(e)
                b_dd *= 1 - tl.exp(-b_d)
                tl.store(du + o * E + o_e[None], b_d * b_q + b_D * b_o, mask=m)
                tl.store(ddt + o * E + o_e[None], b_dd, mask=m)
                b_dD += tl.sum(b_o * b_u, 0)
                b_dbias += tl.sum(b_dd, 0)
        tl.store(dA + o_s, b_dA, mask=m_s)
        tl.store(dvec + i_b * E + o_e, b_dD, mask=m_e)
        tl.store(dvec + (tl.num_programs(1) + i_b) * E + o_e, b_dbias, mask=m_e)
        if dinitial is not None:
            tl.store(dinitial + o_s, b_g, mask=m_s)

    EVERY = 64  # tokens from one saved state to the next

    def scan_config(N, backward):
        """1024 states a program, 4 a thread; backward, with N > 32, 512: then none spills on sm_89."""
        BN = triton.next_power_of_2(N)
        if BN > 256:
            raise ValueError(f"selective_scan: N = {N} states a channel are too many for the kernels, at most 256")
        return dict(EVERY=EVERY, BT=4, BN=BN, BE=(512 if backward and BN > 32 else 1024) // BN, num_warps=8)

    def dense_rows(*tensors):
        return [None if t is None else t if t.stride(-1) == 1 else t.contiguous() for t in tensors]

    def strides(t):
        return (0, 0) if t is None else t.stride()[:2]

    @custom_op("kernels::selective_scan", mutates_args=())
    def scan_op(u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
                D: torch.Tensor | None, z: torch.Tensor | None, dt_bias: torch.Tensor | None,
                initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> y, final, and the states after every EVERY tokens for backward."""
        (batch, T, E), N = u.shape, A.shape[1]
        u, dt, B, C, z = dense_rows(u, dt, B, C, z)
        y, final = u.new_empty(u.shape), u.new_empty(batch, E, N, dtype=torch.float32)
        saved = u.new_empty(batch, max(0, T - 1) // EVERY, N, E, dtype=torch.float32)
        how = scan_config(N, False)
        scan_fwd_kernel[(triton.cdiv(E, how["BE"]), batch)](
            u, dt, A.contiguous(), B, C, D, z, dt_bias, None if initial is None else initial.contiguous(),
            y, final, saved, T, E, N, *map(strides, (u, dt, B, C, z)), **how)
        return y, final, saved

    @scan_op.register_fake
    def _(u, dt, A, B, C, D, z, dt_bias, initial):
        (batch, T, E), N = u.shape, A.shape[1]
        new = lambda *shape: u.new_empty(shape, dtype=torch.float32)
        return u.new_empty(u.shape), new(batch, E, N), new(batch, max(0, T - 1) // EVERY, N, E)

    @custom_op("kernels::selective_scan_bwd", mutates_args=())
    def scan_bwd_op(dy: torch.Tensor, dfinal: torch.Tensor | None, u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor,
                    B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None,
                    dt_bias: torch.Tensor | None, initial: torch.Tensor | None, saved: torch.Tensor
                    ) -> list[torch.Tensor]:
        """-> du, ddt, dz (empty without z), dB, dC, dA (E, N) fp32, dD, ddt_bias (2, E) fp32, dinitial (or empty)."""
        (batch, T, E), N = u.shape, A.shape[1]
        dy, u, dt, B, C, z = dense_rows(dy, u, dt, B, C, z)
        du, ddt, dz = (None if t is None else t.new_empty(t.shape) for t in (u, dt, z))
        how = scan_config(N, True)
        blocks, new = triton.cdiv(E, how["BE"]), lambda *shape: u.new_empty(shape, dtype=torch.float32)
        dB, dC, dA, dvec = new(blocks, batch, T, N), new(blocks, batch, T, N), new(batch, E, N), new(2, batch, E)
        dinitial = None if initial is None else new(batch, E, N)
        scan_bwd_kernel[(blocks, batch)](
            dy, None if dfinal is None else dfinal.contiguous(), u, dt, A.contiguous(), B, C, D, z, dt_bias,
            None if initial is None else initial.contiguous(), saved, du, ddt, dz, dB, dC, dA, dvec, dinitial,
            T, E, N, *map(strides, (dy, u, dt, B, C, z)), **how)
        empty = u.new_empty(0)
        return [du, ddt, empty if dz is None else dz, dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dA.sum(0),
                dvec.sum(1), new(0) if dinitial is None else dinitial]  # no two of them are one tensor

    @scan_bwd_op.register_fake
    def _(dy, dfinal, u, dt, A, B, C, D, z, dt_bias, initial, saved):
        new = lambda *shape: u.new_empty(shape, dtype=torch.float32)
        return [u.new_empty(u.shape), dt.new_empty(dt.shape), u.new_empty(0) if z is None else z.new_empty(z.shape),
                B.new_empty(B.shape), C.new_empty(C.shape), new(*A.shape), new(2, u.shape[2]),
                new(0) if initial is None else new(*initial.shape)]

    def save_for_backward(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[2])
        ctx.set_materialize_grads(False)  # an unused final brings no gradient: not a tensor of zeros to read

    def scan_backward(ctx, dy, dfinal, _):
        u, dt, A, B, C, D, z, dt_bias, initial, saved = ctx.saved_tensors
        dy = torch.zeros_like(u) if dy is None else dy
        du, ddt, dz, dB, dC, dA, dvec, dinitial = scan_bwd_op(dy, dfinal, u, dt, A, B, C, D, z, dt_bias, initial, saved)
        return (du, ddt, dA.to(A.dtype), dB, dC, None if D is None else dvec[0].to(D.dtype), None if z is None else dz,
                None if dt_bias is None else dvec[1].to(dt_bias.dtype),
                None if initial is None else dinitial.to(initial.dtype))

    scan_op.register_autograd(scan_backward, setup_context=save_for_backward)


def selective_scan(u, dt, A, B, C, D=None, z=None, dt_bias=None, initial=None):
    """u, dt, z (B, T, E), A (E, N), B and C (B, T, N), D and dt_bias (E,), initial (B, E, N): the state before the
    first token, or zeros -> y (B, T, E) in u's dtype, final (B, E, N) in fp32. ValueError: shapes that do not fit; on a
    GPU N > 256."""
    (batch, T, E), N = u.shape, A.shape[-1]
    want = [(batch, T, E), (batch, T, E), (E, N), (batch, T, N), (batch, T, N), (E,), (batch, T, E), (E,),
            (batch, E, N)]
    found = [None if t is None else tuple(t.shape) for t in (u, dt, A, B, C, D, z, dt_bias, initial)]
    if any(f not in (None, w) for f, w in zip(found, want)):
        raise ValueError(f"selective_scan: shapes {found}; expected u, dt, z (B, T, E), A (E, N), B, C (B, T, N), "
                         "D, dt_bias (E,), initial (B, E, N)")
    which = form(u)
    if which == "triton":
        return scan_op(u, dt, A, B, C, D, z, dt_bias, initial)[:2]
    if (which == "torch" and u.is_cpu and u.dtype != torch.float64 and not torch.compiler.is_compiling()
            and compiled(SOURCE)):
        return CompiledScan.apply(u, dt, A, B, C, D, z, dt_bias, initial)
    return (selective_scan_ref if which == "ref" else SelectiveScan.apply)(u, dt, A, B, C, D, z, dt_bias, initial)
