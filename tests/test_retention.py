"""kernels/retention.py: numerics, traffic and machine code (kernelcheck.py), the plain form, and how the op sits in PyTorch."""
import kernelcheck as K
import pytest
import torch

from kernels import retention as R


def case(B, T, H, Kd, V, initial=True, dtype=torch.float64, first=1):
    """q and k are views of one projection (B, T, 2, H, K). Decays of heads from 1 - 2^-first on: strong, so that errors show."""
    torch.manual_seed(0)
    q, k = torch.randn(B, T, 2, H, Kd, dtype=dtype).unbind(2)
    v, S = torch.randn(B, T, H, V, dtype=dtype), torch.randn(B, H, Kd, V, dtype=dtype)
    q, k, v, S = (x.detach().requires_grad_() for x in (q, k, v, S))
    a = torch.log(1 - 2.0 ** (-first - torch.arange(H, dtype=dtype)))
    return (q, k, v, a, S) if initial else (q, k, v, a)


# one token; one less and one more than a chunk of each dtype's tile (64, 32, 16); sizes that no tile divides; a state of 512 rows
CASES = {
    "one token": case(1, 1, 1, 16, 16),
    "no initial state": case(1, 63, 2, 12, 20, initial=False),
    "one past a chunk": case(2, 65, 1, 24, 40),
    "several chunks": case(1, 70, 2, 130, 33),
    "wide values": case(1, 35, 1, 16, 270),
    "forgets at once": (*case(1, 40, 1, 8, 8)[:3], torch.tensor([-60.0]).double()),
}


@pytest.mark.parametrize("name", CASES)
def test_numerics(name):
    K.check_numerics(R.retention, R.retention_ref, [CASES[name]])


def launches(shapes):
    """(K, V, dtype) of one forward and its backward, with the official sizes' strides: views of projections (B, T, H K)."""
    for Kd, V, name in shapes:
        dtype = getattr(torch, name)
        q, k = (torch.empty(1, 64, 2 * Kd, dtype=dtype).unflatten(-1, (2, Kd)).requires_grad_() for _ in "qk")
        v = torch.empty(1, 64, 2 * V, dtype=dtype).unflatten(-1, (2, V)).requires_grad_()
        S = torch.empty(1, 2, Kd, V, requires_grad=True)
        o, final = R.retention(q, k, v, torch.empty(2), S)
        torch.autograd.grad([o, final], [q, k, v, S], [torch.empty_like(o), torch.empty_like(final)])
