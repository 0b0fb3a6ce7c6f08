"""Read by pytest before any test: the process that runs the tests is Triton's interpreter (see kernelcheck.py)."""
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: it is read when a kernel is defined
os.environ["HF_HUB_OFFLINE"] = "1"  # the same for huggingface_hub, which would ask a missing network for 20 s
PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
if PARALLEL:  # workers share the cores: one thread each
    os.environ["OMP_NUM_THREADS"] = "1"

# The root comes first: `rwkv` is our rwkv.py (load PyPI's by its path) and `kernels` our folder. transformers
# only asks for the metadata of Hugging Face's package of that name, finds none, and does without.
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

import pytest  # noqa: E402
import torch  # noqa: E402

if PARALLEL:
    torch.set_num_threads(1)


@pytest.fixture
def text(tmp_path):
    """The path of a small text with something to learn."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{a} times {b} is {a * b}.\n" for a in range(60) for b in range(20)))
    return str(path)
