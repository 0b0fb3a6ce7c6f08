"""kernels/nf4.py: bitsandbytes' bytes, numerics, traffic and machine code of the kernels, and the ops in PyTorch."""
import hashlib

import kernelcheck as K
import pytest
import torch

from kernels import nf4

FORMS = ("ref", "torch", "triton")
KEYS = ("packed", "absmax", "nested", "offset")


def weight(*shape, dtype=torch.float32):
    """Normal numbers; one block is all zeros, one holds its largest twice with both signs."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if w.numel() > 192:
        w.view(-1)[64:128] = 0
        w.view(-1)[130:132] = torch.tensor([5.0, -5.0])
    return w.to(dtype)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    monkeypatch.setattr(nf4, "KERNELS", request.param)
    return request.param


def digest(q):
    return [hashlib.sha256(q[k].numpy().tobytes()).hexdigest()[:16] for k in ("packed", "nested")]


# bitsandbytes 0.50.2, functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True, blocksize=64) on a CPU
RECORDED = {
    20480: ["43631e2030dcd5ee", "538aa6f6dc3ea480"],
    300: ["8a0dea81ef3e1ef8", "27f386ed49a5064b"],
    64: ["b5585cb17e56cf9e", "df3f619804a92fdb"],
}


def integers(n):
    """The same numbers everywhere, without a generator."""
    i = torch.arange(n, dtype=torch.int64)
    return ((i * 2654435761 % 4294967296).float() / 2**31 - 1) * (1 + (i // 64 % 37).float())


@pytest.mark.parametrize("n", [320 * 64, 300, 64])
def test_bytes_are_those_of_bitsandbytes(form, n):
    """Packed levels and the scales of the second quantisation, as recorded."""
    q = nf4.quantize_nf4(integers(n))
    assert digest(q) == RECORDED[n]
    assert q["packed"].shape == (n // 2, 1) and q["absmax"].dtype == torch.uint8


def test_against_bitsandbytes(form):
    """Where it is installed: random weights in three dtypes, a last block that is not full, with and without nesting.
    Its CPU library finds a code through a table of 2^16 cells of [-1, 1], its GPU kernels and this file by comparing
    with the midpoints: codes differ only where a / s is nearer to a midpoint than half a cell."""
    F = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(F.create_dynamic_map(), nf4.dynamic_map())
    for w in (weight(96, 320), weight(48, 64, dtype=torch.bfloat16), weight(7, 25),
              weight(33, 64, dtype=torch.float16)):
        for double in (True, False):
            packed, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=double, blocksize=64)
            q = nf4.quantize_nf4(w, double)
            assert torch.equal(q["packed"], packed)
            if not double:
                assert torch.equal(q["absmax"], state.absmax)
                continue
            assert torch.equal(q["nested"], state.state2.absmax) and torch.equal(q["offset"], state.offset)
            a = nf4.quantize_nf4(w, False)["absmax"] - q["offset"]
            a = a / q["nested"].repeat_interleave(256)[: len(a)]
            middle = (nf4.dynamic_map()[1:] + nf4.dynamic_map()[:-1]) / 2
            clear = (a[:, None] - middle).abs().amin(1) > 2**-16
            assert clear.sum() > 0.8 * len(a) and torch.equal(q["absmax"][clear], state.absmax[clear])
            q["absmax"] = state.absmax
            if w.dtype == torch.float32 and w.shape[1] % 64 == 0:
                assert torch.equal(nf4.dequantize_nf4(q), F.dequantize_4bit(packed, state))


def test_round_trip(form):
    """RMS error 0.09 of a normal weight's; zeros stay zero; without nesting the largest of a block is exact."""
    w = weight(128, 128)
    for double in (True, False):
        got = nf4.dequantize_nf4(nf4.quantize_nf4(w, double))
        assert 0.085 < ((got - w).square().mean().sqrt() / w.std()).item() < 0.1
    blocks = lambda t: t.view(-1, 64)
    top = blocks(w).abs().argmax(1, keepdim=True)
    assert torch.equal(blocks(got).gather(1, top), blocks(w).gather(1, top)) and (blocks(got)[1] == 0).all()
    q = nf4.quantize_nf4(w)
    assert abs((sum(q[k].nbytes for k in KEYS) - 4) * 8 / w.numel() - 4.127) < 0.001


def test_forms_agree(form):
    """Every form decodes the same bytes to the same weight, in any dtype, for sizes that no block divides."""
    for w in (weight(96, 192), weight(5, 13), weight(3, 64)):
        for double in (True, False):
            q = nf4.quantize_nf4_ref(w, double)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert torch.equal(nf4.dequantize_nf4(q, dtype), nf4.dequantize_nf4_ref(q, dtype))


# rows decoded in registers, and more; N and K that no block divides; one block of K
SHAPES = [(1, 40, 64), (5, 33, 192), (16, 70, 128), (17, 33, 64), (3, 6, 50)]


def linear(x, q):
    return nf4.nf4_linear(x, q)


@pytest.mark.parametrize("double", [True, False])
def test_linear_numerics(double):
    """Output and dx in the interpreter against the definition, whose W' is rounded to x's dtype as well."""
    for M, N, Kin in SHAPES:
        q = nf4.quantize_nf4_ref(weight(N, Kin), double)
        x = torch.randn(M, Kin, dtype=torch.float64).requires_grad_()
        K.check_numerics(lambda x: nf4.nf4_linear(x, q), lambda x: nf4.nf4_linear_ref(x, q), [(x,)])
    x = torch.randn(Kin, 2, 3, dtype=torch.float64).permute(1, 2, 0).requires_grad_()  # (2, 3, K), not contiguous
    K.check_numerics(lambda x: nf4.nf4_linear(x, q), lambda x: nf4.nf4_linear_ref(x, q), [(x,)])


def test_quantize_in_the_interpreter():
    """No access outside a tensor, nothing unwritten."""
    for w in (weight(96, 64), weight(5, 13)):
        with K.count(poison=True) as t:
            q = nf4.quantize_nf4(w)
            back = nf4.dequantize_nf4(q)
        assert not t.faults and len(t.kernels) == 2
        want = nf4.quantize_nf4_ref(w)
        assert all(torch.equal(q[k], want[k]) for k in KEYS) and torch.equal(back, nf4.dequantize_nf4_ref(want))


def test_backward_keeps_no_weight(form):
    """Between forward and backward nothing of the weight's size is held; autocast, checkpointing and compile work."""
    q = nf4.quantize_nf4_ref(weight(128, 256))
    x = torch.randn(2, 4, 256, requires_grad=True)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        y = nf4.nf4_linear(x, q)
    if form != "ref":
        assert all(t.numel() <= 128 * 256 // 2 for t in held)
    want = torch.autograd.grad(nf4.nf4_linear_ref(x, q).square().sum(), x)[0]
    f = lambda x: nf4.nf4_linear(x, q).square().sum()
    checkpointed = torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False)
    for out in (y.square().sum(), checkpointed, torch.compile(f, fullgraph=True, backend="aot_eager")(x)):
        torch.testing.assert_close(torch.autograd.grad(out, x)[0], want, atol=1e-3, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        y = nf4.nf4_linear(x, q)
    assert y.dtype == torch.bfloat16 and torch.autograd.grad(y.sum(), x)[0].dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(\.\.\., 256\) expected"):
        nf4.nf4_linear(x[..., :5], q)


def test_registration():
    q = nf4.quantize_nf4_ref(weight(40, 64))
    args = [q[k] for k in KEYS]
    torch.library.opcheck(nf4.quantize_op, (weight(40, 64),))
    torch.library.opcheck(nf4.dequantize_op, (*args, [40, 64], torch.bfloat16))
    torch.library.opcheck(nf4.linear_op, (torch.randn(3, 64, requires_grad=True), *args, 40))
    with K.triton_form(), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        q = nf4.quantize_nf4(torch.empty(40, 64))
        assert (nf4.dequantize_nf4(q, torch.bfloat16).shape == (40, 64)
                and nf4.nf4_linear(torch.empty(3, 64), q).shape == (3, 40))


# ------------------------------------------------------- machine code
def launches():
    """A 7B model's widest layer; its ragged cousins; fp32; both scales."""
    for dtype, N, Kin, double in ((torch.bfloat16, 11008, 4096, True), (torch.float32, 4096, 4096, True),
                                  (torch.float16, 77, 192, False), (torch.bfloat16, 33, 65, True)):
        blocks = -(-N * Kin // 64)
        code, s = torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // 256))
        scale = (code, s, torch.empty(())) if double else (torch.empty(blocks), None, None)
        packed = torch.empty((N * Kin + 1) // 2, 1, dtype=torch.uint8)
        nf4.dequantize_op(packed, *scale, [N, Kin], dtype)
        nf4.linear_op(torch.empty(16, Kin, dtype=dtype), packed, *scale, N)
        if dtype == torch.bfloat16:
            nf4.quantize_op(torch.empty(N, Kin, dtype=dtype))


def test_compiles():
    for r in K.check_compiles("test_nf4", "launches"):
        print({k: r.get(k) for k in ("kernel", "arch", "regs", "smem", "spills", "occupancy", "tensor", "grid")})


# ------------------------------------------------------- traffic
def case(M, N, Kin):
    """-> x, q, and the floors of the product and of decoding W'. Each 32 columns of y read x again."""
    q = nf4.quantize_nf4_ref(weight(N, Kin))
    x = torch.randn(M, Kin).bfloat16().requires_grad_()
    stored = K.nbytes(*(q[k] for k in KEYS))
    return x, q, stored + -(-N // 32) * K.nbytes(x) + M * N * 2, stored + N * Kin * 2


def test_traffic():
    x, q, product, decode = case(4, 64, 512)
    w = weight(64, 512, dtype=torch.bfloat16)
    # 1.06: MAP's 4 bytes and s's 4 for each 64 weights. In linear_kernel they meet 32 bytes, not 160; a cache has both
    print("dequantize", K.check_traffic(lambda: nf4.dequantize_nf4(q, torch.bfloat16), decode, 1.06))
    print("linear", K.check_traffic(lambda: nf4.nf4_linear(x, q), product, 1.06, once=True))
    print("linear, as issued", K.check_traffic(lambda: nf4.nf4_linear(x, q), product, 1.25))
    print("quantize", K.check_traffic(lambda: nf4.quantize_op(w), K.nbytes(w) + w.numel() // 2 + w.numel() // 16, 1.06))


def bench_cases():
    x, q, product, decode = case(4, 128, 1024)
    backward = lambda y: torch.autograd.grad(y, x, torch.ones_like(y))
    w = weight(128, 1024, dtype=torch.bfloat16)
    return [("nf4_linear 4x1024 -> 128", lambda: nf4.nf4_linear(x, q), backward, product,
             decode + K.nbytes(x) + 4 * 128 * 2 + 128 * 2048),
            ("dequantize_nf4 128x1024", lambda: nf4.dequantize_nf4(q, torch.bfloat16), None, decode, None),
            ("quantize_nf4 128x1024", lambda: nf4.quantize_op(w), None,
             K.nbytes(w) + w.numel() // 2 + w.numel() // 16, None)]
