"""kernels/wkv7.py: numerics, traffic, machine code (kernelcheck.py), the plain form, the op in PyTorch."""
import math

import kernelcheck as K
import pytest
import torch
import torch.nn.functional as F

from kernels import wkv7 as W

FASTEST = -math.exp(-0.5)  # RWKV-7's smallest decay is exp of it
NAMES = "y final dr dw dk dv da db dinitial".split()


def case(B, T, H, N, initial=True, w=None, dtype=torch.float64, same_key=False):
    """As the model makes them: kappa of length 1, decays over their whole range. w: one log decay for all."""
    torch.manual_seed(0)
    r, k, v, kappa, x = torch.randn(5, B, T, H, N, dtype=dtype)
    kappa = F.normalize(kappa[:, :1].expand_as(kappa) if same_key else kappa, dim=-1)
    rate = torch.ones_like(r) if same_key else torch.rand(B, T, H, N, dtype=dtype)
    x = FASTEST * torch.sigmoid(3 * x) if w is None else torch.full_like(r, w)
    S = [torch.randn(B, H, N, N, dtype=dtype)] if initial else []
    return tuple(t.detach().requires_grad_() for t in (r, x, k, v, -kappa, kappa * rate, *S))


# one token; no whole number of chunks of either form (16, 32); sizes that no tile divides; the ends of the decays'
# range; one key again and again, written at full rate and never forgotten: there a sum of powers in place of the
# inverse would cancel
CASES = {
    "one token": case(1, 1, 1, 16),
    "no initial state": case(2, 19, 2, 12, initial=False),
    "two heads": case(1, 33, 2, 40),
    "smallest decays": case(1, 35, 1, 16, w=FASTEST),
    "decays near 1": case(1, 35, 1, 16, w=-1e-7),
    "one key": case(1, 35, 1, 16, w=-1e-7, same_key=True),
}


@pytest.mark.parametrize("name", CASES)
def test_numerics(name):
    K.check_numerics(W.wkv7, W.wkv7_ref, [CASES[name]])


@pytest.fixture(params=["C", "PyTorch"])
def plain(request, monkeypatch):
    """The CPU's two forms; fp64 is PyTorch's in both."""
    if request.param == "PyTorch":
        monkeypatch.setattr(W, "library", lambda N: None)
    elif W.library(16) is None:
        pytest.skip("no C compiler here")


def test_one_token(plain):
    """A step of generation against the definition."""
    for name in ("one token", "two heads"):
        case = [x.detach()[:, :1] if x.ndim == 4 and x.shape[2] != x.shape[3] else x.detach()
                for x in CASES[name][:6]] + [CASES[name][6].detach()]
        for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            given = [x.to(dtype) for x in case]
            want, before = W.wkv7_ref(*given), given[6].clone()
            with torch.no_grad():
                found = W.wkv7_torch(*given)
            assert torch.equal(given[6], before)  # the caller's state is left as it was
            for a, b in zip(found, want, strict=True):
                assert a.dtype == b.dtype and torch.allclose(a, b, rtol=tol, atol=tol)


def launches():
    """The head size of every released model, in bf16 and fp32, and one that needs masks."""
    for N, name in ((64, "bfloat16"), (64, "float32"), (40, "bfloat16")):
        K.label = f"{name}, N = {N}"
        args = [torch.empty(1, 64, 2, N, dtype=getattr(torch, name), requires_grad=True) for _ in range(6)]
        S = torch.empty(1, 2, N, N, requires_grad=True)
        y, final = W.wkv7(*args, S)
        torch.autograd.grad([y, final], [*args, S], [torch.empty_like(y), torch.empty_like(final)])


# spill instructions on sm_89 that are there; more is a fault, less is welcome
OPEN = {("wkv7_fwd_kernel", "float32, N = 64"): 250, ("wkv7_bwd_kernel", "float32, N = 64"): 260,
        ("wkv7_bwd_kernel", "bfloat16, N = 40"): 6}


def test_compiles():
    """check_compiles, but for those in OPEN."""
    rows = K.compiled("test_wkv7", "launches", targets=(89, 90, "gfx942"))
    assert len({(r["kernel"], r["arch"]) for r in rows}) == 6
    for r in rows:
        print({k: r.get(k) for k in ("kernel", "label", "arch", "regs", "smem", "spills", "tensor")})
        fewer = max(0, r.get("spills", 0) - OPEN.get((r["kernel"], r["label"]), 0))
        assert not K.faults_of(dict(r, spills=fewer)), (r["kernel"], r["label"], r["arch"], K.faults_of(r))
        assert r["tensor"] or "float32" in r["label"]


def traffic_case(B=1, T=64, H=1, N=64):
    args = [t.detach().bfloat16().requires_grad_() for t in case(B, T, H, N, initial=False)]
    dy = torch.randn(B, T, H, N).bfloat16()
    forward = lambda: W.wkv7(*args)
    backward = lambda out: torch.autograd.grad(out[0], args, dy)
    state = 4 * B * H * N * N  # final
    return forward, backward, K.nbytes(*args, dy) + state, K.nbytes(*args, dy, *args)


def test_traffic():
    """The saved states, 512 bytes a token and head, are all that comes on top of inputs and outputs."""
    forward, backward, floor, floor_bwd = traffic_case()
    out = []
    print(K.check_traffic(lambda: out.append(forward()), floor, 1.55),
          K.check_traffic(lambda: backward(out[0]), floor_bwd, 1.35))


def bench_cases():
    return [("wkv7 (1, 64, 1, 64)", *traffic_case())]


def results(f, args):
    y, final = f(*args)
    up = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(t.dtype)
          for t in (y, final)]
    return [y, final, *torch.autograd.grad([y, final], args, up)]


PLAIN = {k: v for k, v in CASES.items()} | {"several groups": case(1, 2100, 1, 8), "many heads": case(5, 70, 16, 8)}


@pytest.mark.parametrize("name", PLAIN)
def test_torch_form(name, plain):
    """The CPU's forms, their backward written by hand: fp64 against the definition, fp32 against that."""
    args = PLAIN[name]
    want = results(W.wkv7_ref, args)
    for dtype, tol in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        got = results(W.wkv7_torch, [t.detach().to(dtype).requires_grad_() for t in args])
        for label, a, b in zip(NAMES, got, want):
            assert (a - b).norm() <= tol * (b.norm() + 1e-6), (label, dtype)


def test_torch_form_in_pytorch(plain):
    """Views as inputs; an output nobody uses; 16-bit inputs and autocast, which changes nothing; results repeat."""
    args = case(2, 37, 2, 16)
    views = [torch.stack([t, t], -1)[..., 0].detach().requires_grad_() if t.ndim == 4 else t
             for t in args[:6]] + [args[6]]
    for a, b in zip(results(W.wkv7_torch, views), results(W.wkv7_torch, args)):
        assert torch.equal(a, b)
    for which in (0, 1):
        got = torch.autograd.grad(W.wkv7_torch(*args)[which].sum(), args)
        want = torch.autograd.grad(W.wkv7_ref(*args)[which].sum(), args, allow_unused=True)
        for a, b in zip(got, want):
            assert (a - (0 if b is None else b)).abs().max() < 1e-10
    low = [t.detach().bfloat16().requires_grad_() for t in args]
    with torch.autocast("cpu", torch.bfloat16):
        y, final = W.wkv7(*low)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    wide = [t.detach().double().requires_grad_() for t in low]
    exact = W.wkv7_ref(*wide)
    assert (y - exact[0]).norm() < 4e-3 * exact[0].norm() and (final - exact[1]).norm() < 1e-5 * exact[1].norm()
    dy = torch.randn_like(y)
    found, want = torch.autograd.grad(y, low, dy), torch.autograd.grad(exact[0], wide, dy.double())
    for name, a, b in zip("rwkvab", found, want):
        assert a.dtype == torch.bfloat16 and (a - b).norm() < 4e-3 * b.norm(), name


def test_registration(monkeypatch):
    """opcheck; one graph under torch.compile; meta and fake CUDA tensors; activation checkpointing."""
    monkeypatch.setattr(W, "KERNELS", "triton")
    args = [t.detach().float().requires_grad_() for t in case(1, 18, 1, 16)]
    torch.library.opcheck(W.wkv7_op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    step = lambda *a: sum(t.square().sum() for t in W.wkv7(*a))
    want = torch.autograd.grad(step(*args), args)
    checkpointed = lambda *a: torch.utils.checkpoint.checkpoint(step, *a, use_reentrant=False)
    for f in (torch.compile(step, fullgraph=True, backend="aot_eager"), checkpointed):
        for got, expected in zip(torch.autograd.grad(f(*args), args), want):
            assert torch.equal(got, expected)  # no atomics: results repeat to the bit
    meta = [t.detach().to("meta").requires_grad_() for t in args]
    assert [g.shape for g in torch.autograd.grad(step(*meta), meta)] == [t.shape for t in meta]
    with torch._subclasses.FakeTensorMode():  # forward only: PyTorch without CUDA has no autograd for its tensors
        fake = torch.empty(2, 40, 3, 64, device="cuda", dtype=torch.bfloat16)
        y, final = W.wkv7(*[fake] * 6)
        assert (y.shape == fake.shape and y.dtype == torch.bfloat16
                and final.shape == (2, 3, 64, 64) and final.dtype == torch.float32)


def test_refuses():
    x = torch.empty(1, 4, 2, 8)
    for args in ((x, x, x, x, x, x[..., :4]), (x, x.double(), x, x, x, x), [x[:, :0]] * 6,
                 ([*[x] * 6, torch.empty(1, 2, 8, 4)])):
        with pytest.raises(ValueError, match="expected six of"):
            W.wkv7(*args)
    with pytest.raises(ValueError, match="N <= 64"):
        W.wkv7_triton(*[torch.empty(1, 4, 1, 65)] * 6)
