"""
AdamW in one kernel per tensor, and AdamW with 8-bit states

    m = b1 m + (1 - b1) g                      v = b2 v + (1 - b2) g^2
    p = p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
Loshchilov & Hutter 2019, arXiv:1711.05101v3, algorithm 2; lr stands for both its alpha and its eta, as in
torch.optim.AdamW.

    AdamW(params, lr, betas, eps, weight_decay)    states and state_dict are torch.optim.AdamW's: each loads the other's
    AdamW8bit(the same arguments)                  m and v in one byte each

AdamW8bit: Dettmers, Lewis, Shleifer & Zettlemoyer 2022, "8-bit Optimizers via Block-wise Quantization",
arXiv:2110.02861v2, section 2. A tensor is cut into blocks of 256 elements in row-major order; a block keeps its
largest magnitude in fp32 and for each element the index of the value nearest x / largest in a map of 256
(`dynamic_map`). The step runs in fp32 between reading and writing codes. One difference: v's code is at least 1, the
smallest positive value. A v rounded to 0 beside an m that is not would make the next step as large as lr m / eps (the
zero-point problem: Li, Chen & Zhu 2023, arXiv:2309.01507).
Tensors under 4096 elements (norms, biases) keep AdamW's states.

Parameters and gradients fp32, bf16 or fp16, any strides; arithmetic in fp32. AdamW's states have the parameter's
dtype, as torch's have: train fp32 parameters (under autocast), since b2 = 0.999 moves v by less than bf16 resolves.
Sparse gradients and complex parameters raise RuntimeError; a state_dict with amsgrad or maximize, or of the other
class, ValueError.

Bytes per fp32 element, each input read and each output written once: AdamW 28 (p g m v in, p m v out), 8 of them
states; AdamW8bit 16.06 (p g in, p out, a byte of code 4 times, 4 / 256 bytes of scale 4 times), 2.03 of them states.
FLOPs: about 15, and about 250 with the codes: at 504 GB/s and 29 TFLOP/s (RTX 4070) the bytes take 32 ns per
thousand, the FLOPs 9.

On a GPU one launch per tensor; lr and step are run-time scalars, so nothing recompiles. On other devices AdamW is
PyTorch's fused step, and AdamW8bit works through 2 MB of temporaries. DTensor parameters (FSDP2): AdamW's states are
DTensors as torch's are; AdamW8bit's are plain tensors for this rank's shard, which only the same rank of as many can
load.
"""
import functools
import os

import torch
from torch.optim.adamw import adamw as torch_adamw

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


BLOCK = 256  # elements that share a scale. The paper: 2048; a shorter block loses fewer small values, for 0.03 bytes
SMALLEST = 4096  # tensors with fewer elements keep full states
CHUNK = 1 << 16  # elements that the PyTorch form has in hand at a time


def adamw_ref(p, g, m, v, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    """Step number `step` (1, 2, ...) -> new p, m, v; nothing changes in place. Tensors of one shape."""
    wide = torch.promote_types(p.dtype, torch.float32)
    p_, g, m_, v_ = (t.to(wide) for t in (p, g, m, v))
    m_ = betas[0] * m_ + (1 - betas[0]) * g
    v_ = betas[1] * v_ + (1 - betas[1]) * g * g
    m_hat, v_hat = m_ / (1 - betas[0] ** step), v_ / (1 - betas[1] ** step)
    p_ = p_ - lr * weight_decay * p_ - lr * m_hat / (v_hat.sqrt() + eps)
    return p_.to(p.dtype), m_.to(m.dtype), v_.to(v.dtype)


# Dynamic (tree) quantisation: Dettmers 2016, arXiv:1511.04561, and 2022, section 2.2. After the sign, E zero bits stand
# for 10^-E, a one bit ends them, and the bits left cut [0.1, 1] 10^-E into equal cells, each meaning its middle: 6 - E
# bits with a sign, 7 - E without. So decade i = 6 - E = 0 ... 6 has 2^i cells with a sign, 2 2^i without; the values 0
# and 1 make it 256.
def dynamic_map(signed, device=None):
    """Code -> value, 256 of them, rising, fp32. Signed: code 127 is 0, code 255 is 1; unsigned: codes 0 and 255."""
    n = 1 if signed else 2
    middles = [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / (n << i)) for i in range(7) for j in range(n << i)]
    return torch.tensor([-x for x in reversed(middles) if signed] + [0.0] + middles + [1.0], device=device)


def quantize_ref(x, signed):
    """x -> codes (x.numel(),) uint8, scales (blocks,) fp32, by the distance to every value; the lower one at a tie."""
    blocks = x.float().reshape(-1).split(BLOCK)
    scales = torch.stack([b.abs().max() for b in blocks])
    values = dynamic_map(signed, x.device).double()
    nearest = lambda b, s: (b.double()[:, None] / s.clamp(min=1e-38).double() - values).abs().argmin(1)
    codes = torch.cat([nearest(b, s) for b, s in zip(blocks, scales)])
    return codes.clamp(min=0 if signed else 1).to(torch.uint8), scales


def dequantize_ref(codes, scales, signed):
    """codes (N,) uint8, scales (blocks,) -> (N,) fp32."""
    return dynamic_map(signed, codes.device)[codes.long()] * scales.repeat_interleave(BLOCK)[: codes.numel()]


def adamw8bit_ref(p, g, m, m_scale, v, v_scale, step, **hyper):
    """adamw_ref between dequantising and quantising -> new p, m, m_scale, v, v_scale. m, v: codes (p.numel(),)."""
    m_ = dequantize_ref(m, m_scale, True).view(p.shape)
    v_ = dequantize_ref(v, v_scale, False).view(p.shape)
    p, m_, v_ = adamw_ref(p, g, m_, v_, step, **hyper)
    return p, *quantize_ref(m_, True), *quantize_ref(v_, False)


@functools.lru_cache
def tables(signed, device):
    """Quantising without a search: a float's upper 16 bits name a cell that at most one boundary of the map crosses.
    -> the map (256,), and for each of the 2^16 cells the code at its lower end (uint8), the boundary above (fp32)."""
    values = dynamic_map(signed)
    boundary = ((values[1:].double() + values[:-1]) / 2).float()  # (255,)
    bits = torch.arange(1 << 16)
    lowest = (bits << 16) | torch.where(bits >> 15 == 1, 0xFFFF, 0)  # negative floats fall as their bits rise
    code = torch.searchsorted(boundary, lowest.to(torch.int32).view(torch.float32))
    above = torch.cat([boundary, torch.tensor([float("inf")])])[code]
    return values.to(device), code.to(torch.uint8).to(device), above.to(device)


def quantize_torch(x, signed):
    """x (blocks, width) fp32 -> codes (blocks, width) uint8 and scales (blocks,). Overwrites x."""
    scale = x.abs().amax(1)  # (blocks,)
    x.div_(scale.clamp(min=1e-38)[:, None])
    _, code, above = tables(signed, x.device)
    cell = (x.view(-1).view(torch.int32) >> 16) & 0xFFFF
    codes = code.index_select(0, cell).add_((x.view(-1) > above.index_select(0, cell)).view(torch.uint8))
    return codes.clamp_(min=0 if signed else 1).view_as(x), scale


def adamw8bit_torch(p, g, m, m_scale, v, v_scale, step, lr, betas, eps, weight_decay):
    """adamw8bit_ref in place, CHUNK elements at a time. p, g contiguous."""
    p, g, n = p.view(-1), g.view(-1), p.numel()
    whole = n // BLOCK * BLOCK  # what is left is one shorter block
    starts = [*range(0, whole, CHUNK)] + [whole] * (whole < n)
    for start, end in zip(starts, starts[1:] + [n]):
        part, rows = slice(start, end), slice(start // BLOCK, -(-end // BLOCK))
        shape = rows.stop - rows.start, -1  # (blocks, width) from here on
        read = lambda code, signed: tables(signed, p.device)[0].index_select(0, code[part].int()).view(shape)
        g_ = g[part].float().view(shape)
        m_ = read(m, True).mul_(m_scale[rows, None])
        v_ = read(v, False).mul_(v_scale[rows, None])
        m_.mul_(betas[0]).add_(g_, alpha=1 - betas[0])
        v_.mul_(betas[1]).addcmul_(g_, g_, value=1 - betas[1])
        p_ = p[part].float().view(shape)  # a view of p where p is fp32
        p_.add_(p_, alpha=-lr * weight_decay)
        denominator = v_.sqrt().mul_((1 - betas[1] ** step) ** -0.5).add_(eps)
        p_.addcdiv_(m_, denominator, value=-lr / (1 - betas[0] ** step))
        if p.dtype != torch.float32:
            p[part] = p_.view(-1)
        for x, code, scale, signed in ((m_, m, m_scale, True), (v_, v, v_scale, False)):
            codes, scale[rows] = quantize_torch(x, signed)
            code[part] = codes.view(-1)


if triton is not None:

    @triton.jit
    def update(p, g, m, v, lr, lr_wd, b1, c1, b2, c2, root, eps):
        """The step in fp32, with the scalars of `scalars`."""
        m = b1 * m + c1 * g
        v = b2 * v + c2 * g * g
        return p - lr_wd * p - lr * m / (tl.sqrt(v) * root + eps), m, v

    def scalars(step, lr, b1, b2, eps, weight_decay):
        """lr / (1 - b1^t), lr wd, b1, 1 - b1, b2, 1 - b2, 1 / sqrt(1 - b2^t), eps. 1 - 0.999 in fp32 is off by 1e-5."""
        return lr / (1 - b1**step), lr * weight_decay, b1, 1 - b1, b2, 1 - b2, (1 - b2**step) ** -0.5, eps

    @triton.jit
    def adamw_kernel(P, G, M, V, n, lr, lr_wd, b1, c1, b2, c2, root, eps, BN: tl.constexpr):
        o = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
        mask = o < n
        p = tl.load(P + o, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(G + o, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(M + o, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(V + o, mask=mask, other=0.0).to(tl.float32)
        p, m, v = update(p, g, m, v, lr, lr_wd, b1, c1, b2, c2, root, eps)
        tl.store(P + o, p, mask=mask)
        tl.store(M + o, m, mask=mask)
        tl.store(V + o, v, mask=mask)

    # The map without a table. S = 1 with a sign, 2 without; k is the code counted from that of 0. Decade i has n =
    # S 2^i cells: k = 1 + n - S + j for j = 0 ... n - 1, and the value 1 is k = 1 + 127 S.
    @triton.jit
    def decode(k, S: tl.constexpr):
        """k -> value in [0, 1]."""
        value = tl.zeros_like(k).to(tl.float32)
        for i in tl.static_range(7):
            j = k - (1 + S * 2**i - S)
            middle = 10.0 ** (i - 6) * (0.1 + (j.to(tl.float32) + 0.5) * (0.9 / (S * 2**i)))
            value = tl.where(j >= 0, middle, value)
        return tl.where(k == 1 + 127 * S, 1.0, value)

    @triton.jit
    def encode(a, S: tl.constexpr):
        """a in [0, 1] -> the k whose value is nearest. Decade i begins halfway between the last value below it,
        10^(i-7) (1 - 0.9 / n), and its own first, 10^(i-7) (1 + 4.5 / n); decade 0 at half its first."""
        k = tl.zeros_like(a).to(tl.int32)
        for i in tl.static_range(7):
            begin = 10.0 ** (i - 7) * (1 + 1.8 / (S * 2**i)) if i > 0 else 0.5e-6 * (0.1 + 0.45 / S)
            j = tl.floor((a * 10.0 ** (6 - i) - 0.1) * (S * 2**i / 0.9))
            j = tl.minimum(tl.maximum(j, 0.0), S * 2.0**i - 1.0).to(tl.int32)
            k = tl.where(a > begin, 1 + S * 2**i - S + j, k)
        return tl.where(a > 1 - 0.225 / (64 * S), 1 + 127 * S, k)  # halfway between 1 and the value below it

    @triton.jit
    def adamw8bit_kernel(P, G, M, M_scale, V, V_scale, n, lr, lr_wd, b1, c1, b2, c2, root, eps,
                         ROWS: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # a row is a block of the quantisation
        o = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
        mask, m_row = o < n, row * BLOCK < n
        p = tl.load(P + o, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(G + o, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(M + o, mask=mask, other=127).to(tl.int32) - 127
        m = decode(tl.abs(k), 1) * tl.load(M_scale + row, mask=m_row, other=0.0)[:, None]
        m = tl.where(k < 0, -m, m)
        k = tl.load(V + o, mask=mask, other=0).to(tl.int32)
        v = decode(k, 2) * tl.load(V_scale + row, mask=m_row, other=0.0)[:, None]
        p, m, v = update(p, g, m, v, lr, lr_wd, b1, c1, b2, c2, root, eps)  # lanes past n stay 0: they raise no maximum
        tl.store(P + o, p, mask=mask)
        m_scale, v_scale = tl.max(tl.abs(m), 1), tl.max(v, 1)  # [ROWS]
        tl.store(M_scale + row, m_scale, mask=m_row)
        tl.store(V_scale + row, v_scale, mask=m_row)
        # 1e-37: a number that fp32 does not have as a normal one would make all of it fp64
        k = encode(tl.abs(m) / tl.maximum(m_scale, 1e-37)[:, None], 1)
        k = tl.where(m < 0, -tl.minimum(k, 127), k)  # the map has 1 but not -1
        tl.store(M + o, (k + 127).to(tl.uint8), mask=mask)
        k = encode(v / tl.maximum(v_scale, 1e-37)[:, None], 2)
        tl.store(V + o, tl.maximum(k, 1).to(tl.uint8), mask=mask)

    # `step` is a tensor on the CPU that only the body reads: a dry run with fake tensors passes by
    @custom_op("kernels::adamw_", mutates_args=("p", "m", "v"))
    def adamw_op(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: torch.Tensor,
                 lr: float, b1: float, b2: float, eps: float, weight_decay: float) -> None:
        own, n = (p, g, m, v), p.numel()
        # where all four lie in memory in one order and without holes, the order does not matter
        dense = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride())) + 1 == n
        flat = own if dense and all(t.stride() == p.stride() for t in own) else [t.contiguous() for t in own]
        if n:
            how = scalars(step.item(), lr, b1, b2, eps, weight_decay)
            adamw_kernel[(triton.cdiv(n, 1024),)](*flat, n, *how, BN=1024)
        for t, new in ((p, flat[0]), (m, flat[2]), (v, flat[3])):
            if new is not t:
                t.copy_(new)

    adamw_op.register_fake(lambda *args: None)


# A custom op for all forms: its 10 us are little beside such a tensor's step, and a dry run with fake tensors passes by
@custom_op("kernels::adamw8bit_", mutates_args=("p", "m", "m_scale", "v", "v_scale"))
def adamw8bit_op(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, m_scale: torch.Tensor, v: torch.Tensor,
                 v_scale: torch.Tensor, step: torch.Tensor,
                 lr: float, b1: float, b2: float, eps: float, weight_decay: float) -> None:
    kind, state, t = form(p), (m, m_scale, v, v_scale), step.item()
    q, g = p.contiguous(), g.contiguous()
    hyper = dict(lr=lr, betas=(b1, b2), eps=eps, weight_decay=weight_decay)
    if kind == "ref":
        q, *new = adamw8bit_ref(q, g, *state, t, **hyper)
        for old, values in zip(state, new):
            old.copy_(values)
    elif kind == "torch":
        adamw8bit_torch(q, g, *state, t, **hyper)
    else:
        how = scalars(t, lr, b1, b2, eps, weight_decay)
        adamw8bit_kernel[(triton.cdiv(m_scale.numel(), 2),)](q, g, *state, p.numel(), *how, ROWS=2, BLOCK=BLOCK)
    if q is not p:
        p.copy_(q)


adamw8bit_op.register_fake(lambda *args: None)


def local(t):
    """This rank's shard of a DTensor; any other tensor itself."""
    return t.to_local() if hasattr(t, "to_local") else t


class AdamW(torch.optim.Optimizer):
    """AdamW with torch.optim.AdamW's states (step, exp_avg, exp_avg_sq) and state_dict: each loads the other's."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for name, value in defaults.items():
            if not (all(0 <= b < 1 for b in value) if name == "betas" else value >= 0):
                raise ValueError(f"{type(self).__name__}: {name} cannot be {value}")
        super().__init__(params, defaults)

    def layout(self, p):
        """State's name -> (number of elements, dtype), without step."""
        return {"exp_avg": (p.numel(), p.dtype), "exp_avg_sq": (p.numel(), p.dtype)}

    def init_state(self, p):
        return {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure=None):
        """One step; closure, if given, computes loss and gradients anew, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p.grad.is_sparse or p.is_complex():
                    raise RuntimeError(f"{type(self).__name__}: no sparse gradients, no complex parameters")
                if not self.state[p]:
                    self.state[p] = {"step": torch.zeros((), device="cpu"), **self.init_state(p)}
            self.update(params, group)
        return loss

    def update(self, params, group):
        lr, (b1, b2), eps, wd = float(group["lr"]), group["betas"], group["eps"], group["weight_decay"]
        plain = [p for p in params if form(p) == "torch"]
        if plain:
            of = lambda name: [self.state[p][name] for p in plain]
            torch_adamw(  # updates the lists' tensors, and adds 1 to the steps
                plain, [p.grad for p in plain], of("exp_avg"), of("exp_avg_sq"), [], of("step"),
                lr=lr, beta1=b1, beta2=b2, eps=eps, weight_decay=wd, amsgrad=False, maximize=False,
                # on a GPU fused wants the step there; None and not False: then foreach serves
                fused=all(p.device.type == "cpu" for p in plain) or None)
        for p in params:
            if form(p) == "torch":
                continue
            state = self.state[p]
            state["step"] += 1
            p, g, m, v = (local(t) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
            if form(p) == "triton":
                adamw_op(p, g, m, v, state["step"], lr, b1, b2, eps, wd)
            else:
                for t, new in zip((p, m, v), adamw_ref(p, g, m, v, state["step"].item(), lr, (b1, b2), eps, wd)):
                    t.copy_(new)

    def load_state_dict(self, state_dict):
        """As torch.optim's, but tensors are copied, and states of another kind or size raise ValueError."""
        if any(group.get("amsgrad") or group.get("maximize") for group in state_dict["param_groups"]):
            raise ValueError(f"{type(self).__name__}: no amsgrad, no maximize")
        # without tensors: torch.optim would cast all to the parameter's dtype on its device, codes to fp32, too
        super().load_state_dict({**state_dict, "state": {}})
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip([i for group in state_dict["param_groups"] for i in group["params"]], params):
            state, layout = state_dict["state"].get(i), self.layout(p)
            if not state:
                continue
            got = {name: t.numel() for name, t in state.items() if name != "step"}
            want = {name: n for name, (n, _) in layout.items()}
            if got != want:
                raise ValueError(f"{type(self).__name__}: states of parameter {i} are {got} long, expected {want}")
            copy = {name: state[name].to(p.device, dtype, copy=True) for name, (_, dtype) in layout.items()}
            self.state[p] = {"step": torch.as_tensor(state["step"]).to("cpu", torch.float32, copy=True), **copy}


class AdamW8bit(AdamW):
    """AdamW with 8-bit states for tensors of 4096 elements and more: exp_avg and exp_avg_sq are codes (uint8, flat),
    exp_avg_scale and exp_avg_sq_scale the blocks' largest magnitudes (fp32). A state_dict resumes bit for bit."""

    def layout(self, p):
        n = local(p).numel()
        if n < SMALLEST:
            return super().layout(p)
        code, scale = (n, torch.uint8), (-(-n // BLOCK), torch.float32)
        return {"exp_avg": code, "exp_avg_scale": scale, "exp_avg_sq": code, "exp_avg_sq_scale": scale}

    def init_state(self, p):
        if local(p).numel() < SMALLEST:
            return super().init_state(p)
        return {name: torch.zeros(n, dtype=t, device=p.device) for name, (n, t) in self.layout(p).items()}  # scales 0

    def update(self, params, group):
        super().update([p for p in params if "exp_avg_scale" not in self.state[p]], group)
        for p in params:
            s = self.state[p]
            if "exp_avg_scale" in s:
                s["step"] += 1
                adamw8bit_op(local(p), local(p.grad), s["exp_avg"], s["exp_avg_scale"], s["exp_avg_sq"],
                             s["exp_avg_sq_scale"], s["step"], float(group["lr"]), *group["betas"], group["eps"],
                             group["weight_decay"])
