"""kernels/retention.py: numerics, traffic, machine code (kernelcheck.py), the plain form, the op in PyTorch."""
import kernelcheck as K
import pytest
import torch

from kernels import retention as R


def case(B, T, H, Kd, V, initial=True, dtype=torch.float64, first=1):
    """q, k: views of one projection (B, T, 2, H, K). Heads' decays from 1 - 2^-first on: strong, so errors show."""
    torch.manual_seed(0)
    q, k = torch.randn(B, T, 2, H, Kd, dtype=dtype).unbind(2)
    v, S = torch.randn(B, T, H, V, dtype=dtype), torch.randn(B, H, Kd, V, dtype=dtype)
    q, k, v, S = (x.detach().requires_grad_() for x in (q, k, v, S))
    a = torch.log(1 - 2.0 ** (-first - torch.arange(H, dtype=dtype)))
    return (q, k, v, a, S) if initial else (q, k, v, a)


# one token; part of a chunk (16 or 32 tokens), one more than a chunk, several; sizes no tile divides; 512 rows of state
CASES = {
    "one token": case(1, 1, 1, 16, 16),
    "no initial state": case(1, 31, 2, 12, 20, initial=False),
    "one past a chunk": case(2, 33, 1, 24, 40),
    "several chunks": case(1, 40, 2, 130, 33),
    "wide values": case(1, 17, 1, 16, 270),
    "forgets at once": (*case(1, 40, 1, 8, 8)[:3], torch.tensor([-60.0]).double()),
}


@pytest.mark.parametrize("name", CASES)
def test_numerics(name):
    K.check_numerics(R.retention, R.retention_ref, [CASES[name]])


def rows(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    return tuple(torch.randn(*shape, dtype=dtype).requires_grad_() for _ in "oz")


def test_gated_norm_numerics():
    o, z = rows(5, 33, 3)
    K.check_numerics(R.gated_norm, R.gated_norm_ref, [rows(1, 3), rows(3, 2, 54), rows(5, 432), (o.mT, z.mT)])


# ---------------------------------------------------------------- traffic
def traffic_case(B=1, T=64, H=1, Kd=64, V=108):
    """Floors: q, k, v in, o and the last state out; do, q, k, v in, dq, dk, dv out."""
    q, k, v, a = (x.bfloat16().detach().requires_grad_() for x in case(B, T, H, Kd, V, initial=False, first=5))
    a, do = a.detach().float(), torch.randn(B, T, H, V).bfloat16()
    forward = lambda: R.retention(q, k, v, a)
    backward = lambda out: torch.autograd.grad(out[0], (q, k, v), do)
    return forward, backward, K.nbytes(q, k, v, v, a) + 4 * B * H * Kd * V, K.nbytes(do, q, k, v, q, k, v, a)


def norm_case(rows_=1024, V=108):
    o, z = (x.detach().bfloat16().requires_grad_() for x in rows(rows_, V))
    dy = torch.ones_like(o).detach()
    return (lambda: R.gated_norm(o, z), lambda y: torch.autograd.grad(y, (o, z), dy),
            K.nbytes(o, z, o), K.nbytes(dy, o, z, o, z))


def test_traffic():
    """Each input once a launch; no state and no product is written. Backward is three launches, so it reads q, k, v and
    do three times against the floor's once. As issued the programs of one head read x and y again, from the cache."""
    forward, backward, forward_floor, backward_floor = traffic_case()
    out = []
    K.check_traffic(lambda: out.append(forward()), forward_floor, 1.01, once=True)
    K.check_traffic(lambda: backward(out[0]), backward_floor, 2.2, once=True)


def test_traffic_of_the_norm():
    forward, backward, forward_floor, backward_floor = norm_case(256)
    out = []
    K.check_traffic(lambda: out.append(forward()), forward_floor, 1.0)
    K.check_traffic(lambda: backward(out[0]), backward_floor, 1.0)


def bench_cases():
    return [("retention (1, 64, 1), K 64, V 108", *traffic_case()),
            ("retention (1, 64, 1), K 256, V 432", *traffic_case(Kd=256, V=432)),
            ("gated_norm (1024, 108)", *norm_case())]


# ---------------------------------------------------------------- machine code
def launches():
    """One forward and its backward at each size, with the official sizes' strides: views of projections (B, T, H K)."""
    for Kd, V, dtype in ((256, 432, torch.bfloat16), (256, 428, torch.float32), (32, 54, torch.bfloat16),
                         (512, 512, torch.bfloat16)):
        q, k = (torch.empty(1, 64, 2 * Kd, dtype=dtype).unflatten(-1, (2, Kd)).requires_grad_() for _ in "qk")
        v, z = (torch.empty(1, 64, 2 * V, dtype=dtype).unflatten(-1, (2, V)).requires_grad_() for _ in "vz")
        S = torch.empty(1, 2, Kd, V, requires_grad=True)
        o, final = R.retention(q, k, v, torch.empty(2), S)
        y = R.gated_norm(o, z)
        torch.autograd.grad([y, final], [q, k, v, z, S], [torch.empty_like(y), torch.empty_like(final)])


def test_compiles():
    """Heads of the official sizes (V 428 is not divisible by 8), of the preset cpu, and the largest."""
    rows = K.check_compiles("test_retention", "launches")
    assert {r["kernel"] for r in rows} == {"retention_kernel", "gated_norm_fwd_kernel", "gated_norm_bwd_kernel"}


# ---------------------------------------------------------------- the plain form, and PyTorch
def both(f, args, weights):
    """Outputs of f and the gradients of what needs one."""
    out = f(*args)
    out = out if isinstance(out, tuple) else (out,)
    wrt = [x for x in args if torch.is_tensor(x) and x.requires_grad]
    return [*out, *torch.autograd.grad(sum((o.double() * w).sum() for o, w in zip(out, weights)), wrt)]


@pytest.fixture(params=["C", "PyTorch"])
def plain(request, monkeypatch):
    """The CPU's two forms; C is for fp32 and bf16."""
    if request.param == "PyTorch":
        monkeypatch.setattr(R, "library", lambda M: None)
        monkeypatch.setattr(R, "compiled", lambda source: None)
    elif R.library(4) is None:
        pytest.skip("no C compiler here")


# V: each width of the C form, and two lots of columns
@pytest.mark.parametrize("T, V", [(1, 12), (31, 12), (32, 20), (33, 40), (70, 70)])
@pytest.mark.parametrize("initial", [True, False])
def test_torch_form(T, V, initial, plain, monkeypatch):
    """The CPU's forms equal the definition: one token, less than a chunk, one, more; bf16 too, and a view's strides."""
    monkeypatch.setattr(R, "CHUNK", 32)
    args = case(2, T, 3, 8, V, initial)
    weights = [torch.randn(2, T, 3, V).double(), torch.randn(2, 3, 8, V).double()]
    want = both(R.retention_ref, args, weights)
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        low = [K.cast(x, dtype) if x.ndim > 1 else x for x in args]
        for a, b in zip(both(R.retention, low, weights), want):
            assert ((a.double() - b).norm() / b.norm()).item() < tol, dtype


@pytest.mark.parametrize("turned", [False, True])
def test_gated_norm_on_a_cpu(turned, plain):
    o, z = rows(3, 70, 54)
    weights = [torch.randn(3, 54, 70).mT.double() if turned else torch.randn(3, 70, 54).double()]
    want = both(R.gated_norm_ref, (o, z), weights)
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        o2, z2 = (K.cast(x, dtype) for x in (o, z))
        if turned:  # other strides
            o2, z2 = (x.detach().mT.contiguous().mT.requires_grad_() for x in (o2, z2))
        for a, b in zip(both(R.gated_norm, (o2, z2), weights), want):
            assert ((a.double() - b).norm() / b.norm()).item() < tol, dtype


def test_unused_outputs(plain):
    """A loss on o alone, or on the final state alone; the caller's state is left as it was."""
    for dtype in (torch.float64, torch.float32):
        args = [K.cast(x, dtype) for x in case(1, 9, 1, 4, 6)]
        before = args[4].detach().clone()
        for i in (0, 1):
            want, got = (torch.autograd.grad(f(*args)[i].sum(), [args[0], args[1], args[2], args[4]], allow_unused=True)
                         for f in (R.retention_ref, R.retention))
            for a, b in zip(got, want):
                torch.testing.assert_close(a if a is not None else torch.zeros_like(b),
                                           b if b is not None else torch.zeros_like(a))
        assert torch.equal(args[4], before)


def test_registration(monkeypatch):
    """opcheck; one graph under torch.compile; meta tensors; activation checkpointing: all of the kernels' form."""
    monkeypatch.setattr(R, "KERNELS", "triton")
    q, k, v, a, S = (K.cast(x, torch.float32) for x in case(1, 5, 2, 4, 6))
    a, z = a.detach(), torch.randn_like(v)
    torch.library.opcheck(R.retention_op, (q, k, v, a, S))
    torch.library.opcheck(R.retention_op, (q, k, v, a, None))
    torch.library.opcheck(R.gated_norm_op, (v, z, 1e-6))

    def step(q, k, v, S):
        o, final = R.retention(q, k, v, a.to(q.device), S)
        return R.gated_norm(o, torch.ones_like(o)).sum() + final.sum()

    leaves = (q, k, v, S)
    want = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for f in (compiled, lambda *x: torch.utils.checkpoint.checkpoint(step, *x, use_reentrant=False)):
        for x, y in zip(torch.autograd.grad(f(*leaves), leaves), want):
            torch.testing.assert_close(x, y)
    meta = [x.detach().to("meta").requires_grad_() for x in leaves]
    assert [g.shape for g in torch.autograd.grad(step(*meta), meta)] == [x.shape for x in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        o, final = R.retention(q, k, v, a)
    assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)


def test_errors():
    q, k, v, a, S = case(1, 4, 2, 8, 6)
    for args in ((q, k[:, :3], v, a), (q, k, v, a[:1]), (q, k, v, a, S[:, :1]), (q[:, :0], k[:, :0], v[:, :0], a)):
        with pytest.raises(ValueError, match="retention: shapes"):
            R.retention(*args)
    with pytest.raises(ValueError, match="expected one dtype"):
        R.retention(q, k.float(), v, a)
    with pytest.raises(ValueError, match="gated_norm: shapes"):
        R.gated_norm(v, q)
