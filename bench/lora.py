"""lora_finetune.py against peft on transformers: time and memory of a step, and what the same steps learn.

    python bench/lora.py step                           the shape of SmolLM2-135M, random weights, one row of 256 tokens
    python bench/lora.py step --answers 128             the same, half of the tokens being a question, not in the loss
    python bench/lora.py learn BASE DATA --steps 200    same rows, order, seed, settings; held-out loss every 100 steps
    python bench/lora.py base BASE TEXT                 logits against transformers; perplexity of 2,000 characters; NF4

Both train A and B of rank 8 on all linear layers with AdamW. `step` takes turns, as bench/speed.py does; MB is the most
that tensors hold during a step, weights included (peak_of in bench/memory.py). `learn` gives peft our first A.
"""

import argparse
import ctypes
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from memory import peak_of  # noqa: E402
from speed import rounds, stepper, table  # noqa: E402

import lora_finetune as ours  # noqa: E402

SMOLLM2 = dict(layers=30, heads=9, kv_heads=3, head_dim=64, dim=576, ffn=1536, vocab=49152, positions=8192, theta=1e5)


def with_peft(model, cfg):
    """transformers' model -> peft's, and its AdamW."""
    from peft import LoraConfig, get_peft_model

    how = dict(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=cfg.targets.split(","), task_type="CAUSAL_LM")
    model = get_peft_model(model, LoraConfig(**how))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.lr,
                                    betas=(0.9, cfg.beta2), weight_decay=cfg.wd)


def step(a):
    from transformers import LlamaConfig, LlamaForCausalLM

    cfg = ours.Config(**SMOLLM2, seq=a.seq, batch=1)
    torch.manual_seed(0)
    model = ours.Model(cfg)
    model.prepare(a.bf16)  # as train() does: a frozen base in bf16
    c = {k: v for k, v in model.hf_config().items() if k not in ("model_type", "architectures")}
    theirs, optimizer = with_peft(LlamaForCausalLM(LlamaConfig(**c, use_cache=False)), cfg)
    x = torch.randint(cfg.vocab, (1, a.seq))
    y = x.roll(-1, 1)
    y[:, : a.seq - (a.answers or a.seq)] = -1
    loss = lambda x, y: theirs(input_ids=x, labels=x, shift_labels=y.where(y >= 0, -100)).loss
    made = {"lora_finetune.py": stepper(model, ours.make_optimizers(model, cfg), a.bf16),
            "peft": stepper(loss, [optimizer], a.bf16)}
    found = rounds({k: (lambda f=f: f(x, y)) for k, f in made.items()}, 2, a.rounds)
    title = (f"LoRA step, SmolLM2-135M's shape, T = {a.seq}, {a.answers or a.seq} of them in the loss, "
             f"{'bf16 autocast' if a.bf16 else 'fp32'}")
    table(title, found, "lora_finetune.py", "ms")
    for k, f in made.items():
        print(f"{k}: {peak_of(lambda f=f: f(x, y)) / 2**20:,.0f} MB", flush=True)


def learn(a):
    from transformers import AutoModelForCausalLM

    how = dict(method="lora", data=a.data, seq=a.seq, batch=a.batch, steps=a.steps, lr=a.lr, eval_iters=a.eval_iters,
               dtype="fp32")
    model = ours.Model.from_pretrained(a.base, **how)
    cfg, tok = model.cfg, ours.load_tokenizer(Path(a.base), model.cfg.vocab)
    train, val, _ = ours.load_data(cfg, {}, tok)
    theirs, optimizer = with_peft(AutoModelForCausalLM.from_pretrained(a.base, dtype=torch.float32), cfg)
    start = {k.replace(".lora_A.", ".lora_A.default."): p for k, p in model.named_parameters() if "lora_A" in k}
    for k, p in start.items():
        theirs.get_parameter(f"base_model.model.{k}").data.copy_(p.data)

    def loss(x, y):  # one example after another: transformers keeps packed ones apart only by a mask of our own making
        total, count = 0.0, (y >= 0).sum()
        x = x if x.ndim == 3 else torch.stack([x, torch.zeros_like(x)], 1)  # rows of one example come without segments
        for (tokens, segments), targets in zip(x, y):
            for s in range(int(segments.max()) + 1):
                own = segments == s
                logits = theirs(input_ids=tokens[None, own]).logits[0]
                total = total + F.cross_entropy(logits.float(), targets[own], ignore_index=-1, reduction="sum")
        return total / count

    sides = {"ours": (model, ours.make_optimizers(model, cfg)), "peft": (loss, [optimizer])}
    steps = {k: stepper(f, o, False) for k, (f, o) in sides.items() if not a.only or k == a.only}
    for i in range(a.steps + 1):
        if i % 100 == 0:
            with torch.no_grad():
                rows = [val.windows([j]) for j in val.fixed(cfg)]
                share = [(y >= 0).sum().item() for _, y in rows]
                held = {k: sum(sides[k][0](*r).item() * n for r, n in zip(rows, share)) / sum(share) for k in steps}
            print(f"step {i} | held-out loss " + " | ".join(f"{k} {v:.4f}" for k, v in held.items()), flush=True)
        if i < a.steps:
            for k, f in steps.items():
                (ours.set_lr(sides[k][1], i, cfg) if k == "ours"
                 else [g.update(lr=cfg.lr * ours.schedule(i, cfg)[0]) for g in optimizer.param_groups])
                f(*train.batch(cfg, i, 0, 0, 1))


@torch.no_grad()
def base(a):
    from transformers import AutoModelForCausalLM

    text = Path(a.text).read_text()[:2000]
    x = torch.from_numpy(ours.load_tokenizer(Path(a.base), 0).encode(text).astype("int64"))[None]
    want = AutoModelForCausalLM.from_pretrained(a.base, dtype=torch.float32).eval()(x).logits
    print(f"{x.shape[1]} tokens\n\n| | relative error of the logits | perplexity |\n|---|---|---|")
    for name, method in (("transformers", ""), ("fp32", "full"), ("NF4", "qlora")):
        logits = ours.Model.from_pretrained(a.base, method=method, dtype="fp32").eval()(x) if method else want
        found = F.cross_entropy(logits[0, :-1].float(), x[0, 1:]).exp().item()
        print(f"| {name} | {(logits - want).norm() / want.norm():.1e} | {found:.2f} |", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(required=True)
    s = sub.add_parser("step")
    s.set_defaults(run=step)
    s.add_argument("--answers", type=int, help="tokens in the loss, the last ones; default: all")
    s.add_argument("--seq", type=int, default=256)
    s.add_argument("--rounds", type=int, default=5)
    s.add_argument("--bf16", action="store_true", help="bf16 autocast for both, where the CPU has bf16 units")
    s = sub.add_parser("base")
    s.set_defaults(run=base)
    s.add_argument("base")
    s.add_argument("text")
    s = sub.add_parser("learn")
    s.set_defaults(run=learn)
    s.add_argument("base")
    s.add_argument("data")
    s.add_argument("--only", choices=["ours", "peft"])
    for k, v in dict(seq=256, batch=1, steps=200, lr=2e-4, eval_iters=40).items():
        s.add_argument("--" + k.replace("_", "-"), type=type(v), default=v)
    if sys.platform == "linux":  # for both, what train() does for ours: freed memory is kept for the next step
        ctypes.CDLL(None).mallopt(-1, 1 << 30)
        ctypes.CDLL(None).mallopt(-3, 1 << 30)
    a = p.parse_args()
    a.run(a)
