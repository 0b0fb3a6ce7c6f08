"""kernels/norm.py: numerics, traffic and machine code of the kernels (kernelcheck.py), and how they sit in PyTorch."""
import contextlib

import kernelcheck as K
import pytest
import torch

from kernels import norm


def add_layer_norm_ref(x, r, w, b=None, eps=1e-5):
    return norm.layer_norm_ref(x + r, w, b, eps), x + r


def add_rms_norm_ref(x, r, w, eps=1e-6):
    return norm.rms_norm_ref(x + r, w, eps), x + r


OPS = {  # name: op, definition, which of (x, r, w, b) it takes
    "layer_norm": (norm.layer_norm, norm.layer_norm_ref, "xwb"),
    "layer_norm without bias": (norm.layer_norm, norm.layer_norm_ref, "xw"),
    "rms_norm": (norm.rms_norm, norm.rms_norm_ref, "xw"),
    "add_layer_norm": (norm.add_layer_norm, add_layer_norm_ref, "xrwb"),
    "add_rms_norm": (norm.add_rms_norm, add_rms_norm_ref, "xrw"),
}
SHAPES = [(1, 3), (2, 3, 33), (67, 64), (40, 257), (2, 768), (1, 4099)]


def inputs(which, shape, dtype=torch.float64):
    torch.manual_seed(0)
    return tuple(torch.randn(shape if n in "xr" else shape[-1], dtype=dtype).requires_grad_() for n in which)


@pytest.mark.parametrize("name", OPS)
def test_numerics(name):
    op, ref, which = OPS[name]
    cases = [inputs(which, shape) for shape in SHAPES]
    x = torch.randn(33, 6, dtype=torch.float64).t().requires_grad_()  # (6, 33), not contiguous
    K.check_numerics(op, ref, cases + [(x, *inputs(which, (6, 33))[1:])])


@pytest.mark.parametrize("name", OPS)
def test_large_mean_and_one_column(name):
    op, ref, which = OPS[name]
    x, *rest = inputs(which, (5, 48))
    far = (x.detach() + 300).requires_grad_()
    K.check_numerics(op, ref, [(far, *rest)], dtypes=(torch.float32,), tol=1e-4)  # x - mean(x) itself loses 2 digits
    K.check_numerics(op, ref, [inputs(which, (3, 1))], floor=0.1)  # C = 1: n is 0 or +-1 and dx cancels to 0


def traffic_case(op, which, args):
    x, weights = args[0], [t for n, t in zip(which, args) if n in "wb"]
    added = "r" in which
    stats = 4 * (2 if op in (norm.layer_norm, norm.add_layer_norm) else 1) * x.shape[0]
    dy, ds = torch.randn(2, *x.shape).to(x.dtype)
    forward = lambda: op(*args)
    backward = lambda out: torch.autograd.grad(out, args, (dy, ds) if added else dy)
    forward_floor = K.nbytes(*args, x) + (K.nbytes(x) if added else 0) + stats  # + y, s
    # dy, x, dx, w; dw, db; ds
    backward_floor = K.nbytes(dy, x, x, weights[0]) + K.nbytes(*weights) + (K.nbytes(dy) if added else 0) + stats
    return forward, backward, forward_floor, backward_floor


# few rows: what does not grow with them (w again for each program, the partial sums of dw) weighs most
@pytest.mark.parametrize("name, w_dtype", [("layer_norm", torch.bfloat16), ("add_rms_norm", torch.float32)])
def test_traffic(name, w_dtype):
    op, _, which = OPS[name]
    args = [t.detach().to(w_dtype if n in "wb" else torch.bfloat16).requires_grad_()
            for n, t in zip(which, inputs(which, (1024, 768)))]
    forward, backward, forward_floor, backward_floor = traffic_case(op, which, args)
    out = []
    print(name, w_dtype, K.check_traffic(lambda: out.append(forward()), forward_floor, 1.1),
          K.check_traffic(lambda: backward(out[0]), backward_floor, 1.1))


def bench_cases():
    cases = []
    for name, (op, _, which) in OPS.items():
        args = [t.detach().bfloat16().requires_grad_() for t in inputs(which, (1024, 768))]
        cases.append((f"{name} (1024, 768)", *traffic_case(op, which, args)))
    return cases + modulate_cases() + group_cases()


def launches():
    """Narrow, usual and the widest rows; the kernels with every pointer (add_layer_norm) need the most registers."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for name, C, dtype, w_dtype in (("add_rms_norm", 64, bf16, bf16), ("layer_norm", 768, bf16, fp32),
                                    ("add_layer_norm", 8192, bf16, bf16), ("add_layer_norm", 768, fp16, fp16),
                                    ("layer_norm", 2000, fp32, fp32), ("add_layer_norm", 8192, fp32, fp32)):
        op, _, which = OPS[name]
        args = [torch.empty((256, C) if n in "xr" else C, dtype=w_dtype if n in "wb" else dtype, requires_grad=True)
                for n in which]
        out = op(*args)
        torch.autograd.grad(out, args, tuple(torch.empty_like(t) for t in out) if "r" in which else out)


def test_compiles():
    K.check_compiles("test_norm", "launches")


@pytest.mark.parametrize("name", OPS)
def test_torch_form(name):
    """The CPU's form equals the definition, also for 16-bit x beside fp32 weights; torch.compile takes it whole."""
    op, ref, which = OPS[name]
    for dtype, w_dtype, tol in ((torch.float64, torch.float64, 1e-12), (torch.float32, torch.float32, 1e-5),
                                (torch.bfloat16, torch.float32, 1e-2), (torch.bfloat16, torch.bfloat16, 2e-2)):
        args = [t.detach().to(w_dtype if n in "wb" else dtype).requires_grad_()
                for n, t in zip(which, inputs(which, (4, 40)))]
        results = []
        for f in (op, torch.compile(op, fullgraph=True, backend="aot_eager"), ref):
            out = f(*args)
            out = out if "r" in which else (out,)
            results.append([*out, *torch.autograd.grad(out, args, [*map(torch.ones_like, out)])])
        for got in results[:2]:
            for a, b in zip(got, results[2]):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("x_type,r_type", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("name", "layer_norm rms_norm add_layer_norm add_rms_norm modulate add_modulate".split())
def test_on_a_cpu(name, x_type, r_type, compiler, monkeypatch):
    """Rows enough for the loop in C, a number of them that threads do not divide: outputs and every gradient against
    fp64, also where only one of two outputs is used, and in plain PyTorch."""
    if compiler and norm.compiled(norm.SOURCE) is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(norm, "compiled", norm.compiled if compiler else lambda source: None)
    g, (B, T, C) = torch.Generator().manual_seed(1), (3, 67, 100)
    added, sample = name.startswith("add"), name.endswith("modulate")
    x, r = (torch.randn(B, T, C, generator=g).to(getattr(torch, t)) for t in (x_type, r_type))
    rest = [torch.randn((B, C) if sample else C, generator=g) for _ in range(2 + (added and sample))]
    if name.endswith("rms_norm"):
        rest = rest[:1]
    args = [t.requires_grad_() for t in ([x, r] if added else [x]) + rest]
    out_type = torch.promote_types(x.dtype, r.dtype) if added else x.dtype
    dy = [torch.randn(B, T, C, generator=g).to(out_type) for _ in range(1 + added)]
    tol = 1e-5 if torch.bfloat16 not in (x.dtype, r.dtype) else 1e-2
    wide = [t.detach().double().requires_grad_() for t in args]
    listed = lambda out: list(out) if added else [out]
    got = listed(getattr(norm, name)(*args))
    stream = wide[0] if not added else wide[0] + (wide[2][:, None] * wide[1] if sample else wide[1])
    ref = [getattr(norm, name.removeprefix("add_") + "_ref")(stream, *wide[-len(rest) + (added and sample):]), stream]
    if compiler and name != "layer_norm":
        assert "CompiledNorm" in got[0].grad_fn.name()
    for used in range(1, 1 + len(got)):
        grads = torch.autograd.grad(got[:used], args, dy[:used], retain_graph=True)
        want = torch.autograd.grad(ref[:used], wide, [d.double() for d in dy[:used]], retain_graph=True)
        assert [t.dtype for t in got] == [out_type] * len(got)
        for a, b, like in zip([*got, *grads], [*ref[:len(got)], *want], [*got, *args]):
            assert a.dtype == like.dtype and (a - b).norm() < tol * b.norm()


def test_shapes_that_do_not_fit_on_a_cpu():
    """The loops in C would read past the end."""
    x, w, rows = torch.zeros(3, 67, 100), torch.zeros(99), torch.zeros(2, 100)
    for call in (lambda: norm.rms_norm(x, w), lambda: norm.add_layer_norm(x, x, w),
                 lambda: norm.add_rms_norm(x, x[:, :1], w.new_zeros(100)), lambda: norm.modulate(x, rows, rows),
                 lambda: norm.group_norm_silu(x[..., None].to(memory_format=torch.channels_last), w, w, 1)):
        with pytest.raises((ValueError, RuntimeError), match="shape|size"):
            call()


@pytest.fixture
def triton_form(monkeypatch):
    monkeypatch.setattr(norm, "KERNELS", "triton")


def test_registration(triton_form):
    """opcheck; one graph under torch.compile; meta and fake CUDA tensors; activation checkpointing; autocast."""
    x, r, w, b = inputs("xrwb", (5, 24), torch.float32)
    for args in ((x, r, w, b, 1e-5, True), (x, None, w, None, 1e-6, False)):
        torch.library.opcheck(norm.norm_op, args)

    def step(x, r, w, b):
        y, s = norm.add_layer_norm(x, r, w, b)
        return norm.rms_norm(y, w) * s

    want = torch.autograd.grad(step(x, r, w, b).sum(), (x, r, w, b))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    checkpointed = lambda *a: torch.utils.checkpoint.checkpoint(step, *a, use_reentrant=False)
    for f in (compiled, checkpointed):
        for got, expected in zip(torch.autograd.grad(f(x, r, w, b).sum(), (x, r, w, b)), want):
            torch.testing.assert_close(got, expected)
    meta = [t.detach().to("meta").requires_grad_() for t in (x, r, w, b)]
    assert [g.shape for g in torch.autograd.grad(step(*meta).sum(), meta)] == [t.shape for t in meta]
    with torch._subclasses.FakeTensorMode():  # forward only: PyTorch without CUDA has no autograd for its tensors
        fake = torch.empty(2, 8, 24, device="cuda", dtype=torch.bfloat16)
        y, s = norm.add_layer_norm(fake, fake, torch.empty(24, device="cuda"))
        assert y.shape == s.shape == fake.shape and y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert norm.layer_norm(x, w, b).dtype == torch.float32


def test_edges(triton_form):
    """Results repeat; an unused output costs nothing; mixed dtypes promote; no rows; what does not fit is refused."""
    x, r, w, b = inputs("xrwb", (70, 40), torch.float32)
    run = lambda: torch.autograd.grad(norm.layer_norm(x, w, b).sum(), (x, w, b))
    assert all(torch.equal(p, q) for p, q in zip(run(), run()))
    y, s = norm.add_rms_norm(x, r, w)
    for out, which in ((y, "y"), (s, "s")):  # only one of the two is used
        got = torch.autograd.grad(out.sum(), (x, r), retain_graph=True)
        want = torch.autograd.grad(add_rms_norm_ref(x, r, w)[which == "s"].sum(), (x, r))
        torch.testing.assert_close(got, want)
    y, s = norm.add_rms_norm(x, r.bfloat16(), w)  # as under autocast: fp32 stream, bf16 branch
    assert y.dtype == s.dtype == torch.float32 and torch.autograd.grad(y.sum() + s.sum(), r)[0].dtype == torch.float32
    assert norm.layer_norm(x[:0], w, b).shape == (0, 40)
    with pytest.raises(ValueError, match="at most 8192"):
        norm.rms_norm(torch.empty(1, 8193), torch.empty(8193))
    with pytest.raises(ValueError, match=r"shapes \[\(70, 40\), \(39,\)\]"):
        norm.rms_norm(x, w[1:])


# ---------------------------------------------------------------- modulation
def modulate_inputs(added, B, T, C, dtype=torch.float64):
    """shift, scale and gate as a model has them: views of one (B, 6, C)."""
    torch.manual_seed(0)
    x, r = torch.randn(2, B, T, C, dtype=dtype).unbind(0)
    six = torch.randn(B, 6, C, dtype=dtype)
    x, r, gate, shift, scale = (t.requires_grad_() for t in (x.clone(), r.clone(), six[:, 2], six[:, 3], six[:, 4]))
    return (x, r, gate, shift, scale) if added else (x, shift, scale)


MODULATE = {"modulate": (norm.modulate, norm.modulate_ref, False),
            "add_modulate": (norm.add_modulate, norm.add_modulate_ref, True)}


@pytest.mark.parametrize("name", MODULATE)
def test_modulate(name):
    op, ref, added = MODULATE[name]
    K.check_numerics(op, ref, [modulate_inputs(added, *shape)
                               for shape in ((1, 1, 3), (3, 5, 33), (2, 67, 64), (2, 9, 257))])


def modulate_cases():
    cases = []
    for name, (op, _, added) in MODULATE.items():
        args = [t.detach().bfloat16().requires_grad_() for t in modulate_inputs(added, 4, 256, 384)]
        x, dy, stats = args[0], torch.randn(args[0].shape).bfloat16(), 4 * 2 * 4 * 256
        forward = lambda op=op, args=args: op(*args)
        backward = lambda out, args=args, dy=dy, added=added: torch.autograd.grad(out, args, (dy, dy) if added else dy)
        forward_floor = K.nbytes(*args, x) + added * K.nbytes(x) + stats  # + y (, s)
        # dy, x, dx, scale, dshift, dscale (; ds, r, dr, gate, dgate)
        backward_floor = K.nbytes(dy, x, x, *[args[-1]] * 3) + added * K.nbytes(dy, x, x, args[-1], args[-1]) + stats
        cases.append((f"{name} (4, 256, 384)", forward, backward, forward_floor, backward_floor))
    return cases


def group_inputs(B, C, *size, dtype=torch.float64, last=False):
    torch.manual_seed(0)
    x = torch.randn(B, C, *size, dtype=dtype) * 2 + 1
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return (x.requires_grad_(), torch.randn(C, dtype=dtype).requires_grad_(),
            torch.randn(C, dtype=dtype).requires_grad_())


@pytest.mark.parametrize("silu", [True, False])
def test_group_norm_silu(silu):
    """Both memory formats, one tile and several, three dimensions, one pixel."""
    cases = []
    for shape, groups, last in (((2, 6, 5, 3), 2, False), ((2, 6, 5, 3), 3, True), ((1, 12, 41, 40), 4, False),
                                ((1, 12, 41, 40), 2, True), ((2, 8, 7), 8, False), ((3, 8, 1, 1), 2, True)):
        cases.append((group_inputs(*shape, last=last), dict(groups=groups, silu=silu)))
    K.check_numerics(norm.group_norm_silu, norm.group_norm_silu_ref, cases)
    x, w, b = group_inputs(2, 8, 6, 6, dtype=torch.float32, last=True)
    far = norm.group_norm_silu_ref((x + 300).double(), w, b, 2).float()
    with K.triton_form():
        y = norm.group_norm_silu(x, w, b, 2)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(norm.group_norm_silu(x + 300, w, b, 2), far, rtol=1e-3, atol=1e-3)
        torch.library.opcheck(norm.group_norm_op, (x, w, b, 2, 1e-5, True))
        m = modulate_inputs(True, 2, 5, 12, torch.float32)
        torch.library.opcheck(norm.modulate_op, (*m, 1e-6))
        with pytest.raises(ValueError, match="3 groups"):
            norm.group_norm_silu(x, w, b, 3)
        with pytest.raises(ValueError, match="modulate: shapes"):
            norm.modulate(m[0], m[2][:1], m[3])


def group_cases():
    """A group in one tile: 8 x 256 numbers."""
    cases = []
    for last in (False, True):
        x, w, b = (t.detach().bfloat16().requires_grad_() for t in group_inputs(2, 64, 16, 16, last=last))
        dy = torch.randn(x.shape).bfloat16().contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format)
        stats = 4 * 2 * 2 * 8
        forward = lambda x=x, w=w, b=b: norm.group_norm_silu(x, w, b, 8)
        backward = lambda out, x=x, w=w, b=b, dy=dy: torch.autograd.grad(out, (x, w, b), dy)
        cases.append((f"group_norm_silu (2, 64, 16, 16){', channels last' * last}", forward, backward,
                      K.nbytes(x, x, w, b) + stats, K.nbytes(dy, x, x, w, b, w, b) + stats))  # fmt: skip
    return cases


def test_image_traffic():
    for name, forward, backward, forward_floor, backward_floor in modulate_cases() + group_cases():
        out = []
        print(name, K.check_traffic(lambda: out.append(forward()), forward_floor, 1.1),
              K.check_traffic(lambda: backward(out[0]), backward_floor, 1.1))
    # several tiles: twice, from the cache
    x, w, b = (t.detach().bfloat16().requires_grad_() for t in group_inputs(1, 32, 48, 48))
    out = []
    print(K.check_traffic(lambda: out.append(norm.group_norm_silu(x, w, b, 4)), K.nbytes(x, x), 1.55),
          K.check_traffic(lambda: torch.autograd.grad(out[0], (x, w, b), x), K.nbytes(x, x, x), 1.75))


def image_launches():
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for added, C, dtype in ((False, 384, bf16), (True, 1152, bf16), (True, 4096, fp32), (True, 1000, fp16)):
        args = [torch.empty(2, 256, C, dtype=dtype, requires_grad=True) for _ in range(1 + added)]
        args += [t.requires_grad_() for t in torch.empty(2, 6, C, dtype=dtype)[:, 3 - added : 5].unbind(1)]
        out = (norm.add_modulate if added else norm.modulate)(*args)
        torch.autograd.grad(out, args, tuple(torch.empty_like(t) for t in out) if added else out)
    for C, side, groups, last, dtype in ((320, 64, 32, False, bf16), (320, 64, 32, True, bf16), (64, 16, 8, True, fp32),
                                         (2560, 8, 32, True, bf16), (128, 32, 32, False, fp32)):
        x = torch.empty(1, C, side, side, dtype=dtype).contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format)
        x, w, b = (t.requires_grad_() for t in (x, *torch.empty(2, C, dtype=dtype)))
        out = norm.group_norm_silu(x, w, b, groups)
        torch.autograd.grad(out, (x, w, b), out)


def test_image_kernels_compile():
    K.check_compiles("test_norm", "image_launches")


@pytest.mark.parametrize("name", MODULATE)
def test_modulate_torch_form(name):
    """The CPU's form, from 16,384 numbers a sample with its own backward, is the definition; 16-bit beside fp32."""
    op, ref, added = MODULATE[name]
    for shape, dtype, tol in (((3, 5, 24), torch.float64, 1e-12), ((2, 130, 128), torch.float32, 1e-5),
                              ((3, 70, 64), torch.bfloat16, 3e-2)):
        args = [t.detach().to(dtype).requires_grad_() for t in modulate_inputs(added, *shape)]
        got, want = op(*args), ref(*args)
        got, want = ((r,) if torch.is_tensor(r) else r for r in (got, want))
        for a, b in zip([*got, *torch.autograd.grad(got, args, [*map(torch.ones_like, got)])],
                        [*want, *torch.autograd.grad(want, args, [*map(torch.ones_like, want)])]):
            assert a.dtype == b.dtype == dtype and (a.double() - b.double()).norm() <= tol * b.double().norm() + tol
    args = [t.detach().to(torch.bfloat16 if i else torch.float32).requires_grad_()
            for i, t in enumerate(modulate_inputs(added, 2, 70, 64))]
    out = op(*args)
    out = out if added else (out,)
    assert all(t.dtype == torch.float32 for t in out)
    assert [g.dtype for g in torch.autograd.grad(out, args, out)] == [t.dtype for t in args]


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_on_a_cpu(dtype, compiler, monkeypatch):
    """Channels last, enough of them for the loop in C: output and gradients against fp64, and in PyTorch."""
    if compiler and norm.compiled(norm.GROUPS) is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(norm, "compiled", norm.compiled if compiler else lambda source: None)
    for silu in (True, False):
        inputs_64 = group_inputs(3, 40, 13, 15, last=True)
        args = [t.detach().to(dtype if i == 0 else torch.float32).requires_grad_() for i, t in enumerate(inputs_64)]
        wide = [t.detach().double().requires_grad_() for t in args]
        got, want = norm.group_norm_silu(*args, 8, silu=silu), norm.group_norm_silu_ref(*wide, 8, silu=silu)
        assert (got.grad_fn.name() == "CompiledGroupNormBackward") == compiler
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
        dy = torch.randn_like(got)
        for a, b in zip([got, *torch.autograd.grad(got, args, dy.contiguous())],
                        [want, *torch.autograd.grad(want, wide, dy.double())]):
            assert (a - b).norm() < (5e-3 if dtype == torch.bfloat16 else 2e-6) * b.norm()


def test_group_norm_torch_form():
    for last in (False, True):
        x, w, b = group_inputs(2, 8, 5, 6, last=last, dtype=torch.float32)
        for silu in (True, False):
            got, want = (f(x, w, b, 4, silu=silu) for f in (norm.group_norm_silu, norm.group_norm_silu_ref))
            assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            for p, q in zip([got, *torch.autograd.grad(got, (x, w, b), got.detach())],
                            [want, *torch.autograd.grad(want, (x, w, b), want.detach())]):
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_runs_on_its_tensors_gpu(monkeypatch):
    """Triton launches on the current GPU, so an op makes that of its tensors the current one."""
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: seen.append(t) or contextlib.nullcontext())
    x, w = torch.randn(3, 8), torch.ones(8)
    with K.triton_form():
        norm.rms_norm(x, w)
    assert len(seen) == 1 and seen[0].data_ptr() == x.data_ptr()


def test_strided_weights_and_no_rows():
    """Weights with strides of their own, and sums over no rows, which are 0."""
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g)[..., 0] for s in ((2, 4, 8, 1), (8, 2), (4, 2)))
    with K.triton_form():
        torch.testing.assert_close(norm.rms_norm(x, w), norm.rms_norm_ref(x, w))
        torch.testing.assert_close(norm.group_norm_silu(x, b, b, 2), norm.group_norm_silu_ref(x, b, b, 2))
        shift, scale = (torch.randn(2, 8, requires_grad=True) for _ in range(2))
        norm.modulate(torch.empty(2, 0, 8), shift, scale).sum().backward()
    assert not shift.grad.any() and not scale.grad.any()


def test_fp64_is_not_for_the_kernels():
    class Cuda:
        is_cuda = True

        def __init__(self, dtype):
            self.dtype = dtype

    assert norm.form(Cuda(torch.float32)) == "triton" and norm.form(Cuda(torch.float64)) == "torch"
