"""kernels/activation.py: the kernels (kernelcheck.py), the plain form, and how both sit in PyTorch."""
import kernelcheck as K
import pytest
import torch

from kernels import activation as A

OPS = {  # name: op, definition, its arguments: full-size (x) or one row (b)
    "gelu": (A.gelu, A.gelu_ref, "x"),
    "bias_gelu": (A.bias_gelu, A.bias_gelu_ref, "xb"),
    "swiglu": (A.swiglu, A.swiglu_ref, "xx"),
    "relu2glu": (A.relu2glu, A.relu2glu_ref, "xx"),
}
SHAPES = [(1, 1), (2, 3, 33), (1, 1025), (67, 64), (3, 2048)]


def inputs(which, shape, dtype=torch.float64):
    torch.manual_seed(0)
    return tuple(torch.randn(shape if n == "x" else shape[-1:], dtype=dtype).mul_(2).requires_grad_() for n in which)


@pytest.mark.parametrize("name", OPS)
def test_numerics(name):
    op, ref, which = OPS[name]
    cases = [inputs(which, shape) for shape in SHAPES]
    t = torch.randn(33, 6, dtype=torch.float64).t().requires_grad_()                          # (6, 33), not contiguous
    half = torch.randn(5, 40, dtype=torch.float64).chunk(2, -1)[1].detach().requires_grad_()  # (5, 20), rows 40 apart
    K.check_numerics(op, ref, cases + [(t, *inputs(which, (6, 33))[1:]), (half, *inputs(which, (5, 20))[1:])])


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("name", OPS)
def test_far_from_zero(name, form, monkeypatch):
    """Neither tail overflows: y and gradients at +-1e4 are 0 or the identity's, as the definition's."""
    monkeypatch.setattr(A, "KERNELS", form)
    op, ref, which = OPS[name]
    results = []
    for f in (op, ref):
        x = torch.tensor([-1e4, -30.0, -0.0, 0.0, 30.0, 1e4], requires_grad=True)
        rest = (torch.ones(6),) if len(which) == 2 else ()
        y = f(x, *rest)
        results.append((y, *torch.autograd.grad(y.sum(), x)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def traffic_case(name, shape):
    op, _, which = OPS[name]
    args = [t.detach().bfloat16().requires_grad_() for t in inputs(which, shape)]
    dy = torch.randn(shape, dtype=torch.bfloat16)
    backward = lambda out: torch.autograd.grad(out, args, dy)
    return lambda: op(*args), backward, K.nbytes(*args, dy), K.nbytes(*args, *args, dy)


@pytest.mark.parametrize("name", OPS)
def test_traffic(name):
    forward, backward, forward_floor, backward_floor = traffic_case(name, (512, 1024))
    out = []
    print(name, K.check_traffic(lambda: out.append(forward()), forward_floor, 1.02),
          K.check_traffic(lambda: backward(out[0]), backward_floor, 1.05))


def test_halves_are_not_copied():
    """gate and up as the two halves of one tensor: the same bytes as two tensors."""
    both = torch.randn(64, 512).bfloat16()
    gate, up = both.chunk(2, -1)
    print(K.check_traffic(lambda: A.swiglu(gate, up), K.nbytes(both, gate), 1.0))


def bench_cases():
    return [(f"{name} (1024, 3072)", *traffic_case(name, (1024, 3072))) for name in OPS]


def launches():
    for dtype, shape in ((torch.bfloat16, (64, 3072)), (torch.float32, (64, 33))):
        for op, _, which in OPS.values():
            args = [torch.empty(shape if n == "x" else shape[-1:], dtype=dtype, requires_grad=True) for n in which]
            torch.autograd.grad(op(*args), args, torch.empty(shape, dtype=dtype))
    A.bias_gelu(torch.empty(100_000, 64, dtype=torch.float16), torch.empty(64))  # more rows a program; fp32 bias


def test_compiles():
    K.check_compiles("test_activation", "launches")


@pytest.mark.parametrize("name", OPS)
def test_torch_form(name):
    """The CPU's form equals the definition, also for 16-bit x beside an fp32 bias; it compiles without graph breaks."""
    op, ref, which = OPS[name]
    for dtype, b_dtype, tol in ((torch.float64, torch.float64, 1e-12), (torch.float32, torch.float32, 1e-5),
                                (torch.bfloat16, torch.float32, 3e-2)):
        args = [t.detach().to(dtype if n == "x" else b_dtype).requires_grad_()
                for n, t in zip(which, inputs(which, (4, 40)))]
        results = []
        for f in (op, torch.compile(op, fullgraph=True, backend="aot_eager"), ref):
            out = f(*args)
            results.append([out, *torch.autograd.grad(out, args, torch.ones_like(out))])
        for got in results[:2]:
            for a, b in zip(got, results[2]):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def test_swiglu_keeps_its_inputs_only():
    saved = []
    gate, up = inputs("xx", (4, 40), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        A.swiglu(gate, up)
    assert sorted(saved) == sorted([gate.data_ptr(), up.data_ptr()])


def test_registration(monkeypatch):
    """opcheck; one graph under torch.compile; fake tensors of a GPU; activation checkpointing; results that repeat."""
    monkeypatch.setattr(A, "KERNELS", "triton")
    x, b = inputs("xb", (70, 24), torch.float32)
    up = x.detach().clone().requires_grad_()
    for op, args in ((A.gelu_op, (x,)), (A.bias_gelu_op, (x, b)),
                     (A.glu_op, (x, up, False)), (A.glu_op, (x, up, True))):
        torch.library.opcheck(op, args)
    step = lambda x, b: A.swiglu(A.gelu(x), A.bias_gelu(x, b))
    want = torch.autograd.grad(step(x, b).sum(), (x, b))
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager"),
              lambda x, b: torch.utils.checkpoint.checkpoint(step, x, b, use_reentrant=False)):
        assert all(torch.equal(p, q) for p, q in zip(torch.autograd.grad(f(x, b).sum(), (x, b)), want))
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(2, 8, 24, device="cuda", dtype=torch.bfloat16)
        y = step(fake, torch.empty(24, device="cuda"))
        assert y.shape == fake.shape and y.dtype == torch.bfloat16


def test_edges(monkeypatch):
    for form in ("ref", "torch", "triton"):
        monkeypatch.setattr(A, "KERNELS", form)
        for op, _, which in OPS.values():
            assert op(*inputs(which, (0, 8))).shape == (0, 8)
    with pytest.raises(ValueError, match=r"b \(7,\), \(8,\) expected"):
        A.bias_gelu(torch.ones(2, 8), torch.ones(7))
    with pytest.raises(ValueError, match="differ"):
        A.swiglu(torch.ones(2, 8), torch.ones(2, 8).bfloat16())


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["silu", "relu2", "gelu"])
def test_units_on_a_cpu(act, dtype, compiler, monkeypatch):
    """The loops in C, and PyTorch in their place: rows that are halves of wider ones, written into halves of others."""
    if compiler and A.compiled(A.SOURCE) is None:
        pytest.skip("no C compiler here")
    called, real = [], A.call
    monkeypatch.setattr(A, "call", lambda *args: called.append(1) or real(*args))
    monkeypatch.setattr(A, "compiled", A.compiled if compiler else lambda source: None)
    torch.manual_seed(0)
    both, dh, dboth = torch.randn(70, 150).to(dtype), torch.randn(70, 75).to(dtype), torch.full((70, 150), torch.nan)
    gate, up, dboth = both[:, :75], both[:, 75:], dboth.to(dtype)
    wide = both.double().requires_grad_()
    a = wide[:, :75]
    fs = {"silu": torch.nn.functional.silu, "relu2": lambda a: a.relu().square(),
          "gelu": lambda a: torch.nn.functional.gelu(a, approximate="tanh")}
    want = fs[act](a) * wide[:, 75:]
    (dwant,) = torch.autograd.grad(want, wide, dh.double())
    h = A.glu(gate, up, act)
    A.glu_grad(gate, up, dh, dboth[:, :75], dboth[:, 75:], act)
    assert len(called) == 2 * compiler
    tol = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert (h - want).norm() < tol * want.norm() and (dboth - dwant).norm() < tol * dwant.norm()
