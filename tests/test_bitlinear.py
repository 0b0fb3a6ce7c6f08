"""kernels/bitlinear.py: the kernels (kernelcheck.py), the CPU's forms, and how they sit in PyTorch."""
import contextlib

import kernelcheck as K
import pytest
import torch

from kernels import bitlinear as L


def inputs(M, k, N, dtype=torch.float64):
    """x, g, and weights of N rows. g holds a zero; no activation is so near a tie that fp32 and fp64 round it apart."""
    for seed in range(100):
        torch.manual_seed(seed)
        x, g, ws = torch.randn(*M, k), torch.randn(k), [torch.randn(n, k).to(dtype) * 0.1 for n in N]
        g[0] = 0
        h = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * g.double()
        v = h * (127 / h.abs().amax(-1, keepdim=True))
        if (v - v.floor() - 0.5).abs().min() > 3e-5:
            return x.to(dtype), g.to(dtype), ws
    raise AssertionError("no such numbers in 100 seeds")


def trained(f):
    return lambda x, g, v, w: f(x, g, [v, w])


def training_cases(*sizes):
    for M, k, N in sizes:
        x, g, ws = inputs(M, k, N)
        yield tuple(t.requires_grad_() for t in (x, g, *ws))


def packed_case(M, k, n):
    x, g, _ = inputs(M, k, [])
    return x, g, L.pack(torch.randint(-1, 2, (n, k)).to(torch.int8)), torch.tensor(0.05 * n)


def inferred(f):
    return lambda x, g, packed, s: f(x, g, [(packed, s.float())])


def test_numerics():
    """Ragged rows and columns, one token, several layers behind one norm; every gradient."""
    sizes = [((1,), 33, [5, 1]), ((2, 9), 64, [40, 8]), ((70,), 97, [3, 66])]
    K.check_numerics(trained(L.bit_linear), trained(L.bit_linear_ref), training_cases(*sizes), dtypes=(torch.float32,))
    K.check_numerics(trained(L.bit_linear), trained(L.bit_linear_ref), training_cases(((2, 9), 64, [24, 8])),
                     dtypes=(torch.bfloat16,))
    K.check_numerics(trained(L.bit_linear), trained(L.bit_linear_ref), training_cases(((3,), 8640, [5, 4])),
                     dtypes=(torch.float32,))  # BitNet 3B's widest rows


def test_numerics_packed():
    """Both tilings: few tokens, and many."""
    cases = [packed_case((1,), 33, 20), packed_case((3, 5), 300, 68), packed_case((70,), 96, 132)]
    K.check_numerics(inferred(L.packed_linear), inferred(L.packed_linear_ref), cases,
                     grads=False, dtypes=(torch.float32,))
    K.check_numerics(inferred(L.packed_linear), inferred(L.packed_linear_ref), cases[:1],
                     grads=False, dtypes=(torch.bfloat16,))


def test_the_integers_are_equal():
    """Kernels, plain PyTorch and the definition give the same ternary weights and 8-bit activations."""
    x, g, (w,) = inputs((40,), 100, [60], torch.float32)
    want, s = L.quantize_weight_ref(w)
    xq, a_inv = L.quantize_ref(x, g)
    assert want.unique().tolist() == [-1, 0, 1] and xq.abs().max() == 127
    with K.count():
        found = [L.quantize_weight_op(w), L.rms_norm_quant_op(x, g, 1e-5)]
    for got, s_got in (found[0], L.quantize_weight_torch(w)):
        assert torch.equal(got.float(), want.float()) and abs(s_got / s - 1) < 1e-6
    for got, a_got in (found[1][:2], L.quantize_torch(x, g, 1e-5)[:2]):
        assert torch.equal(got.float(), xq.float())
        torch.testing.assert_close(a_got.flatten(), a_inv.flatten())


def test_round_half_to_even_and_clamps():
    """0.5 -> 0, 1.5 -> 2, as round() does; a row of zeros gives zeros, a matrix of zeros too."""
    w = torch.tensor([[0.5, -0.5, 1.5, -1.5, 1.0, 0.0, 1.0, 2.0]])  # mean |w| is 1
    for f in (L.quantize_weight_ref, L.quantize_weight_op, L.quantize_weight):
        with K.count():
            assert f(w)[0].tolist() == [[0, 0, 1, -1, 1, 0, 1, 1]]
    zero = torch.zeros(3, 16)
    for kind in ("ref", "torch", "triton"):
        with K.count(), pytest.MonkeyPatch.context() as m:
            m.setattr(L, "KERNELS", kind)
            (y,) = L.bit_linear(zero, torch.ones(16), [torch.zeros(4, 16)])
            assert not y.any()


def test_pack():
    """As on the hub: row r of the bytes holds rows r, r + N/4, ..., two bits each, from the lowest up."""
    wq = torch.tensor([[-1, 0], [1, 1], [0, -1], [1, 0], [0, 1], [1, -1], [-1, -1], [0, 0]], dtype=torch.int8)
    want = [[0 | 1 << 2 | 1 << 4 | 0 << 6, 1 | 0 << 2 | 2 << 4 | 0 << 6],
            [2 | 2 << 2 | 2 << 4 | 1 << 6, 2 | 1 << 2 | 0 << 4 | 1 << 6]]
    assert L.pack(wq).tolist() == want and torch.equal(L.unpack(L.pack(wq)), wq)
    with pytest.raises(ValueError, match="6 rows"):
        L.pack(wq[:6])


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("x_type,bf16", [("float32", False), ("float32", True), ("bfloat16", False)])
def test_training_on_a_cpu(x_type, bf16, compiler, monkeypatch):
    """In C and in PyTorch, fp32, autocast and bf16: the integers of the definition, and its gradients to rounding."""
    if compiler and L.compiled(L.SOURCE) is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(L, "compiled", L.compiled if compiler else lambda source: None)
    x, g, ws = inputs((3, 67), 100, [40, 5000], torch.float32)
    x = x.to(getattr(torch, x_type))
    ws = [w.to(x.dtype) for w in ws]
    args = [t.detach().requires_grad_() for t in (x, g, *ws)]
    with torch.autocast("cpu", torch.bfloat16, bf16):
        got = L.bit_linear(*args[:2], args[2:])
    saved = got[0].grad_fn.saved_tensors[3:]  # xh, and a wh of each weight
    xq, a_inv = L.quantize_ref(x, g)
    for found, want in zip(saved, [xq.flatten(0, 1) * a_inv.flatten(0, 1), *(q * s for q, s in
                                                                             map(L.quantize_weight_ref, ws))]):
        # a rounding of one half may fall the other way, where rms is not the same to the last bit
        far = (found - want).abs() > (2**-8 if found.dtype == torch.bfloat16 else 1e-6) * want.abs()
        assert far.sum() <= far.numel() // 5000
    wide = [t.detach().double().requires_grad_() for t in args]
    want, dy = L.bit_linear_ref(*wide[:2], wide[2:]), [torch.randn(y.shape).to(y.dtype) for y in got]
    tol = 2e-2 if got[0].dtype == torch.bfloat16 else 2e-3
    for a, b, like in zip([*got, *torch.autograd.grad(got, args, dy)],
                          [*want, *torch.autograd.grad(want, wide, [d.double() for d in dy])], [*got, *args]):
        assert a.dtype == like.dtype and (a - b).norm() < tol * b.norm()


@pytest.mark.parametrize("compiler", [True, False])
def test_cpu_is_exact(compiler, monkeypatch):
    """Integers are summed exactly, by the C code and by decoded slices, for one token, a few and many."""
    if compiler and L.compiled(L.SOURCE) is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(L, "compiled", L.compiled if compiler else lambda source: None)
    for M, k, n in ((1, 33, 8), (3, 500, 1404), (20, 64, 64)):
        x, g, p, s = packed_case((M,), k, n)
        x, g = x.float(), g.float()
        xq, a_inv, _ = L.quantize_torch(x, g, 1e-5)
        exact = (xq.double() @ L.unpack(p).double().t()).float() * (a_inv * s.float())
        assert torch.equal(L.packed_linear_torch(x, g, [(p, s.float())], 1e-5)[0], exact)


@pytest.mark.parametrize("slow", [True, False])
def test_torch_form(slow, monkeypatch):
    """The CPU's form is the definition, gradients too; torch.compile takes it whole; autocast: bf16, fp32 gradients."""
    monkeypatch.setattr(L, "MKL_IS_SLOW", slow)  # oneDNN's products, or MKL's
    x, g, ws = inputs((2, 5), 40, [12, 20])
    for dtype, tol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        args = [t.to(dtype).requires_grad_() for t in (x, g, *ws)]
        results = []
        whole = (torch.compile(trained(L.bit_linear), fullgraph=True, backend="aot_eager") if dtype == torch.float32
                 else trained(L.bit_linear))
        for f in (trained(L.bit_linear), whole, trained(L.bit_linear_ref)):
            out = f(*args)
            results.append([*out, *torch.autograd.grad(out, args, [torch.ones_like(o) for o in out])])
        for got in results[:2]:
            for a, b in zip(got, results[2]):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=tol, atol=tol)
    with torch.autocast("cpu", torch.bfloat16):
        out = L.bit_linear(args[0], args[1], args[2:])
    assert out[0].dtype == torch.bfloat16
    for a, b in zip([*out, *torch.autograd.grad(out, args, [torch.ones_like(o) for o in out])], results[2]):
        assert (a.float() - b).norm() / b.norm() < 2e-2


def test_libraries_are_kept(monkeypatch, tmp_path):
    """Compiled once, by whoever asks first; where nothing can be kept, once in a process."""
    if L.compiled(L.SOURCE) is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source, run = "int one(void) { return 1; }", L.subprocess.run
    assert L.compiled.__wrapped__(source).one() == 1
    monkeypatch.setattr(L.subprocess, "run", lambda *a, **k: pytest.fail("compiled twice"))
    assert L.compiled.__wrapped__(source).one() == 1
    (kept,) = (tmp_path / "kernels_c").iterdir()
    assert kept.suffix == ".so"
    monkeypatch.setattr(L.subprocess, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert L.compiled.__wrapped__(source).one() == 1


def test_a_compiler_that_fails_is_named(monkeypatch):
    monkeypatch.setenv("CC", "/bin/false")
    monkeypatch.delenv("KERNELS_C", raising=False)
    with pytest.warns(UserWarning, match="/bin/false cannot compile"):
        assert L.compiled("int one(void) { return 1; }") is None


def test_scales():
    """a W scales y by a; a times one token scales nothing (it is normed) and leaves the other tokens alone."""
    x, g, (w,) = inputs((4,), 48, [8], torch.float32)
    (y,), (y4,) = L.bit_linear(x, g, [w]), L.bit_linear(x, g, [4 * w])
    assert torch.equal(4 * y, y4)
    x[1] *= 7
    torch.testing.assert_close(L.bit_linear(x, g, [w])[0], y, rtol=1e-3, atol=1e-4)
    zeros = (L.quantize_weight(torch.randn(200, 200))[0] == 0).float().mean()
    assert abs(zeros - 0.31) < 0.01, "|w| < 0.4 sigma: 31% of a normal distribution"


def traffic_cases(M, k, N):
    """op name -> function, floor."""
    bf16 = torch.bfloat16
    x, g, w = (torch.randn(shape).to(bf16) for shape in ((M, k), (k,), (N, k)))
    xq, a_inv, rstd = L.rms_norm_quant_op(x, g, 1e-5)
    wq, s = L.quantize_weight_op(w)
    p, y = L.pack(wq), torch.empty(M, N, dtype=bf16)
    return {
        "rms_norm_quant": (lambda: L.rms_norm_quant_op(x, g, 1e-5), K.nbytes(x, g, xq, a_inv, rstd)),
        "quantize_weight": (lambda: L.quantize_weight_op(w), K.nbytes(w, wq, s)),
        "int8_linear": (lambda: L.int8_linear_op(xq, a_inv, wq, s, bf16), K.nbytes(xq, a_inv, wq, s, y)),
        "packed_linear": (lambda: L.packed_linear_op(xq, a_inv, p, s, bf16), K.nbytes(xq, a_inv, p, s, y)),
    }


@pytest.mark.parametrize("name, limit", [
    ("rms_norm_quant", 1.1), ("quantize_weight", 1.7), ("packed_linear", 1.2), ("int8_linear", 1.05)])
def test_traffic(name, limit):
    """packed_linear: x again for each program; quantize_weight: W twice, its mean first; int8_linear: perfect cache."""
    with K.count():
        cases = traffic_cases(*dict(packed_linear=(1, 512, 512), int8_linear=(128, 256, 256),
                                    rms_norm_quant=(1024, 64, 4)).get(name, (4, 256, 64)))
    print(name, K.check_traffic(*cases[name], limit, once=name == "int8_linear"))


def bench_cases():
    sizes = {"rms_norm_quant": (1024, 768, 64), "quantize_weight": (16, 1024, 1024), "int8_linear": (256, 512, 512),
             "packed_linear": (1, 1024, 1024)}
    return [(f"{name} {size}", *traffic_cases(*size)[name][:1], None, traffic_cases(*size)[name][1], None)
            for name, size in sizes.items()]


def launches():
    """Training in both dtypes and tilings, the widest rows, packed products of one token and of many."""
    for dtype, M, k, N in ((torch.bfloat16, 256, 768, 256), (torch.float32, 64, 8192, 64),
                           (torch.bfloat16, 64, 8640, 64), (torch.bfloat16, 256, 5460, 256)):
        x, g, w = (torch.empty(s, dtype=dtype, requires_grad=True) for s in ((M, k), (k,), (N, k)))
        L.bit_linear(x, g, [w])
    for M, k in ((1, 2560), (256, 2560), (1, 5460), (256, 5460)):
        x, g = torch.empty(M, k, dtype=torch.bfloat16), torch.empty(k, dtype=torch.bfloat16)
        L.packed_linear(x, g, [(torch.empty(640, k, dtype=torch.uint8), torch.empty(()))])


def test_compiles():
    K.check_compiles("test_bitlinear", "launches")


def test_registration(monkeypatch):
    """opcheck; one graph under torch.compile; meta, fake CUDA tensors; checkpointing; what does not fit is refused."""
    monkeypatch.setattr(L, "KERNELS", "triton")
    x, g, ws = inputs((5,), 24, [12, 8], torch.float32)
    args = [t.requires_grad_() for t in (x, g, *ws)]
    for op, a in ((L.rms_norm_quant_op, (x.detach(), g.detach(), 1e-5)), (L.quantize_weight_op, (ws[0].detach(),))):
        torch.library.opcheck(op, a)
    step = lambda x, g, *ws: sum(y.square().sum() for y in L.bit_linear(x, g, ws))
    want = torch.autograd.grad(step(*args), args)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(step(*args), args), want)), "results repeat"
    for f in (torch.compile(step, fullgraph=True, backend="aot_eager"),
              lambda *a: torch.utils.checkpoint.checkpoint(step, *a, use_reentrant=False)):
        for got, expected in zip(torch.autograd.grad(f(*args), args), want):
            torch.testing.assert_close(got, expected)
    meta = [t.detach().to("meta").requires_grad_() for t in args]
    assert [d.shape for d in torch.autograd.grad(step(*meta), meta)] == [t.shape for t in args]
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(2, 8, 24, device="cuda", dtype=torch.bfloat16)
        p = torch.empty(3, 24, device="cuda", dtype=torch.uint8), torch.empty(1, device="cuda")
        (y,) = L.packed_linear(fake, torch.empty(24, device="cuda"), [p])
        assert y.shape == (2, 8, 12) and y.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"\(5, 24\), \(24,\), \(8, 23\)"):
        L.bit_linear(x, g, [ws[1][:, 1:]])
    with pytest.raises(ValueError, match="at most 16384"):
        L.bit_linear(torch.empty(1, 16385), torch.empty(16385), [torch.empty(4, 16385)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_so(bad):
    """A run that diverges shows it: integers would hide it, and so would a maximum on a GPU."""
    x, g, (w,) = inputs((3,), 64, [40], torch.float32)
    x[1, 5] = bad
    pack = L.pack(L.quantize_weight(w)[0]), L.quantize_weight(w)[1]
    for op in (lambda: L.bit_linear(x, g, [w])[0], lambda: L.packed_linear(x, g, [pack])[0]):
        plain = op()
        with K.triton_form():
            for y in (plain, op()):
                assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_no_rows():
    x, g, w = (torch.randn(shape, requires_grad=True) for shape in [(0, 8), (8,), (4, 8)])
    for form in (contextlib.nullcontext, K.triton_form):
        with form():
            y = L.bit_linear(x, g, [w])[0]
            grads = torch.autograd.grad(y.sum(), (x, g, w))
            assert y.shape == (0, 4) and [d.shape for d in grads] == [x.shape, g.shape, w.shape]
