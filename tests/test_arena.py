"""bench/arena.py: equal sizes, and the two tasks of our own (data/recall.py, data/states.py) against plain Python."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from house import ROOT


def load(path):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


arena = load("bench/arena.py")


@pytest.mark.parametrize("row", arena.ROWS)
def test_sizes_agree(row):
    """1M within 5%, counted from the parameters' shapes alone."""
    with torch.device("meta") if row != "rwkv" else torch.device("cpu"):  # meta: no orthogonal initialisation there
        _, _, model = arena.model_of(row, arena.SIZES["1M"][row], vocab=65)
    assert abs(arena.body(model) / 1e6 - 1) < 0.05


@pytest.mark.parametrize("row", arena.ROWS)
def test_flags_are_known(row):
    """What a run passes is what the row's file takes."""
    file, *own = arena.ROWS[row].split()
    module = arena.load(file)
    for size in arena.SIZES:
        preset, given = module.parse([*own, *arena.SIZES[size][row].split(), *arena.TRAIN[size].split()])
        cfg = module.Config(**preset | given)
        dtype = {"1M": "fp32", "10M": "auto"}[size]
        assert (cfg.optim, cfg.dtype) == ("adamw", dtype) and cfg.batch * cfg.seq == 2048


def test_recall():
    recall = load("data/recall.py")
    tokens, targets = recall.examples(np.random.default_rng(0), 5, 6)
    assert tokens.shape == targets.shape == (5, 23)
    for row, want in zip(tokens.tolist(), targets.tolist()):
        known = dict(zip(row[:12:2], row[1:12:2]))
        assert len(known) == 6 and max(known) < 16 <= min(known.values())
        assert sorted(row[12::2]) == sorted(known), "each key is asked once"
        assert want == [-1] * 12 + [known[row[t]] if t % 2 == 0 else -1 for t in range(12, 23)]
        assert row[13::2] == want[12:-1:2], "the answers follow"
    with pytest.raises(ValueError, match="1 to 16"):
        recall.examples(np.random.default_rng(0), 1, 17)


def test_states():
    states = load("data/states.py")
    elements, _ = states.group(4)
    tokens, targets = states.examples(np.random.default_rng(0), 3, 9, 4)
    assert tokens.shape == (3, 9) and tokens.max() < math.factorial(4)
    for row, want in zip(tokens, targets):
        lie = list(range(4))
        for token, target in zip(row, want):
            lie = [elements[token][i] for i in lie]  # p after what was there
            assert lie == elements[target].tolist()


def test_learn():
    """A short training on the easiest of both is better than guessing, on examples that were not trained on."""
    recall = load("data/recall.py")
    draw = lambda rng, n: recall.examples(rng, n, 2)
    found, count = arena.learn("gpt2", draw, {"two": draw}, recall.VOCAB, 60, 0)
    assert found["two"] > 0.35, "1 / 16 by chance"
    assert 90_000 < count < 130_000


def test_bad_input(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(arena, "ROOT", tmp_path)  # where nothing has run
    with pytest.raises(SystemExit) as e:
        arena.run("gpt2", "1M", 77, "shakespeare", seconds=5)
    assert e.value.code == 2 and "run it without --seconds first" in capsys.readouterr().err
