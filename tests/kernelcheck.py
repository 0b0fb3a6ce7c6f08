"""
Checks Triton kernels without a GPU: what they compute, what they move, what machine code they become

    check_numerics(op, ref, cases)           outputs and gradients in Triton's interpreter against ref in fp64
    check_traffic(fn, floor, limit)          bytes that fn's kernels, and PyTorch between them, move against the floor
    check_compiles("test_norm", "launches")  what test_norm.launches() launches, compiled for five GPUs: fits, no spills
    with count() as t: ...                   the interpreter's counters, for anything else

A test file adds its op to bench/traffic.py's table with bench_cases() -> [(name, forward, backward, floor, floor)]:
out = forward() and backward(out) run the op on bf16 CPU tensors of one typical shape, which the name says; the floors
are bytes, nbytes(*inputs, *outputs); backward and its floor may be None.

A process is either Triton's interpreter (TRITON_INTERPRET=1: conftest.py sets it) or its compiler, so check_compiles
starts a child. The interpreter of Triton 3.7.1 differs from the compiler in ways that hide faults or invent them;
importing this file repairs those, and the reason stands at each repair. test_kernelcheck.py plants faults and sees them
found. Nothing here measures time.
"""
import ast
import contextlib
import importlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from math import prod

import numpy as np
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter as I
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import create_function_from_signature

INTERPRET = triton.knobs.runtime.interpret
TH, B = I.TensorHandle, I.InterpreterBuilder  # a value in the interpreter; the class whose methods are its instructions
counting = None  # the active Count
patched = set()  # modules whose triton.language the current launch has patched


def nbytes(*tensors):
    """Total bytes of the tensors (None counts nothing): a floor is nbytes(each input, each output)."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@contextlib.contextmanager
def triton_form():
    """Every imported kernels.* module runs its Triton form."""
    mods = [m for name, m in sys.modules.items() if name.startswith("kernels.") and hasattr(m, "KERNELS")]
    was = [m.KERNELS for m in mods]
    for m in mods:
        m.KERNELS = "triton"
    try:
        yield
    finally:
        for m, k in zip(mods, was):
            m.KERNELS = k


# ---------------------------------------------------------------- the interpreter, repaired
def bf16_to_f32(u):
    return (np.ascontiguousarray(u).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(np.shape(u))


def f32_to_bf16(x):
    """Round to nearest, ties to even, as hardware does (the interpreter truncates)."""
    x = np.ascontiguousarray(x, dtype=np.float32).reshape(np.shape(x))
    b = x.view(np.uint32)
    r = ((b + (np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), r)


def is_bf16(h):
    return h.dtype.scalar == tl.bfloat16


def value(h):
    return bf16_to_f32(h.data) if is_bf16(h) else h.data


def override(cls, name):
    """@override(cls, name): f(original, *args) takes the place of cls.name."""
    def deco(f):
        orig = getattr(cls, name)
        setattr(cls, name, lambda *a, **k: f(orig, *a, **k))
    return deco


def scalar(x, np_type, tl_type):
    return tl.tensor(TH(np.array([x], np_type), tl_type), tl_type)


def repair():
    # bf16 is held as uint16 and computed on the bit patterns (1.0 + 1.0 = 1.7e38): compute in fp32, round once.
    @override(B, "binary_op")
    def _(orig, self, a, b, op):
        if not (is_bf16(a) or is_bf16(b)):
            return orig(self, a, b, op)
        out = op(value(a), value(b))
        return TH(out, tl.int1) if out.dtype == np.bool_ else TH(f32_to_bf16(out), tl.bfloat16)  # bool: a comparison

    @override(B, "unary_op")
    def _(orig, self, a, op):
        return TH(f32_to_bf16(op(value(a))), tl.bfloat16) if is_bf16(a) else orig(self, a, op)

    @override(B, "ternary_op")
    def _(orig, self, a, b, c, op):
        if op is np.where or not is_bf16(c):
            return orig(self, a, b, c, op)
        return TH(f32_to_bf16(op(value(a), value(b), value(c))), tl.bfloat16)

    @override(B, "create_fma")
    def _(orig, self, a, b, c):
        r = value(a) * value(b) + value(c) if is_bf16(c) else None
        return orig(self, a, b, c) if r is None else TH(f32_to_bf16(r), tl.bfloat16)

    @override(B, "create_rsqrt")
    def _(orig, self, a):
        return TH(f32_to_bf16(1 / np.sqrt(value(a))), tl.bfloat16) if is_bf16(a) else orig(self, a)

    @override(B, "cast_impl")
    def cast(orig, self, src, dst):
        d = dst.scalar
        if src.dtype.scalar == d or not (is_bf16(src) or d == tl.bfloat16):
            return orig(self, src, dst)
        return TH(f32_to_bf16(src.data) if d == tl.bfloat16 else value(src).astype(I._get_np_dtype(d)), d)

    @override(B, "create_fp_to_fp")
    def _(orig, self, src, dst, rounding):
        floats = {tl.bfloat16, tl.float16, tl.float32, tl.float64}
        if tl.bfloat16 in (src.dtype.scalar, dst.scalar) and {src.dtype.scalar, dst.scalar} <= floats:
            return self.cast_impl(src, dst)
        return orig(self, src, dst, rounding)

    B.get_bf16 = lambda self, x: TH(f32_to_bf16(np.array([x])), tl.bfloat16)  # missing: a bf16 constant raises

    @override(B, "create_dot")
    def _(orig, self, a, b, d, precision, imprecise):
        if counting and counting.kernel:
            flops, kind = counting.kernel["flops"], str(a.dtype.scalar)
            flops[kind] = flops.get(kind, 0) + 2 * prod(a.data.shape) * b.data.shape[-1]
        if is_bf16(a):
            a, b = TH(value(a), tl.float32), TH(value(b), tl.float32)
        return orig(self, a, b, d, precision, imprecise)

    # Reductions and scans hand the bit patterns to numpy.
    def retype(t, data, dtype):
        return tl.tensor(TH(data, dtype), tl.block_type(dtype, list(data.shape)) if t.type.is_block() else dtype)

    def in_fp32(orig, self, x, *a, **k):
        x = x[0] if isinstance(x, tuple) else x
        if not is_bf16(x.handle):
            return orig(self, x, *a, **k)
        r = orig(self, retype(x, value(x.handle), tl.float32), *a, **k)
        back = lambda t: retype(t, f32_to_bf16(t.handle.data), tl.bfloat16) if t.dtype != tl.int32 else t  # argmax
        return type(r)(map(back, r)) if isinstance(r, (tuple, list)) else back(r)

    for cls, name in ((I.ReduceOps, "sum"), (I.ReduceOps, "min_max"), (I.ScanOps, "cumsum"), (I.ScanOps, "cumprod")):
        override(cls, name)(in_fp32)

    # A NaN wins tl.maximum, tl.minimum and tl.clamp in the interpreter and loses when compiled.
    B.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    B.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)

    @override(B, "create_clampf")
    def _(orig, self, x, lo, hi, nans):
        if nans != I._ir.PROPAGATE_NAN.NONE:
            return orig(self, x, lo, hi, nans)
        return self.binary_op(self.binary_op(x, lo, np.fmax), hi, np.fmin)

    # A launch passes fp32 and int1 scalars; the interpreter keeps a float (no .to, other promotion) and refuses a bool.
    def convert(arg):
        if type(arg) is float:
            return scalar(arg, np.float32, tl.float32)
        if type(arg) is bool:
            return scalar(arg, np.bool_, tl.int1)
        t = implicit_cvt(arg)
        if counting and isinstance(arg, torch.Tensor):
            t.handle.attr["origin"] = counting.origin(arg)  # pointer arithmetic hands it on: see carry below
        return t

    implicit_cvt, I._implicit_cvt = I._implicit_cvt, convert

    # `for i in range(...)` gives a Python int where the compiler gives a scalar tensor with .to().
    def loop_index(i):
        if type(i) is not int:
            return i
        return scalar(i, np.int32, tl.int32) if -2**31 <= i < 2**31 else scalar(i, np.int64, tl.int64)

    def visit_for(self, node):
        self.generic_visit(node)
        call = node.iter.func if isinstance(node.iter, ast.Call) else None
        if "range" in (getattr(call, "id", ""), getattr(call, "attr", "")) and isinstance(node.target, ast.Name):
            i = node.target.id
            node.body.insert(0, ast.copy_location(ast.parse(f"{i} = _loop_index({i})").body[0], node.body[0]))
        return node

    I._loop_index, I.ASTTransformer.visit_For = loop_index, visit_for

    # libdevice functions are stubs that return None.
    from triton.language.extra import libdevice
    for name in ("tanh", "exp", "exp2", "log", "log1p", "expm1", "sqrt", "floor", "ceil", "rint", "abs"):
        f = getattr(np, name)
        setattr(libdevice, name, lambda x, f=f, **_: tl.tensor(I.interpreter_builder.unary_op(x.handle, f), x.type))
    libdevice.rsqrt = lambda x, **_: tl.tensor(I.interpreter_builder.create_rsqrt(x.handle), x.type)

    # Autotuning needs a device to time on: take the first config (check_compiles compiles all of them).
    Autotuner.run = lambda self, *a, **k: self.fn.run(*a, **{**k, **self.configs[0].all_kwargs()})

    # Every call of a jitted function (tl.sum, tl.cdiv) searches triton.language for builtins to patch, half of all
    # time: once a launch and module is enough.
    @override(I, "_patch_lang")
    def _(orig, fn):
        if id(fn.__globals__) in patched:
            return I._LangPatchScope()
        patched.add(id(fn.__globals__))
        return orig(fn)

    watch_memory()


# ---------------------------------------------------------------- the memory accesses of a kernel
class Origin:
    """The allocation that a pointer argument points into, and which program last wrote and read each element."""

    def __init__(self, t):
        s = t.untyped_storage()
        self.lo, self.hi, self.size = s.data_ptr(), s.data_ptr() + s.nbytes(), t.element_size()
        n = s.nbytes() // self.size + 1
        self.writer, self.reader = np.zeros((2, n), np.int32)  # 0 none, else 1 + program; -1 several readers


class Count:
    """What ran inside `with count() as t`: t.bytes (as issued), t.once (each address once per launch: a perfect cache),
    t.torch_bytes (by PyTorch around the kernels; both include it), t.flops (of tl.dot, by dtype), t.kernels (a dict for
    each launch), t.faults (text: out of bounds, misaligned, races)."""

    def __init__(self, poison):
        self.poison, self.kernels, self.kernel, self.torch_bytes, self.faults = poison, [], None, 0, []

    @property
    def bytes(self):
        return self.torch_bytes + sum(k["load"] + k["store"] + 2 * k["atomic"] for k in self.kernels)

    @property
    def once(self):
        return self.torch_bytes + sum(k["once"] for k in self.kernels)

    @property
    def flops(self):
        total = {}
        for k in self.kernels:
            for kind, n in k["flops"].items():
                total[kind] = total.get(kind, 0) + n
        return total

    def origin(self, t):
        key = (t.untyped_storage().data_ptr(), t.element_size())  # views of one storage share its shadow
        return self.origins.setdefault(key, Origin(t))

    def fault(self, what, lanes):
        tri = os.path.dirname(triton.__file__)
        f = sys._getframe(2)
        while f.f_back and (f.f_code.co_filename.startswith(tri) or f.f_code.co_filename in (__file__, np.__file__)):
            f = f.f_back
        if len(self.faults) < 20:
            where = f"{self.kernel['name']} at {os.path.basename(f.f_code.co_filename)}:{f.f_lineno}"
            self.faults.append(f"{where}: {what}, {lanes} elements, program {I.interpreter_builder.grid_idx}")

    def access(self, kind, ptrs, mask):
        """Record one load, store or atomic; returns the mask without out-of-bounds lanes (they would crash us)."""
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        m = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)
        addr = ptrs.data[m]
        o = ptrs.attr.get("origin")
        if addr.size == 0:
            return mask
        if o is None:  # the pointer did not come from one argument (a table of pointers, a choice of two): any will do
            good = np.zeros(addr.shape, bool)
            for a in self.origins.values():
                good |= (addr >= a.lo) & (addr + np.uint64(size) <= a.hi)
        else:
            good = (addr >= o.lo) & (addr + np.uint64(size) <= o.hi)
        if not good.all():
            self.fault(f"out of bounds {kind}", int((~good).sum()))
            m[m] = good
            mask, addr = TH(m, tl.int1), addr[good]
        if (addr % np.uint64(size)).any():
            self.fault(f"misaligned {kind}", addr.size)
        self.kernel[kind] += addr.size * size
        if o is None:
            return mask
        cell = ((addr - np.uint64(o.lo)) // np.uint64(o.size)).astype(np.int64)
        (x, y, z), (nx, ny, _) = I.interpreter_builder.grid_idx, I.interpreter_builder.grid_dim
        me = 1 + x + nx * (y + ny * z)
        other = lambda owner: int(((owner[cell] != 0) & (owner[cell] != me)).sum())
        if kind != "atomic" and other(o.writer):  # programs run one after another here, at once on a GPU
            self.fault(f"race: {kind} of what another program wrote", other(o.writer))
        if kind == "store" and other(o.reader):
            self.fault("race: store of what another program read", other(o.reader))
        if kind == "load":
            o.reader[cell] = np.where((o.reader[cell] == 0) | (o.reader[cell] == me), me, -1)
        elif kind == "store":
            o.writer[cell] = me
        return mask


def watch_memory():
    @override(B, "create_masked_load")
    def _(orig, self, ptrs, mask, other, *hints):
        if not (counting and counting.kernel):
            return orig(self, ptrs, mask, other, *hints)
        mask = mask if isinstance(mask, TH) else TH(np.asarray(mask), tl.int1)  # descriptors pass a bare array
        ok = counting.access("load", ptrs, mask)
        r = orig(self, ptrs, ok, other, *hints)
        # masked off without `other` (undefined on a GPU, 0 in the interpreter), or out of bounds
        off = ~np.broadcast_to(ok.data, r.data.shape)
        dead = off if other is None else off & np.broadcast_to(mask.data, r.data.shape)
        if counting.poison and dead.any():
            nan = 0x7FC0 if is_bf16(r) else np.nan if r.data.dtype.kind == "f" else 0x55
            r = TH(np.where(dead, np.array(nan).astype(r.data.dtype), r.data), r.dtype)
        return r

    @override(B, "create_masked_store")
    def _(orig, self, ptrs, val, mask, *hints):
        mask = mask if isinstance(mask, TH) else TH(np.asarray(mask), tl.int1)
        mask = counting.access("store", ptrs, mask) if counting and counting.kernel else mask
        return orig(self, ptrs, val, mask, *hints)

    @override(B, "create_atomic_rmw")
    def _(orig, self, op, ptrs, val, mask, *order):
        mask = counting.access("atomic", ptrs, mask) if counting and counting.kernel else mask
        return orig(self, op, ptrs, val, mask, *order)

    # What is derived from a pointer stays inside that pointer's tensor: landing in a neighbour is a fault too.
    def carry(orig, self, *a, **k):
        r = orig(self, *a, **k)
        origins = {id(o): o for h in a if isinstance(h, TH) and (o := h.attr.get("origin"))}
        if len(origins) == 1:
            for h in r if isinstance(r, tuple) else (r,):
                h.attr["origin"] = next(iter(origins.values()))
        return r

    for name in "addptr splat broadcast expand_dims reshape trans bitcast int_to_ptr ptr_to_int select".split():
        override(B, "create_" + name)(carry)

    @override(I.GridExecutor, "__call__")
    def _(orig, self, *args, **kwargs):
        patched.clear()
        launch = ("num_warps", "num_stages", "num_ctas", "maxnreg")
        unknown = [k for k in kwargs if k not in self.arg_names and k not in launch]  # dropped silently
        assert not unknown, f"{self.fn.__name__}: unknown launch arguments {unknown}"
        with np.errstate(all="ignore"), _disable_current_modes():  # a GPU divides by zero without a word
            if counting is None:
                return orig(self, *args, **kwargs)
            counting.origins = {}
            counting.kernel = k = dict(name=self.fn.__name__, load=0, store=0, atomic=0, once=0, flops={})
            try:
                orig(self, *args, **kwargs)
            finally:
                k["grid"] = tuple(I.interpreter_builder.grid_dim)
                k["once"] = sum(o.size * int((a != 0).sum()) for o in counting.origins.values()
                                for a in (o.reader, o.writer))
                counting.kernels.append(k)
                counting.kernel = None


VIEWS = set("""view _unsafe_view reshape expand permute transpose t slice select detach alias unsqueeze squeeze
    as_strided split chunk unbind _reshape_alias split_with_sizes diagonal view_as lift_fresh unfold narrow
    movedim""".split())
EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
FILLS = set("zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full zero_ fill_ arange".split())


class TorchBytes(TorchDispatchMode):
    """Counts what PyTorch reads and writes around the kernels, also inside a custom_op; fills torch.empty with NaN."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        custom = torch._library.custom_ops.OPDEFS.get(func._schema.name)
        if custom is not None:
            with self:
                return custom._backend_fns.get("cpu", custom._init_fn)(*args, **kwargs)
        out, name = func(*args, **kwargs), func._schema.name.split("::")[-1]
        size = lambda tree: nbytes(*(x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)))
        if name in EMPTY and counting.poison and isinstance(out, torch.Tensor) and out.is_floating_point():
            out.fill_(float("nan"))
        if name not in VIEWS | EMPTY:
            counting.torch_bytes += size(out) + (0 if name in FILLS else size((args, kwargs)))
        return out


@contextlib.contextmanager
def count(poison=False):
    """Run kernels in the repaired interpreter and count: `with count() as t: op(...)`, then see Count.
    poison: torch.empty, and masked-off lanes that have no `other`, hold NaN."""
    global counting
    assert INTERPRET, "set TRITON_INTERPRET=1 before importing triton"
    assert counting is None, "count() does not nest"
    counting = Count(poison)
    try:
        with triton_form(), TorchBytes():
            yield counting
    finally:
        counting = None


# ---------------------------------------------------------------- the checks
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # relative norm of the error


def cast(t, dtype):
    """A leaf of another dtype with the same strides and offset (a view of a larger tensor stays one)."""
    n = t.untyped_storage().nbytes() // t.element_size()
    flat = t.detach().as_strided((n,), (1,), 0).to(dtype, copy=True)
    return flat.as_strided(t.shape, t.stride(), t.storage_offset()).requires_grad_(t.requires_grad)


def check_numerics(op, ref, cases, tol=None, grads=True, dtypes=tuple(TOLERANCE), floor=1e-6):
    """op in the interpreter against ref in fp64 on the same (rounded) values: every output and every gradient, by name.

    cases: tuples of arguments, or (arguments, keyword arguments). Floating tensors are fp64; gradients are checked for
    those with requires_grad. tol: a number or {dtype: number} in place of TOLERANCE. floor: an RMS that counts as zero.
    """
    is_float = lambda v: isinstance(v, torch.Tensor) and v.is_floating_point()
    tensors = lambda out: [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
    for i, case in enumerate(cases):
        args, kwargs = case if len(case) == 2 and isinstance(case[1], dict) else (case, {})
        values, names = [*args, *kwargs.values()], [*[*inspect.signature(ref).parameters][:len(args)], *kwargs]
        call = lambda f, vals: tensors(f(*vals[:len(args)], **dict(zip(kwargs, vals[len(args):]))))
        wrt = [j for j, v in enumerate(values) if grads and is_float(v) and v.requires_grad]
        for dtype in dtypes:
            low = [cast(v, dtype) if is_float(v) else v for v in values]
            exact = [cast(v, torch.float64) if is_float(v) else v for v in low]
            want = call(ref, exact)
            down = [j for j, t in enumerate(want) if t.requires_grad]  # the outputs that gradients come from
            torch.manual_seed(0)
            with count(poison=True) as t:
                got = call(op, low)
                assert len(got) == len(want), f"case {i}: {len(got)} outputs, expected {len(want)}"
                # [..., 0] of (..., 2): gradients from above come with strides, which a kernel must not ignore
                above = [torch.randn(*want[j].shape, 2).to(got[j].dtype)[..., 0] for j in down]
                dgot = torch.autograd.grad([got[j] for j in down], [low[j] for j in wrt], above) if wrt else ()
            above = [g.double() for g in above]
            dwant = torch.autograd.grad([want[j] for j in down], [exact[j] for j in wrt], above) if wrt else ()
            assert t.kernels, f"case {i}, {dtype}: no kernel ran"
            assert not t.faults, f"case {i}, {dtype}: " + "\n".join(t.faults)
            limit = (tol[dtype] if isinstance(tol, dict) else tol) or TOLERANCE[dtype]
            labels = [f"output {j}" for j in range(len(want))] + ["d" + names[j] for j in wrt]
            for label, a, b in zip(labels, [*got, *dgot], [*want, *dwant]):
                where = f"case {i}, {dtype}, {label}"
                assert a.shape == b.shape, f"{where}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
                error = (a.double() - b).norm() / (b.norm() + floor * b.numel() ** 0.5)
                assert b.numel() == 0 or error <= limit, f"{where}: relative error {error:.2e} > {limit}"  # NaN fails


def check_traffic(fn, floor, limit, once=False):
    """The bytes that fn() moves are at most limit * floor; returns the ratio. Bytes as issued, or with once=True each
    address once per launch: for a kernel that leaves second reads to the cache by design."""
    with count() as t:
        fn()
    assert t.kernels, "no kernel ran"
    assert not t.faults, "\n".join(t.faults)
    ratio = (t.once if once else t.bytes) / floor
    part = t.torch_bytes / floor
    assert ratio <= limit, f"{ratio:.3f} x the floor of {floor} bytes ({part:.3f} by PyTorch), limit {limit}"
    return ratio


# ---------------------------------------------------------------- machine code
TARGETS = (89, 80, 90, 120, "gfx942")
SHARED = {80: 166912, 89: 101376, 90: 232448, 120: 101376, "gfx942": 65536}  # bytes of shared memory per block


class Launch:
    """A launch, bound as JITFunction.run binds it: dtypes, constexprs, divisibility by 16 are those of a real call."""

    def __init__(self, fn, args, kwargs, grid):
        self.fn, self.args = fn, args
        self.kwargs = dict(kwargs, debug=False, instrumentation_mode=triton.knobs.compilation.instrumentation_mode)
        bound, spec, _, _ = self.bind(89)
        self.grid = tuple(int(n) for n in (grid(bound) if callable(grid) else grid))
        self.spec, self.label = str(spec), label
        self.key = (label, fn._fn_name, self.spec, str(kwargs))

    def bind(self, arch):
        target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
        backend = triton.compiler.make_backend(target)
        binder = create_function_from_signature(self.fn.signature, self.fn.params, backend)
        bound, spec, opts = binder(*self.args, **self.kwargs)
        return bound, spec, self.fn._pack_args(backend, self.kwargs, bound, spec, opts), target

    def compile(self, arch):
        """-> a row: registers, shared memory, spill instructions, tensor-core instructions, occupancy; or `error`."""
        row = dict(kernel=self.fn.__name__, arch=arch, label=self.label, grid=self.grid, spec=self.spec)
        try:
            _, _, (options, signature, constexprs, attrs), target = self.bind(arch)
            src = triton.compiler.ASTSource(self.fn, signature, constexprs, attrs)
            k = triton.compile(src, target=target, options=options.__dict__)
        except Exception as e:  # a kernel that does not compile is a finding
            return dict(row, error=f"{type(e).__name__}: {str(e)[-600:]}")
        smem, warps = k.metadata.shared, k.metadata.num_warps
        row.update(warps=warps, stages=k.metadata.num_stages, smem=smem, fits=smem <= SHARED[arch])
        row["fp64"] = len(re.findall(r"f64\b", k.asm["ttir"]))
        row["dots"] = len(re.findall(r"tt\.dot .*: tensor<[\dx]+x(?:bf16|f16|i8|f8\w+)>", k.asm["ttir"]))
        if not isinstance(arch, int):
            found = lambda p: int((re.search(p, k.asm["amdgcn"]) or [0, 0])[1])
            return dict(row, regs=found(r"\.vgpr_count:\s+(\d+)"), spills=found(r"\.vgpr_spill_count:\s+(\d+)"),
                        tensor=k.asm["amdgcn"].count("v_mfma_"))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(k.asm["cubin"])
            f.flush()
            tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
            dump = lambda what: subprocess.check_output([tool, what, f.name], text=True, stderr=subprocess.STDOUT)
            used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("-res-usage"))}
            # a spill needs local memory; disassembling takes half a second, so only where there is some
            sass = dump("-sass") if used["STACK"] + used["LOCAL"] else ""
        return dict(row, regs=used["REG"], spills=len(re.findall(r"\s(?:LDL|STL)[ .]", sass)),
                    tensor=len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", k.asm["ptx"])),
                    occupancy=occupancy_sm89(used["REG"], smem, warps))


def occupancy_sm89(regs, smem, warps):
    """Share of an sm_89 multiprocessor's 48 warps that fit at once; it has 65,536 registers, 100 KiB, 24 blocks."""
    by_regs = 65536 // (-(-regs * 32 // 256) * 256) // warps  # registers come in units of 256 a warp
    by_smem = 102400 // (smem + 1024)  # each block costs 1 KiB more
    return min(by_regs, by_smem, 48 // warps, 24) * warps / 48


captured = {}  # key -> Launch, in order
label = ""  # what the next launches belong to, for a function that wants to tell its rows apart


def capture():
    """From now on a launch is recorded in `captured`, not run (all configs of an autotuned kernel)."""
    def run(self, *args, grid, warmup, **kwargs):
        launch = Launch(self, args, kwargs, grid)
        captured.setdefault(launch.key, launch)

    def run_all(self, *args, **kwargs):
        for config in self.configs:
            self.fn.run(*args, **{**kwargs, **config.all_kwargs()})

    triton.runtime.jit.JITFunction.run = run
    Autotuner.run = run_all


def compile_job(job):
    key, arch = job
    return captured[key].compile(arch)


def child(module, function, args, targets, path):
    """The compiling process: captures what module.function(*args) launches, compiles it in two processes."""
    capture()
    getattr(importlib.import_module(module), function)(*args)
    elsewhere = {}  # kernel -> its first 16-bit launch, or its first
    for key, launch in sorted(captured.items(), key=lambda item: "bf16" not in item[1].spec):
        elsewhere.setdefault(launch.fn, key)
    everything = bool(os.environ.get("EVERY_TARGET"))
    jobs = [(key, arch) for arch in targets for key, launch in captured.items()
            if arch == 89 or everything or elsewhere[launch.fn] == key]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        rows = pool.map(compile_job, jobs, chunksize=1)
    with open(path, "w") as f:
        json.dump(rows, f)


def compiled(module, function, targets=TARGETS, args=()):
    """Launch.compile's rows for what tests/<module>.py's function(*args) launches on sm_89; for other targets one
    launch of each kernel, in bf16 if it has one, or all with EVERY_TARGET=1 (several times slower)."""
    here = os.path.dirname(os.path.abspath(__file__))
    env = dict(os.environ, KERNELS="triton", OMP_NUM_THREADS="1", TRITON_DEFAULT_FP_FUSION="1",
               PYTHONPATH=os.pathsep.join([os.path.dirname(here), here, os.environ.get("PYTHONPATH", "")]))
    env.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "rows.json")
        code = f"import kernelcheck; kernelcheck.child{(module, function, args, tuple(targets), path)!r}"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"the compiling process failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        with open(path) as f:
            return json.load(f)


def faults_of(row):
    """What is wrong with a compiled launch, as a list of words."""
    if "error" in row:
        return [row["error"]]
    bad = [] if row["fits"] else [f"{row['smem']} bytes of shared memory, a block has {SHARED[row['arch']]}"]
    if row["spills"] and row["arch"] == 89:  # elsewhere ptxas spills a handful far below the limit: it is in the rows
        bad.append(f"{row['spills']} spill instructions at {row['regs']} registers")
    if row["fp64"]:  # a literal that fp32 does not hold is enough
        bad.append("arithmetic in fp64, which has a 64th of fp32's rate")
    if row["dots"] and not row["tensor"]:
        bad.append("tl.dot without tensor cores")
    return bad


def check_compiles(module, function, targets=TARGETS):
    """Every kernel that tests/<module>.py's function() launches, on CPU tensors whose values do not matter, compiles
    for each target, fits its shared memory, multiplies 8- and 16-bit matrices on tensor cores, and has no spills on
    sm_89. Returns the rows."""
    rows = compiled(module, function, targets)
    assert rows, f"{module}.{function}() launched no kernel"
    bad = [f"{r['kernel']} for {r['arch']}: {why}\n    {r['spec']}" for r in rows for why in faults_of(r)]
    assert not bad, "\n".join(bad)
    return rows


if INTERPRET:
    repair()
