"""kernels/rwkv_mix.py: numerics, traffic, machine code (kernelcheck.py), the plain forms, the ops in PyTorch."""
import kernelcheck as K
import pytest
import torch

from kernels import rwkv_mix as M


def token_shift(h, mu1, mu2, last=None):
    return M.token_shift(h, last, (mu1, mu2))


def token_shift_ref(h, mu1, mu2, last=None):
    return M.token_shift_ref(h, last, (mu1, mu2))


OPS = {  # name: op, definition, how many (B, T, C), how many parameters
    "token_shift": (token_shift, token_shift_ref, 1, 2),
    "gates": (M.gates, M.gates_ref, 3, 2),
    "readout": (M.readout, M.readout_ref, 5, 3),
    "squared_relu": (M.squared_relu, M.squared_relu_ref, 1, 0),
}


def inputs(name, B, T, H, N, dtype=torch.float64, more=False):
    """more: last for token_shift."""
    torch.manual_seed(0)
    _, _, n, p = OPS[name]
    shapes = [(B, T, H * N)] * n + ([(H, N), (H * N,), (H * N,)] if name == "readout" else [(1, 1, H * N)] * p)
    args = [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]
    args += [torch.randn(B, H * N, dtype=dtype).requires_grad_()] if more and name == "token_shift" else []
    return (*args, N) if name == "gates" else tuple(args)


# one token; one more than the rows of a program (16, 128); channels and heads that no tile divides
SHAPES = [(1, 1, 1, 8), (2, 17, 2, 12), (1, 130, 1, 64), (1, 5, 3, 48)]


@pytest.mark.parametrize("name", OPS)
def test_numerics(name):
    op, ref, *_ = OPS[name]
    cases = [inputs(name, *shape, more=i % 2) for i, shape in enumerate(SHAPES)]
    turned = inputs(name, 2, 6, 1, 16)
    turned = (torch.randn(16, 6, 2, dtype=torch.float64).permute(2, 1, 0).requires_grad_(), *turned[1:])  # transposed
    K.check_numerics(op, ref, [*cases, turned])


def launches(shapes, w_dtype=torch.float32):
    for name, (op, *_) in OPS.items():
        for N, dtype in shapes:
            args = [t.detach().to(getattr(torch, dtype) if t.ndim == 3 and t.shape[0] > 1 else w_dtype).requires_grad_()
                    if torch.is_tensor(t) else t for t in inputs(name, 2, 64, 2, N)]
            out = op(*args)
            out = [out] if torch.is_tensor(out) else out
            torch.autograd.grad(out, [t for t in args if torch.is_tensor(t)], [torch.empty_like(t) for t in out])


def official():
    """16-bit tensors beside fp32 parameters, at the released head size; fp32; token_shift under autocast."""
    launches([(64, "bfloat16"), (64, "float32")])
    with torch.autocast("cpu", torch.bfloat16):
        launches([(64, "float32")])


def test_compiles():
    K.check_compiles("test_rwkv_mix", "official")


def traffic_case(name, T=128, H=2, N=64):
    op, _, n, _ = OPS[name]
    args = [t.detach().bfloat16().requires_grad_() if torch.is_tensor(t) else t for t in inputs(name, 1, T, H, N)]
    tensors = [t for t in args if torch.is_tensor(t)]
    many = {"token_shift": 2, "gates": 4}.get(name, 1)
    ups = [torch.randn_like(tensors[0]) for _ in range(many)]
    forward = lambda: op(*args)
    backward = lambda out: torch.autograd.grad(out, tensors, ups if many > 1 else ups[0])
    whole = K.nbytes(tensors[0])
    params = K.nbytes(*tensors[n:])
    return forward, backward, K.nbytes(*tensors) + many * whole, (many + 2 * n) * whole + 2 * params


@pytest.mark.parametrize("name", OPS)
def test_traffic(name):
    """Each address once a launch (token_shift reads the row before and the row after from the cache): within 1.1 of the
    floor; parameters are read, and their gradients' sums written, for every 128 tokens of only two heads here."""
    forward, backward, floor, floor_bwd = traffic_case(name)
    out = []
    print(name, K.check_traffic(lambda: out.append(forward()), floor, 1.1, once=True),
          K.check_traffic(lambda: backward(out[0]), floor_bwd, 1.25, once=True))


def bench_cases():
    return [(f"{name} (1, 128, 128)", *traffic_case(name)) for name in OPS]


def grads(f, args):
    out = f(*args)
    out = [out] if torch.is_tensor(out) else [*out]
    tensors = [t for t in args if torch.is_tensor(t)]
    up = [torch.randn(t.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(t.dtype)
          for i, t in enumerate(out)]
    return [*out, *torch.autograd.grad(out, tensors, up)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_on_a_cpu(name, compiler, dtype, monkeypatch):
    """Loops in C, and without a compiler the definition, against it in fp64; fp32 parameters beside bf16 tensors. One
    token; rows that two threads share unevenly, where a sequence ends inside a thread's run and at its end."""
    if compiler and not M.library():
        pytest.skip("no C compiler")
    monkeypatch.setattr(M, "library", M.library if compiler else lambda: None)
    op, ref, n, _ = OPS[name]
    for shape in [(1, 1, 2, 16), (2, 19, 3, 8), (3, 7, 1, 20), (2, 5, 2, 64)]:
        for more in (False, True):
            low = [t.detach().to(dtype if i < n or t.ndim == 2 and t.shape == (shape[0], shape[2] * shape[3])
                                 else torch.float32).requires_grad_() if torch.is_tensor(t) else t
                   for i, t in enumerate(inputs(name, *shape, more=more))]
            exact = grads(ref, [t.detach().double().requires_grad_() if torch.is_tensor(t) else t for t in low])
            found = grads(op, low)
            want = [low[0].dtype] * (len(exact) - sum(map(torch.is_tensor, low)))
            want += [t.dtype for t in low if torch.is_tensor(t)]
            assert [a.dtype for a in found] == want
            for a, b in zip(found, exact):
                assert (a.double() - b).norm() < (1e-6 if dtype == torch.float32 else 1.6e-2) * b.norm()


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_token_shift_under_autocast(kind, monkeypatch):
    """What a product would round to bf16 comes in bf16, the same numbers, and gradients are the same."""
    if kind == "torch" and not M.library():
        pytest.skip("no C compiler")
    monkeypatch.setattr(M, "KERNELS", kind)
    h, mu1, mu2 = inputs("token_shift", 2, 9, 2, 8, torch.float32)
    w = torch.randn(16, 16)

    def run():
        xs = token_shift(h, mu1, mu2)
        with torch.autocast("cpu", torch.bfloat16):
            ys = [x @ w for x in xs]
        return xs, torch.autograd.grad(sum(y.float().square().sum() for y in ys), (h, mu1, mu2))

    plain, want = run()
    with torch.autocast("cpu", torch.bfloat16):
        xs, found = run()
    assert all(x.dtype == torch.bfloat16 and torch.equal(x, p.bfloat16()) for x, p in zip(xs, plain))
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_registration(monkeypatch):
    """One graph under torch.compile, activation checkpointing, meta and fake CUDA tensors."""
    monkeypatch.setattr(M, "KERNELS", "triton")
    args = [inputs(name, 2, 5, 2, 8, torch.float32) for name in OPS]

    def step(*flat):
        total, at = 0.0, 0
        for (op, *_), a in zip(OPS.values(), args):
            out = op(*flat[at : at + len(a)])
            at += len(a)
            total = total + sum(t.square().sum() for t in ([out] if torch.is_tensor(out) else out))
        return total

    flat = [t for a in args for t in a]
    wrt = [t for t in flat if torch.is_tensor(t)]
    want = torch.autograd.grad(step(*flat), wrt)
    checkpointed = lambda *a: torch.utils.checkpoint.checkpoint(step, *a, use_reentrant=False)
    for f in (torch.compile(step, fullgraph=True, backend="aot_eager"), checkpointed):
        for got, expected in zip(torch.autograd.grad(f(*flat), wrt), want):
            torch.testing.assert_close(got, expected)
    meta = [t.detach().to("meta").requires_grad_() if torch.is_tensor(t) else t for t in flat]
    wrt = [t for t in meta if torch.is_tensor(t)]
    assert [g.shape for g in torch.autograd.grad(step(*meta), wrt)] == [t.shape for t in wrt]
    with torch._subclasses.FakeTensorMode():  # forward only: PyTorch without CUDA has no autograd for its tensors
        fake = torch.empty(2, 8, 24, device="cuda", dtype=torch.bfloat16)
        assert M.squared_relu(fake).shape == fake.shape
        assert [t.dtype for t in M.token_shift(fake, None, [torch.empty(1, 1, 24, device="cuda")])] == [torch.bfloat16]


def test_squared_relu_of_nan():
    k = torch.tensor([[-1.0, float("nan"), 2.0]])
    with K.triton_form():
        assert torch.equal(M.squared_relu(k).nan_to_num(7), torch.tensor([[0.0, 7.0, 4.0]]))
