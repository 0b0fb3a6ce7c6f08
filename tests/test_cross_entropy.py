"""kernels/cross_entropy.py: the kernels (kernelcheck.py), the plain form, and how both sit in PyTorch."""
import kernelcheck as K
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import cross_entropy as CE


def inputs(N, V, C, dtype=torch.float64, w_dtype=None, ignore=-1):
    """x (N, C), w (V, C), targets (N,) of which every fifth is ignored (not a lone one)."""
    torch.manual_seed(0)
    x, w, targets = torch.randn(N, C, dtype=dtype), torch.randn(V, C, dtype=w_dtype or dtype), torch.randint(0, V, (N,))
    if N > 1:
        targets[::5] = ignore
    return x.requires_grad_(), w.mul_(2 / C**0.5).requires_grad_(), targets


def logits_of(N, V, dtype=torch.float64, ignore=-1):
    x, _, targets = inputs(N, V, V, dtype, ignore=ignore)
    return x.detach().mul_(3).requires_grad_(), targets


# ---------------------------------------------------------------- the Triton form
def test_numerics_linear():
    x, w, t = inputs(24, 65, 20)
    K.check_numerics(CE.linear_cross_entropy, CE.linear_cross_entropy_ref, [
        (inputs(1, 65, 16), {}),
        (inputs(67, 257, 33), dict(z_loss=1e-2)),
        (inputs(130, 65, 48, ignore=-100), dict(ignore_index=-100, reduction="sum")),
        (inputs(20, 300, 80), dict(z_loss=0.1, reduction="sum")),
        ((x.detach().view(2, 12, 20).transpose(0, 1).requires_grad_(), w, t.view(12, 2)), {}),  # (B, T, C)
        ((x, w.detach().t().contiguous().t().requires_grad_(), t), {}),
        ((x.detach(), w, t), {}), ((x, w.detach(), t), {}),  # only one gradient
    ])


def test_numerics_in_slices(monkeypatch):
    """More of the vocabulary than one slice holds: dx is summed over three calls."""
    monkeypatch.setattr(CE, "SLICE", 1)  # the least, 2048 columns
    K.check_numerics(CE.linear_cross_entropy, CE.linear_cross_entropy_ref, [(inputs(5, 4200, 24), dict(z_loss=1e-3))],
                     dtypes=(torch.bfloat16,))


def test_numerics_logits():
    z, t = logits_of(12, 65)
    K.check_numerics(CE.cross_entropy, CE.cross_entropy_ref, [
        (logits_of(1, 65), {}),
        (logits_of(7, 257), dict(z_loss=0.1)),
        (logits_of(9, 2049, ignore=-100), dict(ignore_index=-100, reduction="sum")),
        ((z.detach().view(3, 4, 65).transpose(0, 1).requires_grad_(), t.view(4, 3)), {}),
    ])


@pytest.mark.parametrize("form, whole", [("ref", 0), ("torch", 0), ("torch", 2**18), ("triton", 0)])
def test_all_ignored_and_large_logits(form, whole, monkeypatch):
    """No row counts: 0 with zero gradients. Logits of +-1e4 and masked-out ones of -inf: no NaN, right gradients."""
    monkeypatch.setattr(CE, "KERNELS", form)
    monkeypatch.setattr(CE, "WHOLE", whole)
    x, w, t = inputs(6, 65, 16, torch.float32)
    loss = CE.linear_cross_entropy(x, w, torch.full_like(t, -1))
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (x, w)))
    z, t = logits_of(6, 65, torch.float32)
    loss = CE.cross_entropy(z, torch.full_like(t, -1))
    assert loss == 0 and (torch.autograd.grad(loss, z)[0] == 0).all()
    big = (1e4 * z.detach().sign()).requires_grad_()
    big.data[:, 3:40] = float("-inf")
    t = torch.full_like(t, 2)
    got, want = CE.cross_entropy(big, t), F.cross_entropy(big, t)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(l, big)[0] for l in (got, want)))
    far = (1e3 * x.detach()).requires_grad_()
    got, want = CE.linear_cross_entropy(far, w, t), F.cross_entropy(far @ w.T, t)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(l, far)[0] for l in (got, want)), rtol=1e-4, atol=1e-5)


def test_fp16_keeps_small_gradients(monkeypatch):
    """The mean over many rows: dlogits / N would be below fp16's least number, so the scale is applied to the sums."""
    for form in ("torch", "triton"):
        monkeypatch.setattr(CE, "KERNELS", form)
        x, w, t = inputs(300, 257, 16, torch.float16)
        dw, = torch.autograd.grad(CE.linear_cross_entropy(x, w, t), w)
        x64, w64 = x.detach().double(), w.detach().double().requires_grad_()
        want, = torch.autograd.grad(CE.linear_cross_entropy_ref(x64, w64, t), w64)
        assert (dw.double() - want).norm() < 4e-3 * want.norm()


def tiled(N, V, C, x):
    """Bytes that the product of (N, C) and (V, C) in the op's tiles loads: each tile needs its rows of both."""
    (BN, BV), _ = CE.tile(x.dtype)
    return x.element_size() * C * (N * -(-V // BV) + V * -(-N // BN))


def traffic_case(N, V, C):
    x, w, t = (a.detach().bfloat16().requires_grad_() if a.is_floating_point() else a for a in inputs(N, V, C))
    return x, w, t, lambda: CE.linear_cross_entropy(x, w, t), lambda out: torch.autograd.grad(out, (x, w))


def test_traffic_linear():
    """As issued, against what tiles must load (the file's docstring); and each address once per launch, against what
    must be in device memory: inputs, outputs, an lse per row and tile, dlogits written and read twice."""
    N, V, C = 256, 1024, 256
    x, w, t, forward, backward = traffic_case(N, V, C)
    part, dz, picked = 2 * 4 * N * V // 128, 2 * N * V, V // 128 * K.nbytes(t)
    out = []
    issued = (tiled(N, V, C, x) + part + picked,
              tiled(N, V, C, x) + dz + picked + tiled(N, C, V, x) + tiled(V, C, N, x) + K.nbytes(x, w))
    print(K.check_traffic(lambda: out.append(forward()), issued[0], 1.1),
          K.check_traffic(lambda: backward(out[0]), issued[1], 1.1),
          K.check_traffic(lambda: out.append(forward()), K.nbytes(x, w, t) + part, 1.1, once=True),
          K.check_traffic(lambda: backward(out[1]), K.nbytes(x, w, t) + K.nbytes(x, w, x, w) + 3 * dz, 1.1, once=True))


def test_flops_linear():
    """2 NVC forward, 6 NVC backward, all of them in kernels of ours."""
    N, V, C = 128, 256, 128
    x, w, t, forward, backward = traffic_case(N, V, C)
    with K.count() as f:
        out = forward()
    with K.count() as b:
        backward(out)
    assert f.flops == {"bf16": 2 * N * V * C} and b.flops == {"bf16": 6 * N * V * C}


def test_traffic_logits():
    z, t = logits_of(64, 8192, torch.float32)
    z = z.detach().bfloat16().requires_grad_()
    out = []
    print(K.check_traffic(lambda: out.append(CE.cross_entropy(z, t)), K.nbytes(z, t), 1.02),
          K.check_traffic(lambda: torch.autograd.grad(out[0], z), K.nbytes(z, z, t), 1.02))


def bench_cases():
    N, V, C = 512, 2048, 256
    x, w, t, forward, backward = traffic_case(N, V, C)
    z = torch.randn(64, 8192).bfloat16().requires_grad_()
    tz = torch.randint(0, 8192, (64,))
    return [(f"linear_cross_entropy ({N}, {V}, {C})", forward, backward, K.nbytes(x, w, t), K.nbytes(x, w, t, x, w)),
            ("cross_entropy (64, 8192)", lambda: CE.cross_entropy(z, tz), lambda out: torch.autograd.grad(out, z),
             K.nbytes(z, tz), K.nbytes(z, z, tz))]


def launches():
    """GPT-2's head in slices (first, middle and last call of each product), and shapes that nothing divides."""
    for N, V, C, dtype in ((16384, 50304, 768, torch.bfloat16), (100, 257, 65, torch.float16),
                           (100, 257, 65, torch.float32)):
        x, w = torch.empty(N, C, dtype=dtype, requires_grad=True), torch.empty(V, C, dtype=dtype, requires_grad=True)
        t = torch.empty(N, dtype=torch.int64)
        torch.autograd.grad(CE.linear_cross_entropy(x, w, t), (x, w))
    z = torch.empty(8, 50257, dtype=torch.bfloat16, requires_grad=True)
    torch.autograd.grad(CE.cross_entropy(z, t[:8]), z)


def test_compiles():
    K.check_compiles("test_cross_entropy", "launches")


# ---------------------------------------------------------------- the plain form
@pytest.mark.parametrize("reduction, z_loss", [("mean", 0.0), ("sum", 0.0), ("mean", 0.05)])
@pytest.mark.parametrize("rows", [0, 1, 4, 100])
@pytest.mark.parametrize("slow", [True, False])
def test_torch_form(slow, rows, reduction, z_loss, monkeypatch):
    """Any chunk size (0: all logits at once), any incoming gradient; w fp32 beside bf16 x; no gradient asked for."""
    monkeypatch.setattr(CE, "MKL_IS_SLOW", slow)  # oneDNN's products, or MKL's
    monkeypatch.setattr(CE, "CHUNK", 65 * rows)
    monkeypatch.setattr(CE, "WHOLE", 0 if rows else CE.WHOLE)
    op = lambda *args: CE.linear_cross_entropy(*args, ignore_index=-100, z_loss=z_loss, reduction=reduction)
    ref = lambda *args: CE.linear_cross_entropy_ref(*args, ignore_index=-100, z_loss=z_loss, reduction=reduction)
    for dtype, w_dtype, tol in ((torch.float64, torch.float64, 1e-12), (torch.float32, torch.float32, 1e-5),
                                (torch.bfloat16, torch.float32, 2e-2), (torch.bfloat16, torch.bfloat16, 2e-2)):
        x, w, t = inputs(11, 65, 24, dtype, w_dtype, ignore=-100)
        got, want = op(x, w, t), ref(x, w, t)
        for scale in (1, 0.125):
            grads = (torch.autograd.grad(scale * l, (x, w), retain_graph=True) for l in (got, want))
            for a, b in zip((got, *next(grads)), (want, *next(grads))):
                assert a.dtype == b.dtype and (a - b).norm() <= tol * b.norm()
        with torch.no_grad():
            assert torch.equal(op(x, w, t), op(x, w, t)) and (op(x, w, t) - want).abs() <= tol * want
        dx, = torch.autograd.grad(op(x, w.detach(), t), x)
        torch.testing.assert_close(dx, torch.autograd.grad(op(x, w, t), x)[0])


def test_torch_form_compiles(monkeypatch):
    """Several chunks, the last one shorter, forward and backward, without a graph break."""
    monkeypatch.setattr(CE, "CHUNK", 65 * 4)
    monkeypatch.setattr(CE, "WHOLE", 0)
    x, w, t = inputs(11, 65, 24, torch.float32)
    op = lambda x, w: 0.5 * CE.linear_cross_entropy(x, w, t, z_loss=0.1)
    results = []
    for f in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
        loss = f(x, w)
        results.append((loss, *torch.autograd.grad(loss, (x, w))))
    torch.testing.assert_close(*results)


def test_torch_form_gradcheck(monkeypatch):
    monkeypatch.setattr(CE, "WHOLE", 0)
    x, w, t = inputs(5, 7, 4)
    assert torch.autograd.gradcheck(lambda x, w: CE.linear_cross_entropy(x, w, t, z_loss=0.1), (x, w))
    assert torch.autograd.gradcheck(lambda z: CE.cross_entropy(z, t, z_loss=0.1), logits_of(5, 7)[:1])


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops += 1
        self.numel = max([self.numel] + [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        return out


def test_logits_are_never_whole(monkeypatch):
    """The largest tensor that the plain form makes is a chunk."""
    N, V, C = 64, 515, 8
    x, w, t = inputs(N, V, C, torch.float32)
    monkeypatch.setattr(CE, "WHOLE", 0)
    for gradient in (False, True):
        monkeypatch.setattr(CE, "CHUNK", 16 * V)
        with Largest() as seen, torch.set_grad_enabled(gradient):
            loss = CE.linear_cross_entropy(x, w, t)
            if gradient:
                loss.backward()
        assert seen.numel == 16 * V < N * V
    monkeypatch.setattr(CE, "CHUNK", V - 1)  # less than a row: one row at a time
    with Largest() as seen:
        CE.linear_cross_entropy(x.detach(), w.detach(), t)
    assert seen.numel == V * C  # w


def test_gradients_survive_each_other(monkeypatch):
    """A gradient written over in place, as optimizers do, and a second backward of the same graph."""
    monkeypatch.setattr(CE, "WHOLE", 0)
    x, w, t = inputs(9, 65, 8, torch.float32)
    loss = CE.linear_cross_entropy(2 * x, w, t)
    loss.backward(retain_graph=True)
    first = [x.grad.clone(), w.grad.clone()]
    for p in (x, w):
        p.grad.zero_()
    loss.backward()
    assert torch.equal(x.grad, first[0]) and torch.equal(w.grad, first[1])


# ---------------------------------------------------------------- both
def test_registration(monkeypatch):
    """opcheck; one graph under torch.compile; fake tensors of a GPU; activation checkpointing; results that repeat."""
    monkeypatch.setattr(CE, "KERNELS", "triton")
    x, w, t = inputs(70, 65, 24, torch.float32)
    torch.library.opcheck(CE.linear_cross_entropy_op, (x, w, t, -1, 0.1, True))
    torch.library.opcheck(CE.cross_entropy_op, (*logits_of(9, 65, torch.float32), -1, 0.1, False))

    def step(x, w):
        return CE.linear_cross_entropy(x, w, t) + CE.cross_entropy(x @ w.T, t)

    want = torch.autograd.grad(step(x, w), (x, w))
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager"),
              lambda x, w: torch.utils.checkpoint.checkpoint(step, x, w, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(f(x, w), (x, w)), want))
    with torch._subclasses.FakeTensorMode():
        loss = CE.linear_cross_entropy(torch.empty(2, 8, 24, device="cuda"), torch.empty(65, 24, device="cuda"),
                                       torch.zeros(2, 8, device="cuda", dtype=torch.int64))
        assert loss.shape == () and loss.dtype == torch.float32 and loss.is_cuda


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_autocast(form, monkeypatch):
    """x and w in fp32 under autocast: products in bf16 as F.linear would, the loss and both gradients in fp32."""
    monkeypatch.setattr(CE, "KERNELS", form)
    x, w, t = inputs(20, 65, 24, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = CE.linear_cross_entropy(x, w, t)
        want = F.cross_entropy(F.linear(x, w), t, ignore_index=-1)
    for a, b in zip((got, *torch.autograd.grad(got, (x, w))), (want, *torch.autograd.grad(want, (x, w)))):
        assert a.dtype == b.dtype == torch.float32 and (a - b).norm() < 1e-2 * b.norm()
    exact = CE.linear_cross_entropy(x, w, t)
    assert got != exact


def test_bad_arguments(monkeypatch):
    x, w, t = inputs(4, 65, 8, torch.float32)
    with pytest.raises(ValueError, match="reduction 'none'"):
        CE.linear_cross_entropy(x, w, t, reduction="none")
    with pytest.raises(ValueError, match=r"targets \(3,\): \(4,\) expected"):
        CE.cross_entropy(x @ w.T, t[:3])
    with pytest.raises(ValueError, match=r"w \(65, 7\): \(V, 8\) expected"):
        CE.linear_cross_entropy(x, w[:, :7], t)
    whole = CE.WHOLE
    for bad in (65, -2):
        t[1] = bad
        monkeypatch.setattr(CE, "KERNELS", "torch")
        for most in (0, whole):
            monkeypatch.setattr(CE, "WHOLE", most)
            with pytest.raises((RuntimeError, IndexError), match=f"{bad} is out of bounds"):
                CE.linear_cross_entropy(x, w, t)
        with pytest.raises((RuntimeError, IndexError), match=f"{bad} is out of bounds"):
            CE.cross_entropy(x @ w.T, t)
        monkeypatch.setattr(CE, "KERNELS", "triton")
        assert CE.linear_cross_entropy(x, w, t).isnan() and CE.cross_entropy(x @ w.T, t).isnan()
