"""kernels/ssd.py: the plain form against the definition, how it sits in PyTorch, what it refuses."""
import kernelcheck as K
import pytest
import torch

from kernels import ssd as S


def case(batch, T, H, P, G, N, skip=True, initial=True, dtype=torch.float64, wide=None):
    """x, dt, A, B, C, D, initial; x, B and C are columns of one wider tensor, as they are in a model. wide: the dtype of dt, A, D."""
    g, wide = torch.Generator().manual_seed(0), wide or dtype
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    columns = lambda first, n, size: normal(batch, T, first + n * size + 2)[..., first:first + n * size].unflatten(2, (n, size))
    args = [columns(1, H, P), torch.nn.functional.softplus(normal(batch, T, H) - 1), -torch.exp(normal(H)), columns(2, G, N), columns(0, G, N),
            normal(H) if skip else None, normal(batch, H, P, N) if initial else None]
    return tuple(None if t is None else K.cast(t.requires_grad_(), wide if i in (1, 2, 5) else dtype) for i, t in enumerate(args))


def results(f, args):
    """y, final and the gradients of all arguments, of a loss that sees both."""
    y, final = f(*args)
    loss = (y.double() * torch.sin(torch.arange(y.numel())).view_as(y)).sum() + final.double().square().sum()
    return [y, final, *torch.autograd.grad(loss, [t for t in args if t is not None])]


def test_torch_form():
    """The CPU's form equals the definition, also for 16-bit tensors beside fp32 ones, and where only one output is used."""
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for how in ({}, dict(skip=False, initial=False)):
            args = case(*(2, 70, 4, 5, 2, 6), dtype=dtype, wide=torch.promote_types(dtype, torch.float32), **how)
            for a, b in zip(results(S.ssd, args), results(S.ssd_ref, args)):
                assert a.dtype == b.dtype and a.shape == b.shape
                assert (a - b).norm() <= tol * b.norm(), (dtype, how)
    args = case(*(1, 7, 2, 4, 1, 3))
    for i in (0, 1):
        a, b = ([torch.autograd.grad(f(*args)[i].square().sum(), args[1])[0]] for f in (S.ssd, S.ssd_ref))
        torch.testing.assert_close(a, b)


def test_in_pytorch():
    """Checkpointing gives the same, results repeat, and shapes that do not fit are refused."""
    args = list(case(*(1, 7, 2, 4, 1, 3), dtype=torch.float32))
    want = results(S.ssd, args)
    checkpointed = lambda *a: torch.utils.checkpoint.checkpoint(S.ssd, *a, use_reentrant=False)
    for f in (S.ssd, checkpointed):
        assert all(torch.equal(a, b) for a, b in zip(results(f, args), want))
    with pytest.raises(ValueError, match="expected x"):
        S.ssd(*args[:3], args[3][..., 1:], *args[4:])
