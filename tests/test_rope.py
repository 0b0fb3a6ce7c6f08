"""kernels/rope.py: numerics, traffic and machine code of the kernel (kernelcheck.py), and how it sits in PyTorch."""
import kernelcheck as K
import pytest
import torch

from kernels import rope as R

LAYOUTS = {"half": False, "interleaved": True}


def case(B, T, H, D, per_head=False, dtype=torch.float64):
    """x is a view of a projection that holds q and k."""
    torch.manual_seed(0)
    x = torch.randn(B, T, 2, H, D, dtype=dtype).unbind(2)[1].requires_grad_()
    angle = torch.randn(*((T, H) if per_head else (T,)), D // 2, dtype=dtype)
    return x, 1.5 * angle.cos(), 1.5 * angle.sin()


CASES = {  # head sizes and numbers that no tile divides, one token, a factor on the tables, tables for each head
    "one token": case(1, 1, 1, 2),
    "ragged": case(3, 67, 3, 24),
    "a table for each head": case(2, 33, 5, 96, per_head=True),
    "not contiguous": (torch.randn(2, 24, 9, 4, dtype=torch.float64).transpose(1, 3).requires_grad_(),
                       *case(1, 4, 1, 24)[1:]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_numerics(name, layout):
    both = {"interleaved": LAYOUTS[layout]}
    K.check_numerics(R.rope, R.rope_ref, [(CASES[name], both)])


def traffic_case(layout, B=2, T=400, H=8, D=64):
    x, cos, sin = case(B, T, H, D, dtype=torch.bfloat16)
    cos, sin, dy = cos.float(), sin.float(), torch.randn(B, T, H, D).bfloat16()
    floor = K.nbytes(x, x, cos, sin)
    return lambda: R.rope(x, cos, sin, LAYOUTS[layout]), lambda y: torch.autograd.grad(y, x, dy), floor, floor


@pytest.mark.parametrize("layout", LAYOUTS)
def test_traffic(layout):
    forward, backward, floor, _ = traffic_case(layout)
    out = []
    K.check_traffic(lambda: out.append(forward()), floor, 1.0)
    K.check_traffic(lambda: backward(out[0]), floor, 1.0)


def bench_cases():
    return [(f"rope, {layout} (2, 400, 8, 64)", *traffic_case(layout)) for layout in LAYOUTS]


def launches():
    """Llama's and RetNet's heads, a table for each head, an odd size."""
    for H, D, interleaved, per_head, dtype in ((32, 128, False, False, torch.bfloat16),
                                               (3, 96, False, False, torch.float32),
                                               (8, 256, True, True, torch.bfloat16),
                                               (8, 256, True, True, torch.float32)):
        x = torch.empty(1, 64, H, D, dtype=dtype, requires_grad=True)
        table = torch.empty(*((64, H) if per_head else (64,)), D // 2)
        torch.autograd.grad(R.rope(x, table, table, interleaved), x, torch.empty_like(x))


def test_compiles():
    K.check_compiles("test_rope", "launches")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forms(layout, monkeypatch):
    """The CPU's form and the op equal the definition; torch.compile takes both whole; opcheck; meta tensors."""
    args = case(2, 7, 3, 8, dtype=torch.float32)
    call = lambda f: (y := f(*args, LAYOUTS[layout]), *torch.autograd.grad(y, args[0], torch.ones_like(y)))
    want = call(R.rope_ref)
    for kind in ("torch", "triton"):
        monkeypatch.setattr(R, "KERNELS", kind)
        for f in (R.rope, torch.compile(R.rope, fullgraph=True, backend="aot_eager")):
            for a, b in zip(call(f), want):
                torch.testing.assert_close(a, b)
    torch.library.opcheck(R.rope_op, (*args, LAYOUTS[layout], False))
    assert R.rope(*(t.to("meta") for t in args), LAYOUTS[layout]).shape == args[0].shape
    monkeypatch.setattr(R, "KERNELS", "torch")
    x = args[0].bfloat16()
    assert R.rope(x, *args[1:]).dtype == torch.bfloat16
    torch.testing.assert_close(R.rope(x, *args[1:]), R.rope_ref(x, *args[1:]), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_head", [True, False])
def test_on_a_cpu(per_head, layout, compiler, monkeypatch):
    """A loop in C, and without a compiler the definition, against it in fp64; strides of a projection, and others."""
    if not compiler:
        monkeypatch.setattr(R, "compiled", lambda source: None)
    elif not R.compiled(R.SOURCE):
        pytest.skip("no C compiler")
    x, cos, sin = case(3, 40, 5, 24, per_head)
    dy = torch.randn(3, 5, 40, 24, dtype=torch.float64).transpose(1, 2)
    for dtype, tol in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        for low in (x.to(dtype), x.to(dtype).transpose(1, 3).contiguous().transpose(1, 3)):
            low, high = low.detach().requires_grad_(), low.detach().double().requires_grad_()
            y, want = R.rope(low, cos, sin, LAYOUTS[layout]), R.rope_ref(high, cos, sin, LAYOUTS[layout])
            found = y, *torch.autograd.grad(y, low, dy.to(dtype))
            for a, b in zip(found, (want, *torch.autograd.grad(want, high, dy))):
                assert a.dtype == dtype and ((a.double() - b).norm() / b.norm()).item() < tol


def test_turns():
    """A turn keeps lengths, and the product of a query and a key depends on the distance of their positions only."""
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).expand(2, 1, 40, 1, 16)
    angle = torch.arange(40)[:, None] * torch.rand(8, dtype=torch.float64)
    for interleaved in LAYOUTS.values():
        q2, k2 = (R.rope(x, angle.cos(), angle.sin(), interleaved)[0, :, 0] for x in (q, k))
        torch.testing.assert_close(q2.norm(dim=-1), q[0, :, 0].norm(dim=-1))
        A = q2 @ k2.T
        torch.testing.assert_close(A[1:, 1:], A[:-1, :-1])


def test_errors():
    x, cos, sin = case(1, 4, 2, 8)
    for args in ((x, cos[:3], sin[:3]), (x, cos, sin[..., :2]), (x[..., :7], cos, sin)):
        with pytest.raises(ValueError, match="rope: shapes"):
            R.rope(*args)
