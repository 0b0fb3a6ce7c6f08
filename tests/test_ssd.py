"""kernels/ssd.py: numerics, traffic, machine code (kernelcheck.py), the plain form, the op in PyTorch."""
import kernelcheck as K
import pytest
import torch

from kernels import ssd as S


def case(batch, T, H, P, G, N, skip=True, initial=True, dtype=torch.float64, wide=None):
    """x, dt, A, B, C, D, initial; x, B, C are columns of one wider tensor, as in a model. wide: dtype of dt, A, D."""
    g, wide = torch.Generator().manual_seed(0), wide or dtype
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    columns = lambda first, n, size: (
        normal(batch, T, first + n * size + 2)[..., first:first + n * size].unflatten(2, (n, size)))
    args = [columns(1, H, P), torch.nn.functional.softplus(normal(batch, T, H) - 1), -torch.exp(normal(H)),
            columns(2, G, N), columns(0, G, N), normal(H) if skip else None,
            normal(batch, H, P, N) if initial else None]
    return tuple(None if t is None else K.cast(t.requires_grad_(), wide if i in (1, 2, 5) else dtype)
                 for i, t in enumerate(args))


# a 16-bit type rounds matrices and states before each product; all that was seen is at most a third of this
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# one token; a chunk of 32 (fp32: 16) tokens, one less, one more; widths that fill no tile; groups
CASES = {
    "one token": case(1, 1, 1, 4, 1, 3),
    "less than a chunk": case(2, 15, 2, 20, 1, 33),
    "bare": case(1, 32, 2, 16, 2, 16, skip=False, initial=False),
    "several chunks": case(1, 40, 4, 8, 2, 12),
    "from zeros": case(2, 33, 1, 24, 1, 40, initial=False),
}


@pytest.mark.parametrize("name", CASES)
def test_numerics(name):
    K.check_numerics(S.ssd, S.ssd_ref, [CASES[name]], tol=TOLERANCE)


def traffic_case():
    args = [None if t is None else t.detach().requires_grad_()
            for t in case(1, 128, 4, 64, 1, 128, initial=False, dtype=torch.bfloat16, wide=torch.float32)]
    dy = torch.randn(args[0].shape).bfloat16()
    wrt = args[:6]
    forward = lambda: S.ssd(*args)[0]
    backward = lambda y: torch.autograd.grad(y, wrt, dy)
    return forward, backward, K.nbytes(*args, args[0]) + 4 * 4 * 64 * 128, K.nbytes(dy, *args, *wrt)


def test_traffic():
    """Each address once a launch: a group's heads read one B, C. Backward: each head's dB, dC are written and read."""
    forward, backward, forward_floor, backward_floor = traffic_case()
    out = []
    print("forward", K.check_traffic(lambda: out.append(forward()), forward_floor, 1.01, once=True),
          "backward", K.check_traffic(lambda: backward(out[0]), backward_floor, 5, once=True))


def bench_cases():
    return [("ssd (1, 128, 4, 64), N = 128", *traffic_case())]


def launches():
    """What a model has: bf16 beside fp32 dt, A, D, P = 64, N = 128, from zeros; fp32, every pointer; fewer states."""
    for dtype, P, N, how in ((torch.bfloat16, 64, 128, dict(initial=False)), (torch.float32, 64, 128, {}),
                             (torch.bfloat16, 64, 64, {})):
        args = case(1, 64, 2, P, 1, N, dtype=dtype, wide=torch.float32, **how)
        y, final = S.ssd(*args)
        wrt, outs = [t for t in args if t is not None], [y, final] if how == {} else [y]
        torch.autograd.grad(outs, wrt, [torch.empty_like(t) for t in outs])


def test_compiles():
    for r in K.check_compiles("test_ssd", "launches"):
        print(r["kernel"], r["arch"], r["regs"], r["spills"], r["smem"], r.get("occupancy"))


def results(f, args):
    """y, final and the gradients of all arguments, of a loss that sees both."""
    y, final = f(*args)
    loss = (y.double() * torch.sin(torch.arange(y.numel())).view_as(y)).sum() + final.double().square().sum()
    return [y, final, *torch.autograd.grad(loss, [t for t in args if t is not None])]


@pytest.fixture(params=["C", "PyTorch"])
def plain(request, monkeypatch):
    """The CPU's two forms; C is for fp32 and bf16."""
    if request.param == "PyTorch":
        monkeypatch.setattr(S, "library", lambda N, P: None)
    elif S.library(4, 4) is None:
        pytest.skip("no C compiler here")


# three groups of heads on two threads; one group, which two threads share; chunks of 64 tokens, one of them in part
@pytest.mark.parametrize("sizes", [(1, 1, 1, 4, 1, 3), (2, 70, 4, 5, 2, 6), (1, 130, 6, 32, 3, 64),
                                   (1, 64, 5, 24, 1, 40), (3, 200, 2, 64, 1, 128)])
def test_torch_form(sizes, plain):
    """The CPU's forms equal the definition, also for 16-bit tensors beside fp32, and where only one output is used."""
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for how in ({}, dict(skip=False, initial=False)):
            args = case(*sizes, dtype=dtype, wide=torch.promote_types(dtype, torch.float32), **how)
            exact = [None if t is None else t.detach().double().requires_grad_() for t in args]
            for a, b, t in zip(results(S.ssd, args), results(S.ssd_ref, exact),
                               (args[0], args[1], *(t for t in args if t is not None))):
                assert a.dtype == t.dtype and a.shape == b.shape
                assert (a - b).norm() <= tol * b.norm().clamp(min=1e-2), (dtype, how)  # one token from zeros: dA is 0


def test_unused_outputs(plain):
    for dtype in (torch.float64, torch.float32):
        args = case(*(1, 7, 2, 4, 1, 3), dtype=dtype)
        for i in (0, 1):
            a, b = ([torch.autograd.grad(f(*args)[i].square().sum(), args[1])[0]] for f in (S.ssd, S.ssd_ref))
            torch.testing.assert_close(a, b)


def test_registration(monkeypatch):
    """opcheck; one graph under torch.compile; meta and fake CUDA tensors; checkpointing; results repeat; refusals."""
    monkeypatch.setattr(S, "KERNELS", "triton")
    args = list(case(*(1, 7, 2, 4, 1, 3), dtype=torch.float32))
    torch.library.opcheck(S.ssd_op, tuple(args))
    want = results(S.ssd, args)
    assert all(torch.equal(a, b) for a, b in zip(results(S.ssd, args), want))
    compiled = torch.compile(S.ssd, fullgraph=True, backend="aot_eager")
    checkpointed = lambda *a: torch.utils.checkpoint.checkpoint(S.ssd, *a, use_reentrant=False)
    for f in (compiled, checkpointed):
        for a, b in zip(results(f, args), want):
            torch.testing.assert_close(a, b)
    meta = [t.detach().to("meta").requires_grad_() for t in args]
    assert [g.shape for g in torch.autograd.grad(S.ssd(*meta)[0].sum(), meta)] == [t.shape for t in meta]
    with torch._subclasses.FakeTensorMode():
        t = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, device="cuda", dtype=dtype)
        y, final = S.ssd(t(2, 8, 4, 16), t(2, 8, 4, dtype=torch.float32), t(4, dtype=torch.float32),
                         t(2, 8, 1, 12), t(2, 8, 1, 12))
        assert ((y.shape, y.dtype, final.shape, final.dtype)
                == ((2, 8, 4, 16), torch.bfloat16, (2, 4, 16, 12), torch.float32))
    with pytest.raises(ValueError, match="expected x"):
        S.ssd(*args[:3] + [args[3][..., 1:]] + args[4:])
    with pytest.raises(ValueError, match="N <= 256"):
        S.ssd(*case(1, 2, 1, 4, 1, 257, initial=False, dtype=torch.float32))
