"""What a picture of the set `shapes` shows, by rules; and how often a model's samples show what they were asked for.

    python tests/shapes_judge.py dit.py out/dit                 64 samples at guidance 3: how many show colour and form
    python tests/shapes_judge.py unet.py out/unet --number 128

test_shapes.py holds the rules against real pictures and against wrong ones.
"""

import argparse
import importlib
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from shapes import COLOURS, FORMS, outside  # noqa: E402


def judge(picture):
    """(h, w, 3) uint8 -> (colour, form, "small" or "large"), or None where no form fits.

    Colour: the nearest to the mean of the most saturated pixels, the background being grey. Form: of all forms drawn
    where the saturated pixels lie, the one that covers them best (intersection over union, at least 0.65).
    """
    p = picture.astype(np.float64)
    saturation = p.max(2) - p.min(2)  # 0 on grey
    if np.percentile(saturation, 99) < 60:
        return None
    strong = saturation > 0.75 * np.percentile(saturation, 99)
    mean = p[strong].mean(0)
    colour = min(COLOURS, key=lambda c: np.linalg.norm(mean - COLOURS[c]))
    cover = (saturation / np.median(saturation[strong])).clip(0, 1)  # how much of a pixel the shape covers
    cover[cover < 0.15] = 0
    ys, xs = np.nonzero(cover > 0.5)
    if len(ys) < 9:
        return None
    top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    at, best = np.arange(len(p)) + 0.5, (0.0, None, 0.0)
    for form in FORMS:
        height = {"square": 1.7, "triangle": 1.5}.get(form, 2.0)  # of radius 1
        for r in (bottom - top) / height * np.array([0.9, 1.0, 1.1]):
            for dx in (-0.5, 0, 0.5):
                for dy in (-0.5, 0, 0.5):
                    y0 = (bottom - 0.5 * r if form == "triangle" else (top + bottom) / 2) + dy
                    drawn = np.clip(
                        0.5 - outside(form, at[None, :] - (left + right) / 2 - dx, at[:, None] - y0, r), 0, 1)
                    fit = np.minimum(drawn, cover).sum() / np.maximum(drawn, cover).sum()
                    best = max(best, (fit, form, r), key=lambda b: b[0])
    fit, form, r = best
    return (colour, form, "large" if r > 0.29 * len(p) else "small") if fit >= 0.65 else None


def judge_samples(module, folder, number, guidance, seed=0, steps=50):
    """-> the captions asked for (every colour and form in turn), what judge() says, the pictures (n, h, w, 3) uint8."""
    import torch

    model = module.Model.from_pretrained(folder)
    tok = module.load_tokenizer(Path(folder), 0)
    kinds = [(c, f) for c in COLOURS for f in FORMS]
    asked = [kinds[7 * i % len(kinds)] for i in range(number)]
    texts = [f"{c} {f}" if tok.kind == "class" else f"a {('small', 'large')[i // len(kinds) % 2]} {c} {f}"
             for i, (c, f) in enumerate(asked)]
    cond = torch.from_numpy(tok.encode(texts, model.cfg.captions))
    g = torch.Generator().manual_seed(seed)
    cfg, model = model.cfg, model.eval()
    x = torch.cat([module.decode(cfg, model, model.sample(c, steps, guidance, g, clip=cfg.channels in (1, 3)))
                   for c in cond.split(32)])
    pictures = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return asked, [judge(p) for p in pictures], pictures


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", help="dit.py or unet.py")
    p.add_argument("folder", help="of a run on shapes")
    p.add_argument("--number", type=int, default=64)
    p.add_argument("--guidance", type=float, default=3.0)
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    asked, found, pictures = judge_samples(
        importlib.import_module(Path(a.file).stem), a.folder, a.number, a.guidance, a.seed, a.steps)
    right = [f is not None and f[:2] == w for w, f in zip(asked, found)]
    for w, f, ok in zip(asked, found, right):
        if not ok:
            print(f"asked {' '.join(w)}, seen {' '.join(f) if f else 'no form'}")
    colour = sum(f is not None and f[0] == w[0] for w, f in zip(asked, found))
    form = sum(f is not None and f[1] == w[1] for w, f in zip(asked, found))
    print(f"{sum(right)} of {len(right)} show the asked colour and form ({sum(right) / len(right):.0%}); "
          f"the colour {colour}, the form {form}")
