"""kernels/attention.py: numerics, traffic, FLOPs and machine code (kernelcheck.py), and how the op sits in PyTorch."""
import kernelcheck as K
import pytest
import torch

from kernels import attention as A


def case(B, H, Hkv, Tq, Tk, D, **options):
    torch.manual_seed(0)
    r = lambda heads, T: torch.randn(B, heads, T, D, dtype=torch.float64).requires_grad_()
    return (r(H, Tq), r(Hkv, Tk), r(Hkv, Tk)), options


CASES = {
    "odd length, odd head size": case(1, 1, 1, 63, 63, 24),
    "one past a block": case(2, 1, 1, 65, 65, 16),
    "small head, grouped": case(1, 4, 2, 33, 33, 8),
    "prefill behind a cache": case(1, 2, 1, 3, 70, 16),
    "decoding": case(2, 2, 1, 1, 50, 32),
    "cross": case(1, 2, 2, 7, 33, 16, causal=False),
    "cross, more queries": case(1, 1, 1, 70, 5, 16, causal=False, scale=0.3),
    "soft cap": case(1, 2, 1, 35, 35, 16, softcap=2.0),
    "soft cap, cross": case(1, 1, 1, 5, 40, 16, causal=False, softcap=2.0),
    "wide head": case(1, 1, 1, 33, 33, 80),
}


@pytest.mark.parametrize("name", CASES)
def test_numerics(name):
    with K.triton_form():
        K.check_numerics(A.attention, A.attention_ref, [CASES[name]])


def test_one_token():
    with K.triton_form():  # p = 1 and ds cancels to 0: what is left of dq and dk is rounding, hence the floor
        K.check_numerics(A.attention, A.attention_ref, [case(1, 1, 1, 1, 1, 16)], floor=0.1)


def packed(B, T, H, D, dtype):
    torch.manual_seed(0)
    qkv = torch.randn(B, T, 3, H, D).to(dtype).requires_grad_()
    return qkv, [x.transpose(1, 2) for x in qkv.unbind(2)]  # views (B, H, T, D)


def test_packed():
    """Views of one (B, T, 3, H, D) tensor are read in place, o reshapes for free, and results repeat bit for bit."""
    qkv, (q, k, v) = packed(1, 40, 2, 32, torch.float32)
    do = torch.randn(1, 40, 64)
    with K.triton_form():
        with K.count() as t:
            o = A.attention(q, k, v)
        assert not t.faults and t.torch_bytes == 0
        y = o.transpose(1, 2).reshape(1, 40, 64)
        assert y.data_ptr() == o.data_ptr()
        first, = torch.autograd.grad(y, qkv, do, retain_graph=True)
        again, = torch.autograd.grad(y, qkv, do)
        assert torch.equal(first, again) and torch.equal(o, A.attention(q, k, v))
    want, = torch.autograd.grad(A.attention_ref(q, k, v), qkv, do.view(1, 40, 2, 32).transpose(1, 2))
    torch.testing.assert_close(first, want, rtol=1e-4, atol=1e-5)


def seen_keys(kernel, q, Tq, Tk, causal):
    """Summed over the blocks: rows of the other side that one reads; causal: up to its end (dkv: from its start)."""
    how = A.config(kernel, q)
    if kernel == "dkv":
        return sum(Tq - max(0, n - (Tk - Tq)) if causal else Tq for n in range(0, Tk, how["BN"]))
    return sum(min(Tk, m + how["BM"] + Tk - Tq) if causal else Tk for m in range(0, Tq, how["BM"]))


def floors(q, k, causal):
    """FlashAttention-2's own traffic (forward, backward) at these block sizes: attention.py's docstring."""
    (B, H, Tq, D), (_, Hkv, Tk, _), e = q.shape, k.shape, q.element_size()
    forward = e * D * (2 * Tq + 2 * seen_keys("fwd", q, Tq, Tk, causal)) + 4 * Tq
    dq = e * D * (4 * Tq + 2 * seen_keys("dq", q, Tq, Tk, causal)) + 8 * Tq
    queries = seen_keys("dkv", q, Tq, Tk, causal)
    dkv = e * D * (4 * Tk * Hkv / H + 2 * queries) + 8 * queries
    return B * H * forward, B * H * (dq + dkv)


def traffic_case(causal):
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in case(1, 2, 1, 256, 256, 64)[0])
    do = torch.randn(1, 256, 2, 64).bfloat16().transpose(1, 2)
    forward = lambda: A.attention(q, k, v, causal)
    return forward, lambda out: torch.autograd.grad(out, (q, k, v), do), *floors(q, k, causal)


def bench_cases():
    """Against FlashAttention-2's own traffic at these block sizes, not each input once."""
    return [(f"attention (1, 2, 256, 64), {'causal' if causal else 'full'}, floor of FlashAttention-2",
             *traffic_case(causal)) for causal in (True, False)]


@pytest.mark.parametrize("causal", (True, False))
def test_traffic(causal):
    forward, backward, floor, floor_bwd = traffic_case(causal)
    out = []
    with K.triton_form():
        ratios = (K.check_traffic(lambda: out.append(forward()), floor, 1.1),
                  K.check_traffic(lambda: backward(out[0]), floor_bwd, 1.1))
    print("causal" if causal else "full", "forward %.3f, backward %.3f x the formula" % ratios)


def test_causal_skips_half():
    """Multiplied pairs: the blocks on and below the diagonal, which at 8 blocks of queries are 9/16 of all."""
    q, k, v = (x.detach().bfloat16() for x in case(1, 1, 1, 512, 512, 64)[0])
    flops = {}
    with K.triton_form():
        for causal in (True, False):
            with K.count() as t:
                A.attention(q, k, v, causal)
            flops[causal] = sum(t.flops.values())
    assert flops[False] == 4 * 64 * 512 * 512
    assert flops[True] / flops[False] == 9 / 16


def launches():
    """Packed views; causal, cross, grouped with a soft cap; a head size that fills its block and one not; decoding."""
    for dtype, D, options in (
        (torch.bfloat16, 64, ((True, 0.0, 1), (False, 0.0, 1))),
        (torch.bfloat16, 80, ((True, 30.0, 2),)),
        (torch.bfloat16, 128, ((True, 0.0, 1),)),
        (torch.float32, 64, ((True, 0.0, 1),)),
        (torch.float32, 128, ((True, 0.0, 1),)),
    ):
        for causal, softcap, G in options:
            qkv = torch.empty(1, 1024, 3, 4, D, dtype=dtype, requires_grad=True)
            q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
            o = A.attention(q, k[:, ::G], v[:, ::G], causal, None, softcap)
            o.backward(torch.empty_like(o))
    q, k = torch.empty(1, 4, 1, 64, dtype=torch.bfloat16), torch.empty(1, 2, 1000, 64, dtype=torch.bfloat16)
    A.attention(q, k, k)


def more_launches():
    """The other combinations, for sm_89 alone."""
    for dtype, D, causal, softcap, G in (
        (torch.bfloat16, 32, True, 30.0, 2),
        (torch.bfloat16, 128, False, 30.0, 2),
        (torch.float16, 64, True, 0.0, 1),
        (torch.float32, 80, True, 30.0, 2),
    ):
        qkv = torch.empty(1, 1000, 3, 4, D, dtype=dtype, requires_grad=True)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        o = A.attention(q, k[:, ::G], v[:, ::G], causal, None, softcap)
        o.backward(torch.empty_like(o))


def test_compiles():
    K.check_compiles("test_attention", "launches")


def test_more_compiles():
    K.check_compiles("test_attention", "more_launches", targets=(89,))


def test_opcheck():
    args = [x.detach().float().requires_grad_() for x in case(1, 2, 1, 5, 9, 16)[0]]
    torch.library.opcheck(A.attention_op, (*args, True, 0.25, 0.0))


def test_fake_and_autocast():
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(), K.triton_form():
        q, k = (torch.empty(2, H, 32, 64, device="cuda", dtype=torch.bfloat16) for H in (4, 2))
        o, lse = A.attention_op(q, k, k, True, 0.125, 0.0)
        assert o.shape == q.shape and o.stride() == (32 * 4 * 64, 64, 4 * 64, 1) and lse.dtype == torch.float32
        grads = A.attention_bwd_op(o, q, k, k, o, lse, True, 0.125, 0.0)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
    args = [x.detach().float() for x in case(1, 1, 1, 5, 5, 16)[0]]
    with torch.autocast("cpu", torch.bfloat16), K.triton_form():
        assert A.attention(*args).dtype == torch.bfloat16


@pytest.mark.parametrize("name", CASES)
def test_torch_form(name):
    """The CPU's form equals the definition, in fp64."""
    args, options = CASES[name]
    got, want = A.attention(*args, **options), A.attention_ref(*args, **options)
    do = torch.randn_like(want)
    for a, b in zip((got, *torch.autograd.grad(got, args, do)), (want, *torch.autograd.grad(want, args, do))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal,T,S,D", [(True, 300, 300, 32), (False, 70, 190, 20), (False, 1, 129, 130),
                                          (True, 192, 192, 64), (True, 257, 257, 48)])
@pytest.mark.parametrize("how", ["loops", "matrix units", "PyTorch"])
def test_on_a_cpu(causal, T, S, D, dtype, how, monkeypatch):
    """Loops in C, with PyTorch's forward, and all PyTorch's: within the dtype's rounding of the definition in fp64,
    for GQA, views of one packed tensor, and sizes that fill no block."""
    if how != "PyTorch" and A.compiled("") is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(A, "compiled", A.compiled if how != "PyTorch" else lambda source: None)
    monkeypatch.setattr(A, "matrix_units", lambda: how == "matrix units")
    A.library.cache_clear()
    g = torch.Generator().manual_seed(T)
    q = torch.randn(3, T, 4, D, generator=g).to(dtype).requires_grad_()
    kv = torch.randn(3, S, 4, D, generator=g).to(dtype).requires_grad_()  # two heads of k, two of v
    do = torch.randn(3, 4, T, D, generator=g).to(dtype)
    views = lambda q, kv: (q.transpose(1, 2), *(t.transpose(1, 2) for t in kv.split(2, 2)))
    got = A.attention(*views(q, kv), causal)
    assert (got.grad_fn.name() == "CompiledBackward") == (how != "PyTorch")
    exact = [t.detach().double().requires_grad_() for t in (q, kv)]
    want = A.attention_ref(*views(*exact), causal)
    for a, b in zip((got, *torch.autograd.grad(got, (q, kv), do)),
                    (want, *torch.autograd.grad(want, exact, do.double()))):
        assert a.dtype == dtype and (a - b).norm() < (6e-3 if dtype == torch.bfloat16 else 2e-6) * b.norm()
    A.library.cache_clear()


def test_ref_is_the_loop():
    (q, k, v), options = case(1, 2, 1, 3, 5, 4, softcap=2.0)
    want = torch.zeros_like(q)
    for h in range(2):
        for i in range(3):
            s = torch.stack([2 * torch.tanh(q[0, h, i] @ k[0, 0, j] / 2 / 2) for j in range(i + 3)])  # scale 1/2, cap 2
            want[0, h, i] = (s.exp() / s.exp().sum()) @ v[0, 0, :i + 3]
    torch.testing.assert_close(A.attention_ref(q, k, v, **options), want)


def test_compile_fullgraph():
    args = [x.detach().float() for x in case(1, 2, 2, 9, 9, 16)[0]]
    got = torch.compile(A.attention, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(got, A.attention_ref(*args), rtol=1e-5, atol=1e-5)


def test_bad_inputs():
    q, k = torch.zeros(1, 3, 4, 16), torch.zeros(1, 2, 4, 16)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        A.attention(q, k, k)
    with pytest.raises(ValueError, match="causal with 4 queries but only 2 keys"):
        A.attention(q, q[:, :, :2], q[:, :, :2])
    with pytest.raises(ValueError, match="float32"), K.triton_form():
        A.attention(q, q.bfloat16(), q.bfloat16())
