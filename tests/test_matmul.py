"""kernels/matmul.py: the GEMM and the linear layer in the interpreter, as machine code, and in bytes."""
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from kernelcheck import check_compiles, check_numerics, check_traffic, nbytes, triton_form
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels import matmul as mm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def leaves(*shapes):
    return [torch.randn(s, requires_grad=True) for s in shapes]


def strided(rows, cols):
    """Every second row of a transposed tensor: no stride is 1."""
    return torch.randn(cols, 2 * rows, dtype=torch.float64)[:, ::2].T.requires_grad_()


# (M, N, K): one element, one column, K shorter than a block, the thin tile, edges in every dimension
SHAPES = [(1, 1, 1), (33, 17, 65), (70, 1, 5), (1, 70, 40), (16, 100, 128), (65, 66, 33)]


def test_matmul_numerics():
    cases = [(rand(M, K), rand(K, N)) for M, N, K in SHAPES]
    cases += [(rand(2, 3, 20), rand(20, 9)), (strided(34, 21), strided(21, 19)), (rand(21, 34).mT, rand(19, 21).mT)]
    check_numerics(mm.matmul, mm.matmul_ref, cases)


def test_matmul_cut_along_k():  # the shape of a dw: few tiles, long K, three unequal slices; 16-bit sums stay fp32
    check_numerics(mm.matmul, mm.matmul_ref, [(rand(1571, 20).mT, rand(1571, 9))])


@pytest.mark.parametrize("act", [None, "gelu"])
def test_linear_numerics(act):
    cases = [((rand(M, K), rand(N, K), rand(N)), dict(act=act)) for M, N, K in SHAPES]
    cases += [((rand(2, 3, 20), rand(9, 20)), dict(act=act))]
    cases += [((strided(34, 21), strided(19, 21), strided(19, 1)[:, 0]), dict(act=act))]
    cases += [((rand(2, 140, 20), rand(9, 20), rand(9)), dict(act=act))]  # db from two slices of rows
    # fp16: near gelu's minimum gelu' amplifies the rounding of the saved z, and the first case is one element
    tol = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
    check_numerics(mm.linear, mm.linear_ref, cases, tol=tol)


def test_wide_tiles(monkeypatch):  # 128 x 128, which only large products get by themselves; more than one group of rows
    monkeypatch.setattr(mm, "tile", lambda M, N, dtype: (128, 128, 32, 8, 3))
    cases = [(rand(150, 40), rand(40, 140)), (rand(1100, 16), rand(16, 130))]
    check_numerics(mm.matmul, mm.matmul_ref, cases, dtypes=DTYPES[1:])


def test_ref_is_torch():
    x, w, b = rand(2, 5, 7), rand(3, 7), rand(3)
    torch.testing.assert_close(mm.linear_ref(x, w, b), F.linear(x, w, b))
    torch.testing.assert_close(mm.linear_ref(x, w, b, "gelu"), F.gelu(F.linear(x, w, b), approximate="tanh"))
    torch.testing.assert_close(mm.linear(x, w, b, "gelu"), mm.linear_ref(x, w, b, "gelu"))  # the form that serves here
    torch.testing.assert_close(mm.matmul_ref(x, w.mT), x @ w.mT)
    assert torch.autograd.gradcheck(lambda *a: mm.linear_ref(*a, "gelu"), (x, w, b))


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row(dtype, compiler, monkeypatch):
    """Generation's products, by the loop in C and without a compiler: with or without bias, either layout of w. Of
    small integers sums are exact in fp32, so nothing is rounded but the result."""
    if compiler and mm.compiled(mm.SOURCE) is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(mm, "compiled", mm.compiled if compiler else lambda source: None)
    calls, vector = [], mm.vector
    monkeypatch.setattr(mm, "vector", lambda *a: calls.append(1) or vector(*a))
    for N, K in [(200, 384), (65, 7), (1, 130), (7, 1), (2000, 33)]:
        x, w, b = (torch.randint(-9, 10, shape).to(dtype) for shape in [(1, 1, K), (N, K), (N,)])
        for weight in (w, w.t().contiguous().t()):
            for bias in (None, b):
                with torch.no_grad():
                    found = mm.linear(x, weight.requires_grad_(), bias)
                want = mm.linear_ref(x.double(), w.double(), None if bias is None else bias.double())
                assert found.dtype == dtype and torch.equal(found, want.to(dtype))
    assert len(calls) == 20 * compiler
    mm.linear(x, w.detach().requires_grad_()).sum().backward()  # one row that is trained is not the loop's
    assert len(calls) == 20 * compiler


@pytest.mark.parametrize("trained", ["x", "w", "b", "xw", "xwb"])
def test_onednn(trained, monkeypatch):
    """Where MKL is slow: oneDNN's products forward and for x; F.linear's results, gradients (to rounding), layout."""
    x, w, b, dy = torch.randn(3, 50, 96), torch.randn(70, 96), torch.randn(70), torch.randn(3, 50, 70)
    for weight in (w, w.t().contiguous().t()):
        leaves = dict(x=x.clone(), w=weight.detach(), b=b.clone() if "b" in trained else None)
        given = [leaves[name].requires_grad_() for name in trained]
        grads = {}
        for slow in (True, False):
            monkeypatch.setattr(mm, "MKL_IS_SLOW", slow)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                y = mm.linear(*leaves.values())
                grads[slow] = [y, *torch.autograd.grad(y, given, dy)]
            count = sum(e.count for e in seen.key_averages() if "_linear_pointwise" in e.key)
            assert count == slow * (1 + ("x" in trained))
        for found, want in zip(grads[True], grads[False]):
            assert found.shape == want.shape and found.stride() == want.stride()
            assert (found - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("transposed", [False, True])
def test_bf16_on_a_cpu(transposed):
    """Under autocast a layer with a bias is one call of oneDNN, and equals F.linear's as far as bf16 goes."""
    if not mm.ONEDNN_BF16:
        pytest.skip("oneDNN has no bf16 on this machine")
    x, w, b = leaves((3, 50, 40), (40, 72) if transposed else (72, 40), (72,))
    dy, results = torch.randn(3, 50, 72).bfloat16(), []
    for f in (mm.linear, torch.nn.functional.linear):
        with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as seen:
            y = f(x, w.t() if transposed else w, b)
        assert any("_linear_pointwise" in e.key for e in seen.key_averages()) == (f is mm.linear)
        results.append([y, *torch.autograd.grad(y, (x, w, b), dy)])
    for got, want in zip(*results):
        assert got.dtype == want.dtype and got.stride() == want.stride()
        assert (got - want).norm() < 6e-3 * want.norm()


@pytest.mark.parametrize("compiler", [True, False])
def test_gelu_on_a_cpu(compiler, monkeypatch):
    """Both forms against fp64, where gelu is steep, flat and far out. What is strided or fp64 is PyTorch's."""
    if compiler and mm.compiled(mm.SOURCE) is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(mm, "compiled", mm.compiled if compiler else lambda source: None)
    z = torch.cat([torch.linspace(-12, 12, 40_001), torch.tensor([-1e4, 1e4, 0.0])]).requires_grad_()
    wide = z.detach().double().requires_grad_()
    y, want = mm.gelu(z), torch.nn.functional.gelu(wide, approximate="tanh")
    assert (type(y.grad_fn).__name__ == "GELUBackward") == compiler
    assert ((y - want).abs() < 4e-7 * (1 + want.abs())).all()
    (dz,), (dwant,) = torch.autograd.grad(y.sum(), z), torch.autograd.grad(want.sum(), wide)
    assert (dz - dwant).abs().max() < 2.5e-6  # PyTorch's: 1.04e-6, C: 1.97e-6
    z16, special = z.detach().bfloat16().requires_grad_(), torch.tensor([math.nan, math.inf, -9.0]).bfloat16()
    y16, wide = mm.gelu(z16), z16.detach().double().requires_grad_()
    want = torch.nn.functional.gelu(wide, approximate="tanh")
    for a, b in ((y16, want), (torch.autograd.grad(y16.sum(), z16)[0], torch.autograd.grad(want.sum(), wide)[0])):
        assert a.dtype == torch.bfloat16 and ((a - b).abs() <= 2**-8 * b.abs() + 4e-6).all()  # bf16's own rounding
    assert mm.gelu(special).isnan().tolist() == [True, False, False] and mm.gelu(special)[1] == math.inf
    for other in (torch.randn(4, 6).t(), torch.randn(5).double()):
        assert torch.equal(mm.gelu(other), torch.nn.functional.gelu(other, approximate="tanh"))


def test_empty():
    with triton_form():
        assert mm.linear(torch.ones(0, 4), torch.ones(3, 4)).shape == (0, 3)
        assert mm.linear(torch.ones(2, 0), torch.ones(3, 0), torch.ones(3)).tolist() == [[1, 1, 1]] * 2


def test_repeats_bit_for_bit():
    x, w, b = leaves((1040, 5), (9, 5), (9,))
    with triton_form():
        runs = [torch.autograd.grad(mm.linear(x, w, b, "gelu").square().sum(), (x, w, b)) for _ in range(2)]
    assert all(torch.equal(p, q) for p, q in zip(*runs))


@pytest.mark.parametrize("gelu", [False, True])
def test_opcheck(gelu):
    x, w, b = leaves((5, 20), (9, 20), (9,))
    torch.library.opcheck(mm.linear_op, (x, w, b, gelu, gelu))
    torch.library.opcheck(mm.matmul_op, (x, w.T))
    torch.library.opcheck(mm.bias_act_grad_op, (torch.randn(5, 9), torch.randn(5, 9), gelu))


def test_compile_and_checkpoint():
    x, w, b = leaves((2, 5, 20), (9, 20), (9,))
    f = lambda x, w, b: mm.linear(x, w, b, "gelu").square().sum()
    want = torch.autograd.grad(f(x, w, b), (x, w, b))
    with triton_form():
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for g in (compiled, lambda *a: checkpoint(f, *a, use_reentrant=False)):
            for p, q in zip(torch.autograd.grad(g(x, w, b), (x, w, b)), want):
                torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)


def test_autocast():
    x, w, b = leaves((5, 20), (9, 20), (9,))
    with torch.autocast("cpu", torch.bfloat16):
        want = mm.linear(x, w, b, "gelu")
        with triton_form():
            got = mm.linear(x, w, b, "gelu")
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    grads = [torch.autograd.grad(y.float().sum(), (x, w, b)) for y in (got, want)]
    for p, q in zip(*grads):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, q, atol=6e-2, rtol=2e-2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # a CPU build of torch has no autograd for fake CUDA tensors
def test_fake_and_flops(device):
    from torch._subclasses.fake_tensor import FakeTensorMode
    grad = device == "cpu"
    with FakeTensorMode(), triton_form(), FlopCounterMode(display=False) as flops:
        x, w, b = (torch.empty(*s, device=device, requires_grad=grad) for s in ((2, 5, 20), (9, 20), (9,)))
        y = mm.linear(x, w, b, "gelu")
        assert y.shape == (2, 5, 9) and y.device.type == device
        if grad:
            y.sum().backward()
            assert w.grad.shape == w.shape
    assert flops.get_total_flops() == (3 if grad else 1) * 2 * 10 * 9 * 20


def test_bad_arguments():
    with pytest.raises(ValueError, match="should be"):
        mm.linear(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(ValueError, match="should be"):
        mm.matmul(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(ValueError, match="relu"):
        mm.linear(torch.ones(2, 3), torch.ones(4, 3), act="relu")
    with triton_form(), pytest.raises(TypeError, match="one dtype"):
        mm.linear(torch.ones(2, 3), torch.ones(4, 3, dtype=torch.bfloat16))


# ---------------------------------------------------------------- machine code
def launches():
    """GPT-2's widest layer with its backward, one row, a small layer and a dw in K slices, sizes that no 16 divides."""
    def run(dtype, M, N, K, gelu=False, backward=False):
        x, w, b, dy = (torch.empty(*s, dtype=dtype) for s in ((M, K), (N, K), (N,), (M, N)))
        mm.linear_op(x, w, b, gelu, gelu)
        if backward:
            mm.bias_act_grad_op(dy, dy, gelu)
            mm.matmul_op(dy, w)
            mm.matmul_op(dy.T, x)

    for dtype in (torch.bfloat16, torch.float32):
        run(dtype, 8192, 3072, 768, gelu=True, backward=True)
        run(dtype, 1, 768, 768)
    run(torch.float16, 8192, 3072, 768, gelu=True)
    run(torch.bfloat16, 1024, 192, 192)
    mm.matmul_op(torch.empty(1024, 192, dtype=torch.bfloat16).T, torch.empty(1024, 192, dtype=torch.bfloat16))
    run(torch.float32, 255, 67, 65, gelu=True)
    run(torch.bfloat16, 255, 67, 65, gelu=True)
    mm.bias_act_grad_op(torch.empty(255, 67, dtype=torch.bfloat16), torch.empty(255, 67, dtype=torch.bfloat16), True)


def test_compiles():
    for r in check_compiles("test_matmul", "launches"):
        print({k: r.get(k) for k in ("kernel", "arch", "regs", "smem", "spills", "occupancy", "tensor", "grid")})


# ------------------------------------------------------- traffic: the tiled floor; bias and partial sums come to it
def tiled_floor(a, b, c):
    M, N = c.shape
    BM, BN = mm.tile(M, N, a.dtype)[:2]
    return -(-N // BN) * nbytes(a) + -(-M // BM) * nbytes(b) + nbytes(c)


def test_traffic():
    x, w, b, dy = (torch.randn(*s).bfloat16() for s in ((256, 96), (128, 96), (128,), (256, 128)))
    product = tiled_floor(x, w.T, dy)
    print("forward", check_traffic(lambda: mm.linear_op(x, w, b, False, False), product, 1.1))
    print("forward, gelu", check_traffic(lambda: mm.linear_op(x, w, b, True, True), product + nbytes(dy), 1.1))
    print("dx", check_traffic(lambda: mm.matmul_op(dy, w), tiled_floor(dy, w, x), 1.1))
    print("dw", check_traffic(lambda: mm.matmul_op(dy.T, x), tiled_floor(dy.T, x, w), 1.1))
    print("db", check_traffic(lambda: mm.bias_act_grad_op(dy, dy, False), nbytes(dy, b), 1.1))
    print("db, gelu", check_traffic(lambda: mm.bias_act_grad_op(dy, dy, True), nbytes(dy, dy, dy, b), 1.1))


def bench_cases():
    x, w, b = (torch.randn(*s).bfloat16().requires_grad_() for s in ((512, 256), (1024, 256), (1024,)))
    y = torch.empty(512, 1024, dtype=torch.bfloat16)
    backward = lambda y: torch.autograd.grad(y, (x, w, b), torch.ones_like(y))
    return [("linear+gelu 512x256 -> 1024", lambda: mm.linear(x, w, b, "gelu"), backward,
             nbytes(x, w, b, y, y), nbytes(x, w, y, y, x, w, b))]


def test_inductor(monkeypatch):
    """Where oneDNN's products serve, and Inductor would take them for its own, it chooses by itself."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(mm, "MKL_IS_SLOW", torch.backends.mkldnn.is_available())
    x, w, b = leaves((3, 8), (5, 8), (5,))
    step = lambda x, w, b: mm.linear(x, w, b, "gelu").square().sum()
    want, found = (torch.autograd.grad(f(x, w, b), (x, w, b)) for f in (step, torch.compile(step, fullgraph=True)))
    assert all((p - q).norm() <= 1e-5 * q.norm() for p, q in zip(found, want))
