"""
Shapes: drawn here, so that nothing is downloaded. One shape a picture: six colours, five forms, small or large, on dark
or light grey, with a label ("red circle") and a caption ("a small red circle"; a quarter of them without the size).

    python data/shapes.py                       20,000 + 1,000 pictures of 32 x 32
    python data/shapes.py --size 64             of 64 x 64, into data/shapes/64
"""
import sys

import common
import numpy as np

NAME, PICTURES = "shapes", True


# ----- shapes (shared) -----
COLOURS = dict(red=(220, 40, 40), green=(40, 180, 60), blue=(50, 80, 230), yellow=(235, 210, 30),
               purple=(170, 50, 200), cyan=(30, 200, 210))  # fmt: skip
FORMS = ("circle", "square", "triangle", "ring", "cross")


def outside(form, x, y, r):
    """How far (x, y) lies outside a form of radius r around 0, in pixels; negative inside."""
    if form == "circle":
        return np.hypot(x, y) - r
    if form == "ring":
        return abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r
    if form == "square":
        return np.maximum(abs(x), abs(y)) - 0.85 * r
    if form == "triangle":
        return np.maximum(abs(x) * 0.866 - y * 0.5 - 0.5 * r, y - 0.5 * r)
    return np.minimum(np.maximum(abs(x) - r, abs(y) - 0.33 * r), np.maximum(abs(y) - r, abs(x) - 0.33 * r))  # cross


def draw_shapes(n, size, seed):
    """n pictures of a shape each -> images (n, size, size, 3) uint8, labels (n,), captions (n,), the labels' names."""
    rng = np.random.default_rng((seed, size))
    names = [f"{c} {f}" for c in COLOURS for f in FORMS]
    labels, large, told = rng.integers(len(names), size=n), rng.random(n) < 0.5, rng.random(n) < 0.75
    r = size * np.where(large, rng.uniform(0.36, 0.38, n), rng.uniform(0.22, 0.235, n))
    x, y = size * rng.uniform(0.47, 0.53, (2, n))  # the centre, near the picture's: what can be learned in minutes
    grey = 255 * np.where(rng.random(n) < 0.5, rng.uniform(0, 0.2, n), rng.uniform(0.8, 1, n))
    colour = np.array(list(COLOURS.values()))[labels // len(FORMS)] + rng.uniform(-15, 15, (n, 3))  # (n, 3)
    at = np.arange(size) + 0.5
    images = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        d = outside(FORMS[labels[i] % len(FORMS)], at[None, :] - x[i], at[:, None] - y[i], r[i])
        cover = np.clip(0.5 - d, 0, 1)[..., None]  # an edge that passes through a pixel covers a part of it
        images[i] = (grey[i] + cover * (colour[i] - grey[i])).clip(0, 255)
    captions = [f"a {('large ' if big else 'small ') if t else ''}{names[k]}" for k, big, t in zip(labels, large, told)]
    return images, labels, np.array(captions), names


# ----- end -----


def main(argv=None):
    p = common.parser(__doc__, NAME)
    p.add_argument("--size", type=int, default=32, help="side of a picture (default 32)")
    args = p.parse_args(argv)
    if args.size < 16:
        raise common.DataError(f"--size {args.size}: at least 16, so that forms can be told apart")
    out, _ = common.folders(f"{NAME}/{args.size}" if args.size != 32 else NAME, args)
    splits = {}
    for seed, (split, n) in enumerate({"train": 20_000, "val": 1_000}.items()):
        images, labels, captions, names = draw_shapes(n, args.size, seed)
        splits[split] = dict(images=images, labels=labels, captions=captions)
    common.write_pictures(out, NAME, splits, names=names, flip=True)


if __name__ == "__main__":
    sys.exit(common.run(main))
