"""kernels/causal_conv1d.py: numerics, traffic, machine code (kernelcheck.py), the plain form, the op in PyTorch."""
import kernelcheck as K
import pytest
import torch

from kernels import causal_conv1d as C


def case(B, T, E, W, bias=True, initial=True, dtype=torch.float64, w_dtype=None):
    """x is the middle of a wider tensor, as it is in a model: E columns of 2E + 3."""
    torch.manual_seed(0)
    x = torch.randn(B, T, 2 * E + 3, dtype=dtype)[..., 1:1 + E].requires_grad_()
    w, b = torch.randn(E, W, dtype=w_dtype or dtype), torch.randn(E, dtype=w_dtype or dtype)
    before = torch.randn(B, W - 1, E, dtype=dtype).requires_grad_() if initial and W > 1 else None
    return x, w.requires_grad_(), b.requires_grad_() if bias else None, before


@pytest.fixture
def small(monkeypatch):
    """Few tiles a program of backward: the interpreter needs time for each."""
    monkeypatch.setattr(C, "TILES", 2, raising=False)


# one token; fewer tokens than taps; a tile of 16 rows and 64 channels, one less, one more; more rows than the 16 of
# a program of backward
CASES = {
    "one token": (case(1, 1, 3, 4), {}),
    "fewer tokens than taps": (case(2, 2, 33, 4), {}),
    "no initial": (case(2, 15, 65, 4, initial=False), {}),
    "no bias, no activation": (case(1, 17, 64, 3, bias=False), dict(activation=None)),
    "several programs": (case(2, 34, 24, 4), {}),
    "no initial, several programs": (case(1, 33, 5, 2, initial=False), dict(activation=None)),
    "one tap": (case(1, 5, 7, 1), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_numerics(name, small):
    K.check_numerics(C.causal_conv1d, C.causal_conv1d_ref, [CASES[name]])


def test_equals_pytorch():
    """The definition is torch's conv1d, groups = channels, padding W - 1 on the left."""
    x, w, b, before = case(2, 9, 5, 4)
    want = torch.nn.functional.conv1d(
        torch.cat([before, x], 1).transpose(1, 2), w[:, None], b, groups=5).transpose(1, 2)
    torch.testing.assert_close(C.causal_conv1d_ref(x, w, b, before, None), want)
    torch.testing.assert_close(C.causal_conv1d_ref(x, w, b, before), torch.nn.functional.silu(want))


def traffic_case():
    x, w, b, _ = (None if t is None else t.detach().bfloat16() for t in case(1, 256, 128, 4, initial=False))
    x, w, b = (t.detach().requires_grad_() for t in (x, w.float(), b.float()))
    dy = torch.randn(x.shape).bfloat16()
    forward = lambda: C.causal_conv1d(x, w, b)
    backward = lambda y: torch.autograd.grad(y, (x, w, b), dy)
    return forward, backward, K.nbytes(x, w, b, x), K.nbytes(dy, x, w, b, x, w, b)


def test_traffic():
    """Each address once a launch: the overlapping rows of a tile come from the cache."""
    forward, backward, forward_floor, backward_floor = traffic_case()
    out = []
    print("forward", K.check_traffic(lambda: out.append(forward()), forward_floor, 1.05, once=True),
          "backward", K.check_traffic(lambda: backward(out[0]), backward_floor, 1.15, once=True))


def bench_cases():
    return [("causal_conv1d (1, 256, 128), 4 taps", *traffic_case())]


def launches():
    """bf16 beside fp32 weights, with and without initial; fp32 and fp16; the official width of 4, and 3."""
    for dtype, w_dtype, how in ((torch.bfloat16, torch.float32, dict(initial=False)),
                                (torch.bfloat16, torch.bfloat16, {}),
                                (torch.float32, torch.float32, dict(initial=False)),
                                (torch.float16, torch.float32, dict(W=3))):
        x = torch.empty(1, 64, 3072, dtype=dtype, requires_grad=True)[..., :1536]
        w, b = torch.empty(1536, how.get("W", 4), dtype=w_dtype), torch.empty(1536, dtype=w_dtype)
        before = torch.empty(1, w.shape[1] - 1, 1536, dtype=dtype) if how.get("initial", True) else None
        y = C.causal_conv1d(x, w.requires_grad_(), b.requires_grad_(), before)
        torch.autograd.grad(y, (x, w, b), torch.empty_like(y))


def test_compiles():
    for r in K.check_compiles("test_causal_conv1d", "launches"):
        print(r["kernel"], r["arch"], r["regs"], r["spills"], r["smem"])


def test_torch_form():
    """The CPU's form equals the definition, also for a 16-bit x beside fp32 weights; torch.compile takes it whole."""
    for dtype, w_dtype, tol in ((torch.float64, torch.float64, 1e-12), (torch.float32, torch.float32, 1e-5),
                                (torch.bfloat16, torch.float32, 1e-2)):
        for args, how in ((case(2, 9, 10, 4, dtype=dtype, w_dtype=w_dtype), {}),
                          (case(1, 2, 10, 4, initial=False, dtype=dtype, w_dtype=w_dtype), {}),
                          (case(2, 9, 10, 3, bias=False, dtype=dtype, w_dtype=w_dtype), dict(activation=None))):
            wrt, results = [t for t in args if t is not None], []
            torch._dynamo.reset()
            for f in (C.causal_conv1d, torch.compile(C.causal_conv1d, fullgraph=True, backend="aot_eager"),
                      C.causal_conv1d_ref):
                y = f(*args, **how)
                results.append([y, *torch.autograd.grad((y * y.detach()).sum(), wrt)])
            for got in results[:2]:
                for a, b in zip(got, results[2]):
                    assert a.dtype == b.dtype
                    assert (a - b).norm() <= tol * b.norm(), (dtype, how)


@pytest.mark.parametrize("threads", [1, 2, 20])
def test_runs_of_time(threads, monkeypatch):
    """Threads share out the times of one sequence: as many as there are, or fewer where some would have none."""
    monkeypatch.setattr(C.torch, "get_num_threads", lambda: threads)
    for T, initial in ((321, True), (321, False), (50, True), (17, False)):
        args = case(1, T, 7, 4, initial=initial, dtype=torch.float32)
        exact = [None if t is None else t.detach().double().requires_grad_() for t in args]
        results = []
        for f, given in ((C.causal_conv1d, args), (C.causal_conv1d_ref, exact)):
            y = f(*given)
            results.append([y, *torch.autograd.grad(y.square().sum(), [t for t in given if t is not None])])
        for a, b in zip(*results):
            assert (a - b).norm() < 1e-6 * b.norm()


def test_registration(monkeypatch, small):
    """opcheck; one graph under torch.compile; meta and fake CUDA tensors; checkpointing; autocast; results repeat."""
    monkeypatch.setattr(C, "KERNELS", "triton")
    x, w, b, before = args = case(2, 7, 12, 4, dtype=torch.float32)
    for opargs in ((x, w, b, before, True), (x, w, None, None, False)):
        torch.library.opcheck(C.conv_op, opargs)
    step = lambda x, w, b, before: C.causal_conv1d(x * 2, w, b, before).square()
    want = torch.autograd.grad(step(*args).sum(), args)
    again = torch.autograd.grad(step(*args).sum(), args)
    assert all(torch.equal(p, q) for p, q in zip(want, again))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    checkpointed = lambda *a: torch.utils.checkpoint.checkpoint(step, *a, use_reentrant=False)
    for f in (compiled, checkpointed):
        for got, expected in zip(torch.autograd.grad(f(*args).sum(), args), want):
            torch.testing.assert_close(got, expected)
    meta = [t.detach().to("meta").requires_grad_() for t in args]
    assert [g.shape for g in torch.autograd.grad(step(*meta).sum(), meta)] == [t.shape for t in meta]
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(2, 8, 24, device="cuda", dtype=torch.bfloat16)
        y = C.causal_conv1d(fake, torch.empty(24, 4, device="cuda"), torch.empty(24, device="cuda"))
        assert y.shape == fake.shape and y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert C.causal_conv1d(x, w, b, before).dtype == torch.float32
    for wrong in ((x, w[1:], b, before), (x, w, b[1:], before), (x, w, b, before[:, 1:])):
        with pytest.raises(ValueError, match="expected x"):
            C.causal_conv1d(*wrong)
    with pytest.raises(ValueError, match="activation 'relu'"):
        C.causal_conv1d(*args, activation="relu")
