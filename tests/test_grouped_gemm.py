"""kernels/grouped_gemm.py: numerics, traffic, machine code (kernelcheck.py), the plain form, the op in PyTorch."""
import kernelcheck as K
import pytest
import torch

from kernels import grouped_gemm as gg

RAGGED = [0, 3, 0, 40, 1]  # choices of each expert: two have none, one has more than a tile holds


def inputs(N, top, C, F, E, sizes=None, dtype=torch.float64, act="silu"):
    """x, w13, w2, chosen, weights, act. sizes: the choices that each expert gets, N top in all."""
    g = torch.Generator().manual_seed(N + C)
    rand = lambda *s: torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    if sizes:  # a token's choices may then be the same expert twice, which the op does not mind
        chosen = (torch.arange(E).repeat_interleave(torch.tensor(sizes))[torch.randperm(N * top, generator=g)]
                  .view(N, top))
    else:
        chosen = torch.rand(N, E, generator=g).topk(top).indices
    return rand(N, C), rand(E, 2 * F, C), rand(E, C, F), chosen, rand(N, top), act


@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_numerics(act):
    cases = [inputs(1, 1, 5, 3, 1, act=act), inputs(22, 2, 33, 20, 5, RAGGED, act=act)]
    if act == "silu":  # several column tiles and k blocks, all choices on one expert; K = E; x and w2 not contiguous
        x, w13, w2, chosen, weights, _ = inputs(6, 3, 40, 24, 3)
        cases += [inputs(35, 2, 70, 36, 3, [0, 70, 0]), inputs(70, 1, 144, 16, 2),  # small tiles; the usual ones
                  (x.detach().t().contiguous().t().requires_grad_(), w13,
                   w2.detach().mT.contiguous().mT.requires_grad_(), chosen, weights, act)]
    # a rounding error in w1 x passes through act and a product: fp16 and bf16 have three roundings on the way to dw13
    tol = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}
    K.check_numerics(gg.expert_mlp, gg.expert_mlp_ref, cases, tol=tol)


def traffic_case(N, top, C, F, E):
    x, w13, w2, chosen, weights, act = inputs(N, top, C, F, E, dtype=torch.bfloat16)
    weights = weights.detach().float().requires_grad_()
    dy, wrt = torch.randn(N, C).bfloat16(), (x, w13, w2, weights)
    saved = 2 * N * top * 2 * F  # bytes of w1 x and w3 x
    forward = lambda: gg.expert_mlp(x, w13, w2, chosen, weights, act)
    backward = lambda y: torch.autograd.grad(y, wrt, dy)
    return forward, backward, K.nbytes(*wrt, chosen, x) + saved, K.nbytes(dy, *wrt, *wrt) + saved


def test_traffic():
    """Each address once a launch: h and y between the products, written and read, are what is above the floor, and in
    backward d, p h, (da, db) and the choices' dx."""
    forward, backward, floor, floor_bwd = traffic_case(192, 2, 64, 128, 4)
    out = []
    print(K.check_traffic(lambda: out.append(forward()), floor, 2.0, once=True),
          K.check_traffic(lambda: backward(out[0]), floor_bwd, 3.4, once=True))


def bench_cases():
    return [("expert_mlp 8 experts, top 2, (512, 256), F = 256", *traffic_case(512, 2, 256, 256, 8))]


def launches():
    """The usual sizes, and widths that 16 does not divide; bf16, fp16, fp32."""
    for C, F, dtype, act in ((768, 1024, torch.bfloat16, "silu"), (768, 1024, torch.bfloat16, "gelu"),
                             (100, 90, torch.bfloat16, "silu"), (768, 1024, torch.float16, "silu"),
                             (768, 1024, torch.float32, "silu")):
        x, w13, w2 = (torch.empty(s, dtype=dtype, requires_grad=True) for s in ((256, C), (8, 2 * F, C), (8, C, F)))
        chosen, weights = torch.zeros(256, 2, dtype=torch.int64), torch.empty(256, 2, requires_grad=True)
        gg.expert_mlp(x, w13, w2, chosen, weights, act).sum().backward()


def test_compiles():
    K.check_compiles("test_grouped_gemm", "launches")


@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_torch_form(act, monkeypatch):
    """The CPU's form equals the definition, outputs and every gradient, also with experts without tokens; gradcheck."""
    for args in (inputs(22, 2, 33, 20, 5, RAGGED, act=act), inputs(1, 2, 8, 4, 4, act=act),
                 inputs(7, 3, 8, 5, 3, act=act)):
        wrt, found = [args[i] for i in (0, 1, 2, 4)], []
        for f in (gg.expert_mlp, gg.expert_mlp_ref):
            y = f(*args)
            found.append([y, *torch.autograd.grad(y.sin().sum(), wrt)])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(lambda *t: gg.expert_mlp(*t[:3], args[3], t[3], act), wrt)
    for dtype, slow, tol in ((torch.bfloat16, False, 2.5e-2), (torch.float32, False, 1e-5),
                             (torch.float32, True, 1e-5)):
        monkeypatch.setattr(gg, "MKL_IS_SLOW", slow)
        x, w13, w2, chosen, weights, _ = inputs(22, 2, 33, 20, 5, RAGGED, dtype, act)
        found = []
        for f in (gg.expert_mlp, gg.expert_mlp_ref):  # for oneDNN an expert's rows are filled up: that must not be seen
            y = f(x, w13, w2, chosen, weights.float(), act)
            assert y.dtype == dtype
            found.append([y, *torch.autograd.grad(y, [x, w13, w2, weights], torch.ones_like(y))])
        for a, b in zip(*found):
            assert (a - b).norm() < tol * b.norm()


def test_registration(monkeypatch):
    """opcheck; one graph under torch.compile; fake CUDA tensors; checkpointing; autocast; results repeat; no tokens."""
    monkeypatch.setattr(gg, "KERNELS", "triton")
    x, w13, w2, chosen, weights, act = inputs(9, 2, 16, 8, 3, dtype=torch.float32)
    torch.library.opcheck(gg.expert_mlp_op, (x, w13, w2, chosen, weights, act, True))
    wrt = (x, w13, w2, weights)
    run = lambda f: torch.autograd.grad(f(x, w13, w2, weights).sum(), wrt)
    op = lambda x, w13, w2, weights: gg.expert_mlp(x, w13, w2, chosen, weights, act)
    want = run(op)
    assert all(torch.equal(a, b) for a, b in zip(run(op), want))
    for f in (torch.compile(op, fullgraph=True, backend="aot_eager"),
              lambda *a: torch.utils.checkpoint.checkpoint(op, *a, use_reentrant=False)):
        for a, b in zip(run(f), want):
            torch.testing.assert_close(a, b)
    with torch._subclasses.FakeTensorMode():  # forward only: PyTorch without CUDA has no autograd for its tensors
        fake = [torch.empty(t.shape, device="cuda", dtype=t.dtype) for t in (x, w13, w2, chosen, weights)]
        assert gg.expert_mlp(*fake).shape == x.shape
    with torch.autocast("cpu", torch.bfloat16):
        y = op(*wrt)
        assert y.dtype == torch.bfloat16 and torch.autograd.grad(y.sum(), w13)[0].dtype == torch.float32
    none = gg.expert_mlp(x[:0], w13, w2, chosen[:0], weights[:0])
    assert none.shape == (0, 16) and torch.autograd.grad(none.sum(), w13)[0].abs().sum() == 0


def test_plain_form_in_pytorch():
    """Without Triton: fake tensors on any device (memory plan), autocast, checkpointing; what is wrong is refused."""
    x, w13, w2, chosen, weights, act = inputs(9, 2, 16, 8, 3, dtype=torch.float32)
    op = lambda *t: gg.expert_mlp(*t[:3], chosen, t[3], act)
    want = torch.autograd.grad(op(x, w13, w2, weights).sum(), w13)[0]
    again = torch.utils.checkpoint.checkpoint(op, x, w13, w2, weights, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), w13)[0], want)
    with torch._subclasses.FakeTensorMode():
        fake = [torch.empty(t.shape, dtype=t.dtype, requires_grad=t.is_floating_point())
                for t in (x, w13, w2, chosen, weights)]
        gg.expert_mlp(*fake).sum().backward()
        assert fake[1].grad.shape == w13.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert gg.expert_mlp(x, w13, w2, chosen, weights).dtype == torch.bfloat16
    for args, said in (((x, w13[:, 1:], w2, chosen, weights), "shapes"),
                       ((x, w13, w2, chosen, weights[1:]), "shapes"),
                       ((x, w13, w2, chosen, weights, "relu"), "act 'relu'"),
                       ((x.bfloat16(), w13, w2, chosen, weights), "one dtype")):
        with pytest.raises(ValueError, match=said):
            gg.expert_mlp(*args)
