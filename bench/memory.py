"""What a training step needs: parameters, gradients, optimizer state, and the peak with activations and temporaries.

    python bench/memory.py gpt2.py --preset 124M                will it train on 8, 12, 16 or 24 GB? with which batch?
    python bench/memory.py gpt2.py --preset 124M --ckpt --optim adamw8bit
    python bench/memory.py gpt2.py --layers 12 --device cpu     the same question for a CPU's memory
    python bench/memory.py --table [FILE ...]                   every preset of every file

The first argument is a model file, the others are its own flags; --device is cuda unless it says cpu, --preset what the
file itself takes there. Nothing is computed and no GPU is needed: a whole step (forward, backward, clipping, optimizer)
runs on fake tensors, which have a shape but no data, while Tracker counts the storages alive. 1 MB = 2^20 bytes.

For cuda the tensors are fake CPU tensors that say they are on a GPU, since PyTorch built without CUDA cannot run
backward on fake CUDA ones. So the forms of kernels/ for a GPU are planned where Triton is installed (their own buffers
included: the ops' bodies run, only the launches do nothing), attention by PyTorch is its flash or memory-efficient
form, dropout its fused one, and autocast keeps in fp32 what it keeps there on CUDA. Sizes are rounded to the 512 bytes
of the CUDA allocator. Not seen: scratch memory of PyTorch's own kernels and fragmentation (RESERVE is for them);
what --compile or --fsdp would save. No plan for cuda has been held against a GPU yet: none was at hand.

tests/test_bench.py holds the plan for a CPU against a real step there, by Tracker and by PyTorch's allocator.
"""

import contextlib
import functools
import importlib.util
import math
import os
import re
import sys
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch._library.custom_ops import _maybe_get_opdef
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    import triton
except ImportError:
    triton = None

ROOT = Path(__file__).parent.parent
MB, GB = 2**20, 2**30
CARDS = (8, 12, 16, 24)  # GB
RESERVE = dict(
    cuda=(0.8 * GB, "0.8 GB of each is kept for the CUDA context, cuBLAS and fragmentation"),
    cpu=(0.5 * GB, "0.5 GB of each is kept for Python and PyTorch themselves"),
)
VOCAB = dict(gpt2=50257, byte=256, char=65)  # char: tiny Shakespeare's


def bad(message):
    print(f"memory.py: {message}", file=sys.stderr)
    raise SystemExit(2)


class Tracker(TorchDispatchMode):
    """Bytes of the storages that are alive, each counted once: from the operator that returns it until nobody holds it.

    A storage that comes in as an argument was there before, so it belongs to all of the time since, and to the peak.
    fake: no values, so .item() gives 1 (the gradient of the loss, an optimizer's first step). inside: run a custom op's
    body instead of its fake implementation, and so see what it allocates.
    """

    def __init__(self, fake=False, inside=False, unit=1):
        super().__init__()
        self.fake, self.inside, self.unit = fake, inside, unit
        self.live = self.peak = 0
        self.known = {}  # address of a storage -> weak reference, whose callback takes it off again

    def see(self, tree, before):
        for t in tree_leaves(tree):
            if not isinstance(t, torch.Tensor):
                continue
            storage = t.untyped_storage()
            key, size = storage._cdata, -(-storage.nbytes() // self.unit) * self.unit
            if key not in self.known:
                self.known[key] = weakref.ref(storage, lambda _, key=key, size=size: self.free(key, size))
                self.live += size
                self.peak = self.peak + size if before else max(self.peak, self.live)

    def free(self, key, size):
        del self.known[key]
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.see((args, kwargs), before=True)
        if self.fake and func in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            return 1
        op = _maybe_get_opdef(func) if self.inside else None
        if op is None:
            out = func(*args, **kwargs)
        else:
            with self:
                out = op._init_fn(*args, **kwargs)
        self.see(out, before=False)
        return out


def peak_of(step):
    """The most bytes that CPU tensors hold while step() runs, with those that were there before and that it uses."""
    with Tracker() as tracker:
        step()
    return tracker.peak


class LikeCuda(TorchFunctionMode):
    """What CUDA does and a CPU does not: flash attention with dropout, dropout that keeps one byte of mask an element,
    and autocast's list of operations in fp32."""

    FP32 = set(
        "acos asin cosh cross_entropy cumprod cumsum erfinv exp expm1 group_norm kl_div l1_loss layer_norm log log10 "
        "log1p log2 log_softmax mse_loss nll_loss norm normalize pow prod reciprocal rsqrt sinh smooth_l1_loss softmax "
        "softmin softplus sum tan __pow__ __rpow__".split()
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, cast = kwargs or {}, torch.is_autocast_enabled("cpu")
        if func is torch.Tensor.backward:  # which leaves this mode, and --ckpt computes the forward again in there
            with self:
                return _engine_run_backward(args, (torch.ones_like(args[0]),), False, False, (), accumulate_grad=True)
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self.attention(cast, *args, **kwargs)
        if func is torch.nn.functional.dropout:
            return self.dropout(*args, **kwargs)
        if cast and getattr(func, "__name__", "") in self.FP32:
            wide = lambda t: t.float() if isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16 else t
            args, kwargs = [wide(a) for a in args], {k: wide(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)

    @staticmethod
    def dropout(x, p=0.5, training=True, inplace=False):
        return torch.native_dropout(x, p, training)[0] if training and p else x

    @staticmethod
    def attention(cast, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        aten = torch.ops.aten
        q, k, v = (t.bfloat16() if cast else t for t in (q, k, v))
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        if attn_mask is None and q.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -math.inf)
            attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


@contextlib.contextmanager
def dry(fakes, device):
    """Inside, tensors are fake ones; for cuda they pass for a GPU's and a Triton launch does nothing."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(fakes)
        if device == "cuda":
            rtx_4070 = mock.Mock(multi_processor_count=46, major=8, minor=9)
            stack.enter_context(mock.patch.object(FakeTensor, "is_cuda", True, create=True))
            stack.enter_context(mock.patch.object(FakeTensor, "is_cpu", False, create=True))
            stack.enter_context(mock.patch("torch.cuda.get_device_properties", lambda *_: rtx_4070))
            stack.enter_context(mock.patch("torch.cuda.get_device_capability", lambda *_: (8, 9)))
            stack.enter_context(LikeCuda())
            if triton:
                nothing = lambda self, grid: lambda *args, **kwargs: None
                stack.enter_context(mock.patch("triton.runtime.jit.KernelInterface.__getitem__", nothing))
        yield


def pictures(module, cfg, batch):
    """A batch of the right shapes for dit.py or unet.py."""
    cond = dict(none=torch.zeros(batch).long(), text=torch.randint(32, 127, (batch, cfg.captions))).get(cfg.cond)
    cond = (torch.randint(max(1, cfg.classes), (batch,)) if cond is None
            else torch.randn(*cond.shape, cfg.features) if cfg.features else cond)
    x = torch.randn(batch, *module.Model.noise_shape(cfg))
    return x, cond, torch.rand(batch, 2), torch.randn_like(x)


class Run:
    """A model, its optimizers, and its training step as the file's train() does it. device None: for real, on a CPU."""

    def __init__(self, module, cfg, device=None):
        self.module, self.cfg, self.device = module, cfg, device
        self.cast = cfg.dtype == "bf16" or cfg.dtype == "auto" and device == "cuda"
        # a fake tensor knows its mode: one for all steps. Tables that an op keeps are real, and become fake in there
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        with self.world():
            self.model = module.Model(cfg)
            self.goal = self.model.objective() if hasattr(self.model, "objective") else self.model  # a batch -> loss
            if hasattr(self.model, "prepare"):  # as in train(): a frozen base is held in bf16
                self.model.prepare(self.cast)
            self.optimizers = module.make_optimizers(self.model, cfg)
            self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.peak(1)  # from now on the optimizers have their states

    def world(self):
        return dry(self.fakes, self.device) if self.device else contextlib.nullcontext()

    def step(self, batch):
        tensors = (pictures(self.module, self.cfg, batch) if hasattr(self.module, "Images")
                   else torch.randint(self.cfg.vocab, (2, batch, self.cfg.seq)))
        total = 0.0
        for _ in range(min(self.cfg.accum, 2)):  # from the second on, gradients are there during the forward pass
            with torch.autocast("cpu", torch.bfloat16, self.cast):
                loss = self.goal(*tensors) / self.cfg.accum
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(self.params, self.cfg.clip or math.inf)
        for o in self.optimizers:
            o.step()
            o.zero_grad(set_to_none=True)

    def peak(self, batch):
        """Bytes at the worst moment of a step."""
        inside = self.device == "cuda" and triton is not None and os.environ.get("KERNELS", "") in ("", "triton")
        with self.world(), Tracker(bool(self.device), inside, self.unit()) as tracker:
            self.step(batch)
        return tracker.peak

    def unit(self):
        return 512 if self.device == "cuda" else 1

    def fixed(self):
        """-> bytes of parameters, gradients, optimizer states."""

        def size(tensors):
            storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}
            return sum(-(-n // self.unit()) * self.unit() for n in storages.values())

        states = [t for t in tree_leaves([list(o.state.values()) for o in self.optimizers]) if torch.is_tensor(t)]
        packed = [t for m in self.model.modules() for t in (getattr(m, "nf4", None) or {}).values()
                  if torch.is_tensor(t)]  # of QLoRA
        return size([*self.model.parameters(), *packed]), size(self.params), size(states)


def allocated_peak(step):
    """peak_of() by other means: what PyTorch's CPU allocator reports during step(), on top of what it held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        step()
    events, found = list(p.profiler.kineto_results.experimental_event_tree()), []
    while events:
        e = events.pop()
        events += e.children
        if e.tag == torch._C._profiler._EventType.Allocation:
            found.append((e.start_time_ns, e.extra_fields.alloc_size))
    live = peak = 0
    for _, size in sorted(found, key=lambda pair: pair[0]):
        live += size
        peak = max(peak, live)
    return peak


def measure(module, cfg):
    """The step for real, on the CPU -> its peak by Tracker, and by the allocator."""
    run = Run(module, cfg)
    parameters, _, states = run.fixed()
    return run.peak(cfg.batch), parameters + states + allocated_peak(lambda: run.step(cfg.batch))


def largest(peak, room, batch):
    """The largest batch with peak(batch) <= room; 0 if none is. A line through two runs proposes, runs decide."""
    a, b, fits, fails, tries = batch, 2 * batch, 0, math.inf, 0
    for n in (a, b):
        fits, fails = (max(fits, n), fails) if peak(n) <= room else (fits, min(fails, n))
    while fails - fits > 1:
        slope = max(1, (peak(b) - peak(a)) / (b - a))
        n = b + math.floor((room - peak(b)) / slope) if tries < 6 or fails == math.inf else (fits + fails) // 2
        n = min(max(n, fits + 1), fails - 1, 16 * b)
        a, b, tries = b, n, tries + 1
        fits, fails = (n, fails) if peak(n) <= room else (fits, n)
    return fits


def load(path):
    """The model file as a module; kernels/ is found beside it."""
    path = Path(path)
    if not path.is_file():
        bad(f"{path}: no such file; the first argument is a model file, such as gpt2.py")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location("model_file", path)
    if spec is None:
        bad(f"{path}: no Python file")
    module = sys.modules["model_file"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # whatever a foreign file does
        bad(f"{path}: cannot be loaded ({type(e).__name__}: {e})")
    missing = [name for name in ("Config", "PRESETS", "Model", "parse", "make_optimizers") if not hasattr(module, name)]
    if missing or not (hasattr(module.Config, "seq") or hasattr(module, "Images")):
        bad(f"{path}: no model of this collection (it has no {', '.join(missing) or 'Config.seq'})")
    return module


def configure(module, flags):
    """-> the Config that these flags give, with dtype and vocabulary settled, and the device to plan for."""
    preset, given = module.parse(flags)
    device = given.get("device") or "cuda"
    if device not in RESERVE:
        bad(f"--device {device}: cuda or cpu can be planned")
    if device == "cuda" and "preset" not in given and "gpu" in module.PRESETS:
        preset, given = module.parse([*flags, "--preset", "gpu"])
    if given.get("init") or given.get("resume"):
        bad("--init and --resume: name the sizes instead (--preset, --layers, --dim, ...)")
    cfg = module.Config(**preset | given)
    if hasattr(module, "Images"):  # pictures: what the data would tell
        cfg.size, cfg.channels, cfg.classes = cfg.size or 32, cfg.channels or 3, cfg.classes or 10
    elif not cfg.vocab:
        script = ROOT / "data" / f"{cfg.data}.py"
        own = re.search(r'^NAME, TOK = "\w+", "(\w+)"', script.read_text(), re.M) if script.is_file() else None
        tok = cfg.tok or (own[1] if own else "char" if cfg.data.endswith((".txt", ".jsonl")) else "gpt2")
        cfg.vocab = VOCAB.get(tok) or module.Tokenizer(tok).vocab
    return cfg, device


def table(names, device="cuda"):
    """Every preset of every file, as it is and with --ckpt --optim adamw8bit: the largest batch on each card."""
    saving = ["--ckpt", "--optim", "adamw8bit"]
    print("| file, preset | parameters | batch: peak | " + " | ".join(f"{c} GB" for c in CARDS)
          + f" | `{' '.join(saving)}`: " + " | ".join(f"{c} GB" for c in CARDS) + " |")
    print("|---" * (3 + 2 * len(CARDS)) + "|")
    for name in names or sorted(p.name for p in ROOT.glob("*.py")):
        presets = load(ROOT / name).PRESETS
        for preset in [p for p in presets if p != "cpu"]:
            cells = []
            for flags in ([], saving):
                module = load(ROOT / name)
                cfg, _ = configure(module, ["--preset", preset, *flags])
                run = Run(module, cfg, device)
                peak = functools.cache(run.peak)
                if not flags:
                    count = sum(p.numel() for p in run.model.parameters())
                    cells.append(f"{cfg.batch}: {peak(cfg.batch) / GB:.2f} GB")
                least = sum(run.fixed())
                room = [card * GB - RESERVE[device][0] for card in CARDS]
                cells += [f"{largest(peak, r, cfg.batch) or '-'}" if least < r else "-" for r in room]
            print(f"| `{name} --preset {preset}` | {count / 1e6:,.1f}M | {' | '.join(cells)} |", flush=True)


def plan(file, flags):
    module = load(file)
    cfg, device = configure(module, flags)
    run = Run(module, cfg, device)
    peak = functools.cache(run.peak)
    name, fixed, top = Path(file).name, run.fixed(), peak(cfg.batch)
    ops, count = sys.modules.get("kernels.norm"), sum(p.numel() for p in run.model.parameters())
    form = f"kernels/ ({'triton' if device == 'cuda' and triton else 'torch'})" if ops else "plain PyTorch"
    images = hasattr(module, "Images")
    what = f"pictures of {cfg.size} x {cfg.size} x {cfg.channels}" if images else f"vocabulary {cfg.vocab:,}"
    seq, unit = ("", "pictures") if images else (f"{cfg.seq} x ", "tokens")
    how = f"{cfg.optim}, {'bf16 autocast' if run.cast else 'fp32'}{', ckpt' * cfg.ckpt}"
    print(f"{name} --preset {cfg.preset}: {count:,} parameters, {what}")
    print(f"{cfg.batch} x {seq}{cfg.accum} {unit} a step | {how} | {form} | a dry run for {device}\n")
    parts = ("parameters", "gradients", "optimizer state", "activations etc.")
    for what, size in zip(parts, (*fixed, top - sum(fixed))):
        print(f"{what:20}{size / MB:10,.1f} MB")
    print(f"{'peak of a step':20}{top / MB:10,.1f} MB = {top / GB:.2f} GB\n")
    reserve, why = RESERVE[device]
    print(f"{'memory':10}{f'batch {cfg.batch}':>12}{'largest batch':>16}{'its peak':>12}")
    for card in CARDS:
        room = card * GB - reserve
        most = largest(peak, room, cfg.batch)
        its = f"{peak(most) / GB:.2f} GB" if most else "-"
        print(f"{card:>3} GB    {'fits' if top <= room else 'no':>12}{most or 'none':>16}{its:>12}", flush=True)
    print(why)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    if sys.argv[1] == "--table":
        table(sys.argv[2:])
    else:
        plan(sys.argv[1], sys.argv[2:])
