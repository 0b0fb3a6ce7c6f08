"""The checks can fail: planted faults are found, repaired arithmetic is right, counts are exact."""
import kernelcheck as K
import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.store(out + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@triton.jit
def unmasked_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i), mask=i < n)  # the load forgot its mask


@triton.jit
def same_cells_kernel(out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.program_id(0).to(tl.float32))  # every program writes the same place


@triton.jit
def otherless_sum_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + i, mask=i < n), 0))  # masked-off lanes are undefined: they need other=0.0


@triton.jit
def dot_kernel(x, y, out, K, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    acc = tl.zeros((N, N), tl.float32)
    for k in range(0, K, N):
        acc = tl.dot(tl.load(x + i * K + k + j), tl.load(y + (k + i) * N + j), acc, input_precision="ieee")
    tl.store(out + i * N + j, acc)


@triton.jit
def bf16_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(out + i, v * 1.5 + v)
    tl.store(out + N + i, v.to(tl.float32) / 3)  # the store rounds
    tl.store(out + 2 * N, tl.sum(v, 0))
    tl.store(out + 2 * N + 1, tl.max(v, 0))


@triton.jit
def scalars_kernel(out, eps, flag, n, N: tl.constexpr):
    i = tl.arange(0, N)
    acc = tl.zeros((N,), tl.float32)
    for k in range(n):
        acc += k.to(tl.float32) + eps.to(tl.float32)
    tl.store(out + i, tl.where((i >= 0) & flag, acc, -1.0))
    tl.store(out + N + i, tl.maximum(acc / 0.0 * 0.0, 7.0))  # NaN loses, as when compiled


@triton.jit
def tiny_literal_kernel(x, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(x + o, tl.maximum(tl.load(x + o), 1e-40))  # not a normal number of fp32: Triton takes fp64


@triton.jit
def break_kernel(out, N: tl.constexpr):
    for k in range(8):
        tl.store(out + k, 1.0)
        if k > N:
            break  # the interpreter takes it, the compiler refuses


def half_written(x):
    out = torch.empty_like(x)
    add_kernel[(1,)](x, x, out, 8, BLOCK=8)
    return out


def test_out_of_bounds_is_reported_and_survived():
    x, out = torch.randn(1000), torch.empty(1000)
    with K.count(poison=True) as t:
        unmasked_kernel[(4,)](x, out, 1000, BLOCK=256)
    assert len(t.faults) == 1 and "out of bounds load, 24 elements" in t.faults[0]
    assert "unmasked_kernel at test_kernelcheck.py" in t.faults[0]
    assert torch.equal(out, x)


def test_neighbour_is_out_of_bounds():
    x, out = torch.zeros(4096), torch.empty(64)
    with K.count() as t:
        unmasked_kernel[(1,)](x[4064:], out, 64, BLOCK=64)  # a view: its tensor ends after 32
    assert "32 elements" in t.faults[0]


def test_race_is_reported():
    with K.count() as t:
        same_cells_kernel[(3,)](torch.empty(16), BLOCK=16)
    assert "race" in t.faults[0]


def test_bytes_are_exact():
    x, y, out = torch.randn(3, 1000).bfloat16()
    with K.count() as t:
        add_kernel[(4,)](x, y, out, 1000, BLOCK=256)
        torch.mul(x, y)
    assert t.kernels[0]["load"] == 4000 and t.kernels[0]["store"] == 2000 and t.torch_bytes == 6000 and not t.faults
    assert t.bytes == t.once == 12000 and torch.equal(out, x + y)
    with pytest.raises(AssertionError, match="2.000 x the floor"):
        K.check_traffic(lambda: [add_kernel[(4,)](x, y, out, 1000, BLOCK=256) for _ in range(2)], 6000, 1.1)


def test_unmasked_lanes_and_unwritten_outputs_are_nan():
    out = torch.empty(1)
    with K.count(poison=True):
        otherless_sum_kernel[(1,)](torch.ones(16), out, 10, BLOCK=16)
    assert out.isnan()
    with pytest.raises(AssertionError, match="output 0"):
        K.check_numerics(half_written, lambda x: 2 * x, [(torch.randn(9, dtype=torch.float64),)])
    K.check_numerics(half_written, lambda x: 2 * x, [(torch.randn(8, dtype=torch.float64),)])


@pytest.mark.parametrize("dtype", K.TOLERANCE)
def test_dot(dtype):
    x, y, out = torch.randn(32, 64).to(dtype), torch.randn(64, 32).to(dtype), torch.empty(32, 32)
    with K.count() as t:
        dot_kernel[(1,)](x, y, out, 64, N=32)
    assert (out - x.float() @ y.float()).abs().max() < 1e-4
    assert sum(t.flops.values()) == 2 * 32 * 32 * 64


def test_bf16_arithmetic():
    x, out = torch.randn(64).bfloat16(), torch.empty(130, dtype=torch.bfloat16)
    bf16_kernel[(1,)](x, out, N=64)
    assert torch.equal(out[:64], x * 1.5 + x) and torch.equal(out[64:128], (x.float() / 3).bfloat16())
    assert torch.equal(out[128:], torch.stack([x.float().sum().bfloat16(), x.max()]))


def test_scalars_are_what_a_launch_passes():
    out = torch.empty(32)
    scalars_kernel[(1,)](out, 0.5, True, 4, N=16)
    assert (out[:16] == 8).all() and (out[16:] == 7).all()


def good_launches():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(4096, dtype=dtype)
        dot_kernel[(1,)](x, x, x, 64, N=32)


def bad_launches():
    x = torch.empty(128 * 512, dtype=torch.bfloat16)
    dot_kernel[(1,)](x, x, x, 512, N=64, maxnreg=32)  # 64x64 accumulators in 32 registers: spills
    dot_kernel[(1,)](x, x, x, 512, N=128, num_warps=8, num_stages=6)  # five buffers of 2 x 32 KiB: does not fit
    break_kernel[(1,)](x, N=4)
    tiny_literal_kernel[(1,)](x, N=16)


def test_machine_code():
    rows = {r["arch"]: r for r in K.check_compiles("test_kernelcheck", "good_launches") if "bf16" in r["spec"]}
    assert set(rows) == set(K.TARGETS) and all(r["dots"] and r["tensor"] for r in rows.values())
    assert 0 < rows[89]["occupancy"] <= 1 and 16 <= rows[89]["regs"] <= 255


def test_bad_machine_code_is_refused():
    spills, large, refused, wide = (K.faults_of(r) for r in K.compiled("test_kernelcheck", "bad_launches", (89,)))
    assert "spill instructions" in " ".join(spills) and "bytes of shared memory" in " ".join(large)
    assert "fp64" in wide[0]
    assert "CompilationError" in refused[0] or "UnsupportedLanguageConstruct" in refused[0]
    with pytest.raises(AssertionError, match="spill instructions"):
        K.check_compiles("test_kernelcheck", "bad_launches", (89,))
