"""
NF4: weights as 16 levels of a normal distribution, with double quantisation; and the linear layer of such a weight
    Dettmers et al. 2023, QLoRA, arXiv:2305.14314 (sections 3 and 4, appendix E)

quantize_nf4(w)          w of any shape, flat in blocks of 64:   absmax_b = max |w| of the block
                         level = the nearest of LEVELS to w / absmax_b; two a byte, the first in the high half
    double quantisation  a = absmax - mean(absmax), in blocks of 256:  s = max |a|,  code = the nearest of MAP to a / s
dequantize_nf4(q, dtype) w' = LEVELS[level] absmax',   absmax' = MAP[code] s + mean
nf4_linear(x, q)         y = x W'^T        x (..., K), q of W (N, K) -> (..., N);   backward dx = dy W', W' is frozen

q is a dict: packed (n / 2, 1) uint8; absmax (n / 64) uint8 codes, or fp32 with double=False; nested (n / 16384) fp32,
the s of each 256 codes; offset () fp32, the mean; shape. The bytes are bitsandbytes' own (packed, absmax,
nested_absmax, nested_offset there). 4 + 8 / 64 + 32 / 16384 = 4.127 bits a weight. A block not full is one, too.

Plain form: a table of 256 pairs of levels, indexed by byte. W' is made in forward, dropped, and made again in backward.
Triton form: the levels come from 15 selects in registers, the scales of the blocks from MAP by a load each.
    quantize     reads w, writes packed and absmax once; the second quantisation, of 1/64 of the numbers, is PyTorch's
    dequantize   reads packed and scales, writes w' once; besides, 4 bytes of MAP, s and mean for each 64 weights
    nf4_linear   up to ROWS rows of x: W' lives in registers only, 0.52 bytes a weight instead of 2 in bf16, for each
                 64 columns of y x is read once more, which the cache gives. More rows: W' is written once in x's dtype
                 (0.5 + 2 bytes a weight, then 2 N K read by the product) and the vendor's GEMM does the rest, which is
                 bound by its FLOPs from about 250 rows on. Backward: the same with dy. Saved: q and nothing else.
FLOPs: 2 M N K a product. Results repeat bit for bit: no atomics.
"""
import functools
import os

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


ROWS = 16  # rows of x up to which the product decodes W' in registers
LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
          -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
          0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def dynamic_map():
    """The 256 values of the second quantisation (Dettmers et al. 2021, arXiv:2110.02861, section 1.3): 2^i cells of
    [0.1, 1] at scale 10^(i - 6), their midpoints with both signs; 0; 1."""
    values = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        cells = (10 ** (i - 6) * ((ends[:-1] + ends[1:]) / 2)).tolist()
        values += cells + [-c for c in cells]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


TABLES = {"levels": torch.tensor(LEVELS, device="cpu"), "map": dynamic_map()}
TABLES["pairs"] = torch.cartesian_prod(TABLES["levels"], TABLES["levels"])  # (256, 2): what a byte holds


def table(name, device):
    """A table on the device, copied there once."""
    key = (name, device)
    if key not in TABLES:
        TABLES[key] = TABLES[name].to(device)
    return TABLES[key]


def nearest(x, values):
    """Index of the nearest of the sorted values; of two as near, the lower."""
    return torch.bucketize(x, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8)


def in_blocks(x, size):
    """x flat, filled up with zeros to whole blocks: (blocks, size) fp32."""
    x = x.reshape(-1)
    return F.pad(x, (0, -x.numel() % size)).view(-1, size).float()


# ---------------------------------------------------------------- the definition
def quantize_nf4_ref(w, double=True):
    blocks = in_blocks(w.detach(), 64)                                                  # (n / 64, 64)
    absmax = blocks.abs().amax(1)
    level = nearest(blocks * (1 / absmax.clamp(min=1e-37))[:, None], table("levels", w.device))
    level = level.flatten()[:w.numel() + w.numel() % 2]
    return nest(dict(packed=(level[::2] << 4 | level[1::2])[:, None], absmax=absmax, shape=w.shape), double)


def nest(q, double=True):
    """The second quantisation, of absmax."""
    if not double:
        return q | dict(nested=None, offset=None)
    offset = q["absmax"].mean()
    blocks = in_blocks(q["absmax"] - offset, 256)
    nested = blocks.abs().amax(1)
    code = nearest(blocks * (1 / nested.clamp(min=1e-37))[:, None], table("map", offset.device))
    return q | dict(absmax=code.flatten()[:q["absmax"].numel()], nested=nested, offset=offset)


def scales(q):
    """absmax' of each block, fp32."""
    if q["nested"] is None:
        return q["absmax"]
    values = table("map", q["absmax"].device)[q["absmax"].int()]
    return values * q["nested"].repeat_interleave(256)[:values.numel()] + q["offset"]


def dequantize_nf4_ref(q, dtype=torch.float32):
    packed, levels = q["packed"].flatten(), table("levels", q["packed"].device)
    level = torch.stack([packed >> 4, packed & 15], 1).flatten().int()                  # (n)
    return (in_blocks(levels[level], 64) * scales(q)[:, None]).flatten()[:q["shape"].numel()].view(q["shape"]).to(dtype)


def nf4_linear_ref(x, q):
    return F.linear(x, dequantize_nf4_ref(q, torch.promote_types(x.dtype, torch.float32)).to(x.dtype))


# ---------------------------------------------------------------- plain PyTorch
def dequantize_nf4_torch(q, dtype=torch.float32):
    packed, n = q["packed"].flatten(), q["shape"].numel()
    pairs = F.embedding(packed.int(), table("pairs", packed.device))                    # (n / 2, 2)
    w = pairs.view(-1, 64) if n % 64 == 0 else in_blocks(pairs, 64)
    return w.mul_(scales(q)[:, None]).flatten()[:n].view(q["shape"]).to(dtype)


class NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return F.linear(x, dequantize_nf4_torch(q, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return dy @ dequantize_nf4_torch(ctx.q, dy.dtype), None


if triton is not None:

    @triton.jit
    def level_of(i):
        """LEVELS[i] by the four bits of i."""
        b0, b1, b2 = (i & 1) != 0, (i & 2) != 0, (i & 4) != 0
        low = tl.where(b2, tl.where(b1, tl.where(b0, 0.0, -0.09105003625154495),
                                    tl.where(b0, -0.18477343022823334, -0.28444138169288635)),
                       tl.where(b1, tl.where(b0, -0.39491748809814453, -0.5250730514526367),
                                tl.where(b0, -0.6961928009986877, -1.0)))
        high = tl.where(b2, tl.where(b1, tl.where(b0, 1.0, 0.7229568362236023),
                                     tl.where(b0, 0.5626170039176941, 0.44070982933044434)),
                        tl.where(b1, tl.where(b0, 0.33791524171829224, 0.24611230194568634),
                                 tl.where(b0, 0.16093020141124725, 0.07958029955625534)))
        return tl.where((i & 8) != 0, high, low)

    @triton.jit
    def load_scales(absmax, nested, offset, table, o_b, m_b):
        """absmax' of the blocks o_b."""
        if nested is not None:
            code = tl.load(absmax + o_b, mask=m_b, other=0).to(tl.int32)
            s = tl.load(nested + o_b // 256, mask=m_b, other=0.0)
            return tl.load(table + code, mask=m_b, other=0.0) * s + tl.load(offset)
        else:
            return tl.load(absmax + o_b, mask=m_b, other=0.0)

    @triton.jit
    def quantize_kernel(w, table, packed, absmax, n, n_packed, BB: tl.constexpr):
        """BB blocks of 64 a program. table: midpoints between the levels; the index is the number of those below."""
        o_b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
        o = o_b[:, None] * 64 + tl.arange(0, 64)[None, :]
        b_w = tl.load(w + o, mask=o < n, other=0.0).to(tl.float32)                      # [BB, 64]
        b_max = tl.max(tl.abs(b_w), 1)                                                  # [BB]
        tl.store(absmax + o_b, b_max, mask=o_b * 64 < n)
        b_w = b_w * tl.div_rn(1.0, tl.maximum(b_max, 1e-37))[:, None]
        level = tl.zeros((BB, 64), tl.int32)
        for i in tl.static_range(15):
            level += (b_w > tl.load(table + i)).to(tl.int32)
        first, second = tl.split(tl.reshape(level, (BB, 32, 2)))                        # [BB, 32] each
        o = o_b[:, None] * 32 + tl.arange(0, 32)[None, :]
        tl.store(packed + o, (first << 4 | second).to(tl.uint8), mask=o < n_packed)

    @triton.jit
    def dequantize_kernel(packed, absmax, nested, offset, table, w, n, n_packed, BB: tl.constexpr):
        o_b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
        o = o_b[:, None] * 32 + tl.arange(0, 32)[None, :]
        b_p = tl.load(packed + o, mask=o < n_packed, other=0)                           # [BB, 32]
        b_w = tl.reshape(tl.join(level_of(b_p >> 4), level_of(b_p & 15)), (BB, 64))
        b_w *= load_scales(absmax, nested, offset, table, o_b, o_b * 64 < n)[:, None]
        o = o_b[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(w + o, b_w, mask=o < n)

    # y_mn = sum over blocks b of row n of absmax'_nb (sum over its first halves x_mk level_nk + same over its second)
    @triton.jit
    def linear_kernel(x, packed, absmax, nested, offset, table, y, M, N, K,
                      BM: tl.constexpr, BN: tl.constexpr):
        o_m, o_h = tl.arange(0, BM)[:, None], tl.arange(0, 32)
        o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
        m_m, m_n = o_m < M, o_n < N
        p_x = x + o_m * K + 2 * o_h[None, :]                                            # [BM, 32]
        p_w = packed + o_n[None, :] * (K // 2) + o_h[:, None]                           # [32, BN]
        acc = tl.zeros((BM, BN), tl.float32)
        for b in range(0, K // 64):
            b_p = tl.load(p_w + b * 32, mask=m_n[None, :], other=0)
            s = load_scales(absmax, nested, offset, table, o_n * (K // 64) + b, m_n)[None, :]
            b_x = tl.load(p_x + b * 64, mask=m_m, other=0.0)
            acc = tl.dot(b_x, (level_of(b_p >> 4) * s).to(b_x.dtype), acc, input_precision="ieee")
            b_x = tl.load(p_x + b * 64 + 1, mask=m_m, other=0.0)
            acc = tl.dot(b_x, (level_of(b_p & 15) * s).to(b_x.dtype), acc, input_precision="ieee")
        tl.store(y + o_m * N + o_n[None, :], acc, mask=m_m & m_n[None, :])

    BB = 32  # blocks of 64 a program of quantize and dequantize takes

    @custom_op("kernels::quantize_nf4", mutates_args=())
    def quantize_op(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> packed (n / 2, 1), absmax (n / 64) fp32."""
        n, levels = w.numel(), table("levels", w.device)
        packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=w.device)
        absmax = torch.empty(triton.cdiv(n, 64), dtype=torch.float32, device=w.device)
        quantize_kernel[(triton.cdiv(n, 64 * BB),)](w, (levels[:-1] + levels[1:]) / 2, packed, absmax, n,
                                                    packed.numel(), BB=BB)
        return packed, absmax

    @custom_op("kernels::dequantize_nf4", mutates_args=())
    def dequantize_op(packed: torch.Tensor, absmax: torch.Tensor, nested: torch.Tensor | None,
                      offset: torch.Tensor | None, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        w = torch.empty(shape, dtype=dtype, device=packed.device)
        n = w.numel()
        dequantize_kernel[(triton.cdiv(n, 64 * BB),)](packed, absmax, nested, offset, table("map", packed.device), w, n,
                                                      packed.numel(), BB=BB)
        return w

    @custom_op("kernels::nf4_linear", mutates_args=())
    def linear_op(x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, nested: torch.Tensor | None,
                  offset: torch.Tensor | None, N: int) -> torch.Tensor:
        """x (M, K) contiguous -> (M, N)."""
        M, K = x.shape
        if M > ROWS or K % 64:
            return x @ dequantize_op(packed, absmax, nested, offset, [N, K], x.dtype).t()
        y = x.new_empty(M, N)
        linear_kernel[(triton.cdiv(N, 32),)](x, packed, absmax, nested, offset, table("map", x.device), y, M, N, K,
                                             BM=16, BN=32, num_warps=2, num_stages=4)
        return y

    quantize_op.register_fake(lambda w: (
        w.new_empty((w.numel() + 1) // 2, 1, dtype=torch.uint8), w.new_empty(-(-w.numel() // 64), dtype=torch.float32)))
    dequantize_op.register_fake(lambda packed, absmax, nested, offset, shape, dtype: (
        packed.new_empty(shape, dtype=dtype)))
    linear_op.register_fake(lambda x, packed, absmax, nested, offset, N: x.new_empty(x.shape[0], N))

    def linear_setup(ctx, inputs, output):
        x, *q, N = inputs
        ctx.shape = [N, x.shape[1]]
        ctx.save_for_backward(*q)

    def linear_backward(ctx, dy):
        return dy @ dequantize_op(*ctx.saved_tensors, ctx.shape, dy.dtype), None, None, None, None, None

    linear_op.register_autograd(linear_backward, setup_context=linear_setup)


def quantize_nf4(w, double=True):
    """w of any shape and float dtype -> q: see the top of the file. Without double the scales stay fp32."""
    if form(w) != "triton":
        return quantize_nf4_ref(w, double)
    packed, absmax = quantize_op(w.detach().contiguous())
    return nest(dict(packed=packed, absmax=absmax, shape=w.shape), double)


def dequantize_nf4(q, dtype=torch.float32):
    """q -> the weight, in its shape."""
    which = form(q["packed"])
    if which == "triton":
        return dequantize_op(q["packed"], q["absmax"], q["nested"], q["offset"], list(q["shape"]), dtype)
    return dequantize_nf4_ref(q, dtype) if which == "ref" else dequantize_nf4_torch(q, dtype)


def nf4_linear(x, q):
    """x (..., K), q of a weight (N, K) -> x W'^T (..., N), in x's dtype, under autocast in the autocast dtype."""
    N, K = q["shape"]
    if x.shape[-1] != K:
        raise ValueError(f"nf4_linear: x {tuple(x.shape)}, (..., {K}) expected for a weight {tuple(q['shape'])}")
    device, which = x.device.type, form(x)
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if which == "triton":
        y = linear_op(x.reshape(-1, K).contiguous(), q["packed"], q["absmax"], q["nested"], q["offset"], N)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], N)
    return nf4_linear_ref(x, q) if which == "ref" else NF4Linear.apply(x, q)
