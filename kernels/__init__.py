"""Triton kernels, one op per file, each with its definition in plain PyTorch.

A file here stands alone: it imports torch and, where there is one, triton (bitlinear.py also norm.py, grouped_gemm.py
activation.py). Copy the ones you need.

    from kernels.norm import rms_norm

A GPU with Triton runs the kernels, anything else the plain-PyTorch form. KERNELS=ref|torch|triton in the environment
forces one form (triton on a CPU: with TRITON_INTERPRET=1, which is how the tests run them).
"""
