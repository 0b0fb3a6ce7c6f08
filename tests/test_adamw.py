"""kernels/adamw.py: the fused step and the 8-bit states against definitions, torch.optim.AdamW, compiler and floor."""
import copy
import io

import pytest
import torch
import triton
import triton.language as tl
from kernelcheck import check_compiles, check_numerics, check_traffic, count, nbytes, triton_form

from kernels import adamw as A

HYPER = (1e-2, 0.9, 0.999, 1e-8, 0.1)  # lr, b1, b2, eps, weight decay: large enough to show


# ---------------------------------------------------------------- the fused step
def step_(p, g, m, v):
    A.adamw_op(p, g, m, v, torch.tensor(3.0), *HYPER)
    return p, m, v


def step_ref(p, g, m, v):
    return A.adamw_ref(p, g, m, v, 3, HYPER[0], HYPER[1:3], *HYPER[3:])


def test_numerics():
    def r(*shape):
        return [*torch.randn(3, *shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64) + 0.1]

    cases = [tuple(r(*s)) for s in ((1,), (33,), (1024,), (1025,), (3, 5, 7))]
    cases += [tuple(t.T for t in r(6, 9))]  # one order in memory: updated where it lies
    cases += [tuple(t[:, ::2] for t in r(6, 9))]  # with holes
    cases += [tuple(t.T if i % 2 else t for i, t in enumerate(r(8, 8)))]  # in two orders
    check_numerics(step_, step_ref, cases, grads=False)


def train(Optimizer, steps=5, dtype=torch.float32):
    """Steps on noise -> parameters, optimizer. Two groups, lr from a scheduler, one parameter without gradient."""
    torch.manual_seed(0)
    params = [torch.randn(s).to(dtype).requires_grad_() for s in ((100, 77), (5000,), (3,), (2, 2))]
    optimizer = Optimizer([dict(params=params[:1], lr=1e-2), dict(params=params[1:], weight_decay=0.3)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    noise(params, optimizer, steps, scheduler)
    return params, optimizer


def noise(params, optimizer, steps, scheduler=None):
    for _ in range(steps):
        for p in params[:3]:
            p.grad = torch.randn(p.shape).mul_(torch.rand(p.shape) ** 4).to(p.dtype)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("kind", ["ref", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch(monkeypatch, kind, dtype):
    want, other = train(torch.optim.AdamW, dtype=dtype)
    monkeypatch.setattr(A, "KERNELS", kind)
    got, optimizer = train(A.AdamW, dtype=dtype)
    tol = dict(atol=2e-6, rtol=2e-6) if dtype == torch.float32 else dict(atol=2e-3, rtol=1.6e-2)  # one step of bf16
    for p, q in zip(got, want):
        torch.testing.assert_close(p, q, **tol)
    assert got[3] not in optimizer.state and torch.equal(got[3], want[3])
    for p, q in zip(got[:3], want[:3]):
        s, s_want = optimizer.state[p], other.state[q]
        assert s.keys() == s_want.keys() and s["step"] == 5
        for name in ("exp_avg", "exp_avg_sq"):
            assert s[name].dtype == dtype
            torch.testing.assert_close(s[name], s_want[name], **tol)


@pytest.mark.parametrize("source, target", [
    (A.AdamW, torch.optim.AdamW), (torch.optim.AdamW, A.AdamW), (A.AdamW, A.AdamW), (A.AdamW8bit, A.AdamW8bit)])
@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_resumes(monkeypatch, source, target, kind):
    """Saved and loaded (weights_only) into the other class, both go on alike: bit for bit within a class."""
    monkeypatch.setattr(A, "KERNELS", kind)
    params, optimizer = train(source, steps=2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [p.detach().clone().requires_grad_() for p in params]
    loaded = target([dict(params=again[:1]), dict(params=again[1:])])
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert [g["lr"] for g in loaded.param_groups] == [g["lr"] for g in optimizer.param_groups]
    for ps, opt in ((params, optimizer), (again, loaded)):
        torch.manual_seed(1)
        noise(ps, opt, 1)
    for p, q in zip(params, again):
        assert torch.equal(p, q) if source is target else torch.allclose(p, q, atol=2e-6, rtol=2e-6)
        for name, t in optimizer.state.get(p, {}).items():
            other = loaded.state[q][name]
            assert t.dtype == other.dtype
            assert torch.equal(t, other) if source is target else torch.allclose(t, other, atol=2e-6)


def test_load_copies_and_refuses():
    params, optimizer = train(A.AdamW8bit)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    other = A.AdamW8bit([dict(params=params[:1]), dict(params=params[1:])])
    other.load_state_dict(saved)
    noise(params, other, 1)
    assert all(torch.equal(t, before[i][name]) for i, s in saved["state"].items() for name, t in s.items())
    groups = [dict(params=params[:1]), dict(params=params[1:])]
    with pytest.raises(ValueError, match="AdamW: states of parameter 0"):
        A.AdamW(groups).load_state_dict(saved)
    with pytest.raises(ValueError, match="amsgrad"):
        A.AdamW(groups).load_state_dict(torch.optim.AdamW(groups, amsgrad=True).state_dict())
    with pytest.raises(ValueError, match="lr cannot be -1"):
        A.AdamW(groups, lr=-1)
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        A.AdamW([p]).step()


def test_closure():
    p = torch.ones(3, requires_grad=True)
    optimizer = A.AdamW([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3 and optimizer.step(closure) < 3


@pytest.mark.parametrize("Optimizer", [A.AdamW, A.AdamW8bit])
def test_dry_run(Optimizer):
    """Fake CUDA tensors (no GPU): states can be sized before anything is allocated."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(), triton_form():
        p = torch.empty(100, 100, device="cuda").requires_grad_()
        p.grad = torch.empty_like(p)
        optimizer = Optimizer([p])
        optimizer.step()
        assert nbytes(*optimizer.state[p].values()) == 4 + (80000 if Optimizer is A.AdamW else 20000 + 2 * 40 * 4)


def test_opcheck():
    torch.library.opcheck(A.adamw_op, (*(torch.rand(300) for _ in range(4)), torch.tensor(1.0), *HYPER))
    torch.library.opcheck(A.adamw8bit_op, (*states(300, torch.float32), torch.tensor(1.0), *HYPER))


# ---------------------------------------------------------------- 8 bits
@triton.jit
def code_kernel(X, K, Y, N: tl.constexpr):
    o = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(K + o, A.encode(tl.load(X + o), N))
    tl.store(Y + o, A.decode(tl.load(K + o), N))


@pytest.mark.parametrize("signed", [True, False])
def test_map_and_codes(signed):
    values = A.dynamic_map(signed)
    assert len(values) == 256 and (values[1:] > values[:-1]).all() and values[-1] == 1 and (values == 0).sum() == 1
    assert torch.equal(values[:127], -values[128:255].flip(0)) if signed else values[0] == 0
    top, least = (0.1 + 0.9 * 63.5 / 64, 0.55e-6) if signed else (0.1 + 0.9 * 127.5 / 128, 0.325e-6)
    assert values[254] == torch.tensor(top) and values[128 if signed else 1] == torch.tensor(least)

    # blocks with magnitudes over twelve decades, all values of the map, and one whole block of zeros
    torch.manual_seed(0)
    x = torch.randn(64 * 256) * 10 ** (12 * torch.rand(64 * 256) - 12)
    x = torch.cat([x, values, torch.zeros(256)])
    x = x if signed else x.abs()
    codes, scales = A.quantize_ref(x, signed)
    got, got_scales = A.quantize_torch(x.clone().view(-1, 256), signed)
    assert torch.equal(scales, got_scales)
    assert torch.equal(codes[-512:-256], torch.arange(256).clamp(min=0 if signed else 1).to(torch.uint8))
    assert torch.equal(A.dequantize_ref(codes, scales, signed)[-256:], torch.zeros(256))
    differ = (codes != got.view(-1)).nonzero()[:, 0]  # ties, which fp32 and fp64 round differently
    assert len(differ) <= 3 and (codes.int() - got.view(-1).int()).abs().max() <= 1

    # no 16-bit cell of the table holds two boundaries of the map
    _, table, _ = A.tables(signed, torch.device("cpu"))
    lowest = torch.arange(0x3F80).to(torch.int32) << 16  # 0 ... 1
    ends = (lowest | 0xFFFF).view(torch.float32)
    boundary = (values[1:] + values[:-1]) / 2
    assert (torch.searchsorted(boundary, ends) - table[:0x3F80].int() <= 1).all()

    # Triton's arithmetic, on magnitudes
    a = (x / scales.repeat_interleave(256).clamp(min=1e-38)).abs().view(-1)[:16 * 1024]
    k, y, n = torch.empty(a.shape, dtype=torch.int32), torch.empty_like(a), 1 if signed else 2
    code_kernel[(16,)](a, k, y, N=n)
    zero = 127 if signed else 0
    want = torch.searchsorted(boundary, a).int() - zero
    assert (k != want).sum() <= 3 and (k - want).abs().max() <= 1
    torch.testing.assert_close(y, values[k + zero], atol=0, rtol=3e-7)


def states(n, dtype):
    p, g, m = torch.randn(n), torch.randn(n) * torch.rand(n) ** 4, torch.randn(n) * torch.rand(n) ** 4
    return [p.to(dtype), g.to(dtype), *A.quantize_ref(m, True), *A.quantize_ref(torch.rand(n) ** 8, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 255, 4096, 5001])
def test_8bit_forms_agree(monkeypatch, n, dtype):
    """ref, torch (in chunks of 2048 here) and Triton from one state: scales, codes up to rounding ties, parameters."""
    monkeypatch.setattr(A, "CHUNK", 2048)
    torch.manual_seed(n)
    start = states(n, dtype)
    out = {}
    for kind in ("ref", "torch", "triton"):
        monkeypatch.setattr(A, "KERNELS", kind)
        out[kind] = [t.clone() for t in start]
        if kind == "triton":
            with count(poison=True) as t:
                A.adamw8bit_op(*out[kind], torch.tensor(2.0), *HYPER)
            assert t.kernels and not t.faults, t.faults
        else:
            A.adamw8bit_op(*out[kind], torch.tensor(2.0), *HYPER)
    for kind in ("torch", "triton"):
        for name, got, want in zip(("p", "g", "m", "m_scale", "v", "v_scale"), out[kind], out["ref"]):
            if name in ("m", "v"):
                far = (got.int() - want.int()).abs()
                assert far.max() <= 1 and far.sum() <= 1 + n / 1000, (kind, name, far.sum())
            else:
                tol = dict(atol=1e-6, rtol=1e-6) if got.dtype == torch.float32 else dict(atol=0, rtol=1e-2)
                torch.testing.assert_close(got, want, msg=lambda text: f"{kind} {name}: {text}", **tol)


def test_8bit_strided_parameter():
    p = torch.randn(80, 64)
    q = p.T.contiguous().T  # the same values in another order
    for t in (p, q):
        t.requires_grad_()
        t.grad = torch.ones_like(t) * torch.arange(64)
        A.AdamW8bit([t]).step()
    assert torch.equal(p, q) and not q.is_contiguous()


def test_v_is_never_rounded_to_zero():
    """One tiny gradient beside large ones, then none: without v's smallest code the next step would be lr m / eps."""
    p = torch.zeros(4096, requires_grad=True)
    optimizer = A.AdamW8bit([p], lr=1e-3, weight_decay=0.0)
    for scale in (1.0, 0.0):
        p.grad = torch.full((4096,), scale)
        p.grad[0] = scale * 1e-4
        optimizer.step()
    assert p.detach().abs().max() < 3e-3


def fit(Optimizer):
    """200 steps of a two-layer regression (12,800 weights in one tensor) -> loss, optimizer."""
    torch.manual_seed(0)
    x = torch.randn(2048, 64)
    y = torch.sin(x @ torch.randn(64, 4) / 4) + 0.3 * torch.randn(2048, 4)
    model = torch.nn.Sequential(torch.nn.Linear(64, 200), torch.nn.Tanh(), torch.nn.Linear(200, 4))
    optimizer = Optimizer(model.parameters(), lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item(), optimizer


def test_8bit_trains_like_fp32():
    loss32, _ = fit(A.AdamW)
    loss8, optimizer = fit(A.AdamW8bit)
    print(f"loss after 200 steps: fp32 {loss32:.3e}, 8 bits {loss8:.3e}")
    assert loss8 <= 1.1 * loss32 < 0.1 and loss8 != loss32
    bits = [s for s in optimizer.state.values() if "exp_avg_scale" in s]
    assert [s["exp_avg"].numel() for s in bits] == [12800]  # the biases and the second layer keep full states
    per_parameter = sum(nbytes(*s.values()) for s in bits) / 12800
    print(f"state bytes per parameter: {per_parameter:.4f}")
    assert per_parameter <= 2.04


# ---------------------------------------------------------------- machine code
def launches():
    for dtype in (torch.float32, torch.bfloat16):
        for n in (1 << 20, 4099) if dtype == torch.float32 else (1 << 20,):
            p = torch.empty(n, dtype=dtype)
            m, scale = torch.empty(n, dtype=torch.uint8), torch.empty(-(-n // 256))
            A.adamw_op(p, p.clone(), p.clone(), p.clone(), torch.tensor(1.0), *HYPER)
            A.adamw8bit_op(p, p.clone(), m, scale, m.clone(), scale.clone(), torch.tensor(1.0), *HYPER)


def test_compiles():
    for r in check_compiles("test_adamw", "launches"):
        print({k: r.get(k) for k in ("kernel", "arch", "regs", "smem", "spills", "occupancy", "grid")})


def test_no_launch_depends_on_lr_or_step():
    """The kernels' scalars are run-time arguments: none is a constexpr, so nothing recompiles from step to step."""
    for kernel, constexprs in ((A.adamw_kernel, {"BN"}), (A.adamw8bit_kernel, {"ROWS", "BLOCK"})):
        assert set(kernel.fn.__annotations__) == constexprs


# ---------------------------------------------------------------- traffic
def test_traffic():
    p, g, m, v = (torch.rand(10000) for _ in range(4))
    print("adamw", check_traffic(lambda: A.adamw_op(p, g, m, v, torch.tensor(1.0), *HYPER), 28 * 10000, 1.1))
    s = states(10000, torch.float32)
    floor = nbytes(*s) + nbytes(*s) - nbytes(s[1])
    print("adamw8bit", floor / 10000, check_traffic(lambda: A.adamw8bit_op(*s, torch.tensor(1.0), *HYPER), floor, 1.1))


def bench_cases():
    n = 1 << 16
    p, g, m, v = (torch.rand(n) for _ in range(4))
    s = states(n, torch.float32)
    one = torch.tensor(1.0)
    return [(f"adamw fp32 {n}", lambda: A.adamw_op(p, g, m, v, one, *HYPER), None, 28 * n, 0),
            (f"adamw8bit {n}", lambda: A.adamw8bit_op(*s, one, *HYPER), None, 2 * nbytes(*s) - nbytes(g), 0)]
