"""kernels/selective_scan.py: the plain form against the definition, how it sits in PyTorch, what it refuses."""
import kernelcheck as K
import pytest
import torch

from kernels import selective_scan as S


def case(batch, T, E, N, optional=True, initial=True, dtype=torch.float64, wide=None):
    """u, dt, A, B, C, D, z, dt_bias, initial; z, B and C are columns of wider tensors, as they are in a model."""
    g, wide = torch.Generator().manual_seed(0), wide or dtype
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    args = [normal(batch, T, E), normal(batch, T, E) - 1, -torch.exp(normal(E, N)), normal(batch, T, 2 * N + 3)[..., 1:1 + N],
            normal(batch, T, 2 * N + 3)[..., 3:3 + N], normal(E), normal(batch, T, 2 * E)[..., E:], normal(E) - 1, normal(batch, E, N)]
    if not optional:
        args[5] = args[6] = args[7] = None
    args[8] = args[8] if initial else None
    return [None if t is None else K.cast(t.requires_grad_(), wide if i in (2, 5, 7) else dtype) for i, t in enumerate(args)]


def results(f, args):
    """y, final and the gradients of all arguments, of a loss that sees both."""
    y, final = f(*args)
    loss = (y.double() * torch.sin(torch.arange(y.numel())).view_as(y)).sum() + final.double().square().sum()
    return [y, final, *torch.autograd.grad(loss, [t for t in args if t is not None])]


def test_torch_form():
    """The CPU's form equals the definition, also for 16-bit tensors beside fp32 ones, and where only one output is used."""
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for how in ({}, dict(optional=False, initial=False)):
            args = case(*(2, 19, 6, 4), dtype=dtype, wide=torch.promote_types(dtype, torch.float32), **how)
            for a, b in zip(results(S.selective_scan, args), results(S.selective_scan_ref, args)):
                assert a.dtype == b.dtype and a.shape == b.shape
                assert (a - b).norm() <= tol * b.norm(), (dtype, how)
    args = case(*(1, 7, 6, 4))
    for i in (0, 1):
        a, b = ([torch.autograd.grad(f(*args)[i].square().sum(), args[1])[0]] for f in (S.selective_scan, S.selective_scan_ref))
        torch.testing.assert_close(a, b)


def test_in_pytorch():
    """Checkpointing gives the same, results repeat, and shapes that do not fit are refused."""
    args = list(case(*(1, 7, 6, 4), dtype=torch.float32))
    want = results(S.selective_scan, args)
    checkpointed = lambda *a: torch.utils.checkpoint.checkpoint(S.selective_scan, *a, use_reentrant=False)
    for f in (S.selective_scan, checkpointed):
        assert all(torch.equal(a, b) for a, b in zip(results(f, args), want))
    with pytest.raises(ValueError, match="expected u, dt, z"):
        S.selective_scan(*args[:3], args[3][..., 1:], *args[4:])
