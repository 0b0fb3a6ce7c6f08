"""kernels/selective_scan.py: numerics, traffic, machine code (kernelcheck.py), the plain form, the op in PyTorch."""
import kernelcheck as K
import pytest
import torch

from kernels import selective_scan as S


def case(batch, T, E, N, optional=True, initial=True, dtype=torch.float64, wide=None):
    """u, dt, A, B, C, D, z, dt_bias, initial; z, B and C are columns of wider tensors, as they are in a model."""
    g, wide = torch.Generator().manual_seed(0), wide or dtype
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    args = [normal(batch, T, E), normal(batch, T, E) - 1, -torch.exp(normal(E, N)),
            normal(batch, T, 2 * N + 3)[..., 1:1 + N], normal(batch, T, 2 * N + 3)[..., 3:3 + N],
            normal(E), normal(batch, T, 2 * E)[..., E:], normal(E) - 1, normal(batch, E, N)]
    if not optional:
        args[5] = args[6] = args[7] = None
    args[8] = args[8] if initial else None
    return [None if t is None else K.cast(t.requires_grad_(), wide if i in (2, 5, 7) else dtype)
            for i, t in enumerate(args)]


@pytest.fixture
def small(monkeypatch):
    """Few states a program and few tokens between saved ones: the interpreter needs time for each."""
    monkeypatch.setattr(S, "STATES", 64, raising=False)
    monkeypatch.setattr(S, "EVERY", 8, raising=False)


# one token; a tile of 4 tokens, one less, one more; 8 from one saved state to the next; 16 channels a program
CASES = {
    "one token": case(1, 1, 3, 4),
    "less than a tile": case(1, 3, 17, 3),
    "bare": case(2, 8, 16, 4, optional=False, initial=False),
    "several saved states": case(1, 18, 5, 4),
    "from zeros": case(1, 9, 5, 2, initial=False),
}


@pytest.mark.parametrize("name", CASES)
def test_numerics(name, small):
    K.check_numerics(S.selective_scan, S.selective_scan_ref, [tuple(CASES[name])])


def traffic_case():
    args = [None if t is None else t.detach().requires_grad_()
            for t in case(1, 128, 128, 16, initial=False, dtype=torch.bfloat16, wide=torch.float32)]
    dy = torch.randn(1, 128, 128).bfloat16()
    wrt = args[:8]
    forward = lambda: S.selective_scan(*args)[0]
    backward = lambda y: torch.autograd.grad(y, wrt, dy)
    u, A = args[0], args[2]
    return forward, backward, K.nbytes(*args, u) + 4 * A.numel(), K.nbytes(dy, *args, *wrt)


def test_traffic():
    """Each address once a launch: the rows of B and C that all blocks of channels read come from the cache."""
    forward, backward, forward_floor, backward_floor = traffic_case()
    out = []
    print("forward", K.check_traffic(lambda: out.append(forward()), forward_floor, 1.2, once=True),
          "backward", K.check_traffic(lambda: backward(out[0]), backward_floor, 1.5, once=True))


def bench_cases():
    return [("selective_scan (1, 128, 128), N = 16", *traffic_case())]


def launches():
    """What a model has: bf16 beside fp32 A, D, bias, from zeros; all tensors fp32 with every pointer; many states."""
    for dtype, N, how in ((torch.bfloat16, 16, dict(initial=False)), (torch.float32, 16, {}),
                          (torch.bfloat16, 64, dict(initial=False)), (torch.bfloat16, 256, dict(initial=False))):
        K.label = f"N = {N}"
        args = case(1, 64, 256, N, dtype=dtype, wide=torch.float32, **how)
        outs = S.selective_scan(*args)[:1 if how else 2]
        torch.autograd.grad(outs, [t for t in args if t is not None], [torch.empty_like(t) for t in outs])


def test_compiles():
    K.check_compiles("test_selective_scan", "launches")


def results(f, args):
    """y, final and the gradients of all arguments, of a loss that sees both."""
    y, final = f(*args)
    loss = (y.double() * torch.sin(torch.arange(y.numel())).view_as(y)).sum() + final.double().square().sum()
    return [y, final, *torch.autograd.grad(loss, [t for t in args if t is not None])]


@pytest.mark.parametrize("compiler", [True, False])
def test_torch_form(compiler, monkeypatch):
    """The CPU's forms equal the definition, also for 16-bit tensors beside fp32, and where only one output is used."""
    if compiler and S.compiled(S.SOURCE) is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(S, "compiled", S.compiled if compiler else lambda source: None)
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for how in ({}, dict(optional=False, initial=False)):
            # 70 tokens and 20 channels: two whole lots of 32 and of 16, and a part of one
            args = case(*(2, 70, 20, 5), dtype=dtype, wide=torch.promote_types(dtype, torch.float32), **how)
            for a, b in zip(results(S.selective_scan, args), results(S.selective_scan_ref, args)):
                assert a.dtype == b.dtype and a.shape == b.shape
                assert (a - b).norm() <= tol * b.norm(), (dtype, how)
    for dtype in (torch.float64, torch.float32):
        args = case(*(1, 7, 6, 4), dtype=dtype)
        for i in (0, 1):
            a, b = ([torch.autograd.grad(f(*args)[i].square().sum(), args[1])[0]]
                    for f in (S.selective_scan, S.selective_scan_ref))
            torch.testing.assert_close(a, b)
    # one token, as in generation
    t = [None if a is None else a.detach()[:, :1] if a.ndim == 3 and a.shape[1] == 7 else a.detach() for a in args]
    for a, b in zip(S.selective_scan(*t), S.selective_scan_ref(*t)):
        torch.testing.assert_close(a, b)


def test_registration(monkeypatch, small):
    """opcheck; one graph under torch.compile; meta and fake CUDA tensors; checkpointing; results repeat; refusals."""
    monkeypatch.setattr(S, "KERNELS", "triton")
    args = list(case(*(1, 7, 6, 4), dtype=torch.float32))
    torch.library.opcheck(S.scan_op, tuple(args))
    want = results(S.selective_scan, args)
    assert all(torch.equal(a, b) for a, b in zip(results(S.selective_scan, args), want))
    compiled = torch.compile(S.selective_scan, fullgraph=True, backend="aot_eager")
    checkpointed = lambda *a: torch.utils.checkpoint.checkpoint(S.selective_scan, *a, use_reentrant=False)
    for f in (compiled, checkpointed):
        for a, b in zip(results(f, args), want):
            torch.testing.assert_close(a, b)
    meta = [t.detach().to("meta").requires_grad_() for t in args]
    assert [g.shape for g in torch.autograd.grad(S.selective_scan(*meta)[0].sum(), meta)] == [t.shape for t in meta]
    with torch._subclasses.FakeTensorMode():
        t = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, device="cuda", dtype=dtype)
        y, final = S.selective_scan(t(2, 8, 24), t(2, 8, 24), t(24, 4, dtype=torch.float32), t(2, 8, 4), t(2, 8, 4))
        assert (y.shape, y.dtype, final.shape, final.dtype) == ((2, 8, 24), torch.bfloat16, (2, 24, 4), torch.float32)
    with pytest.raises(ValueError, match="expected u, dt, z"):
        S.selective_scan(*args[:3] + [args[3][..., 1:]] + args[4:])
    with pytest.raises(ValueError, match="at most 256"):
        S.selective_scan(*case(1, 2, 1, 257, initial=False, dtype=torch.float32))


def test_nothing_optional_in_fp32():
    """No z and no initial state: neither has a gradient, and the two that say so are no one tensor."""
    args = [None if t is None else t.detach().requires_grad_()
            for t in case(1, 3, 4, 2, optional=False, initial=False, dtype=torch.float32)]
    given = [t for t in args if t is not None]
    want = torch.autograd.grad(S.selective_scan_ref(*args)[0].sum(), given)
    with K.triton_form():
        found = torch.autograd.grad(S.selective_scan(*args)[0].sum(), given)
    assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(found, want))
