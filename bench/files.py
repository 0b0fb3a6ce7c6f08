"""The files side by side: what each is, how long, how far from gpt2.py, what its `cpu` preset reaches in which time.

    python bench/files.py run                    the cpu presets that need no base, in turn: rows of bench/RESULTS.md
    python bench/files.py run mamba.py retnet.py --data my.txt
    python bench/files.py table --write          the README's table, from the files, this script and bench/RESULTS.md

tests/test_readme.py checks that the README's table is what `table` prints. During `run` the machine must be idle.
"""

import argparse
import csv
import difflib
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# file -> paper, what is special, which official checkpoints load and are saved
FILES = {
    "gpt2.py": (
        "Radford et al. 2019",
        "attention over all earlier tokens, learned positions; what the others are compared with",
        "OpenAI's GPT-2 (Hugging Face folders and names), llm.c's `.bin` (load)",
    ),
    "mamba.py": (
        "[Gu & Dao 2023](https://arxiv.org/abs/2312.00752), [Dao & Gu 2024](https://arxiv.org/abs/2405.21060)",
        "a state per channel whose step and vectors depend on the token (`--version 1`); "
        "the same as matrix products (`--version 2`)",
        "state-spaces/mamba-\\* and mamba2-\\*, in both forms",
    ),
    "rwkv.py": (
        "[Peng et al. 2025](https://arxiv.org/abs/2503.14456)",
        "RWKV-7: a matrix state that is decayed, corrected and written per token (delta rule)",
        "BlinkDL's `.pth`",
    ),
    "retnet.py": (
        "[Sun et al. 2023](https://arxiv.org/abs/2307.08621)",
        "attention without the softmax: parallel, recurrent and chunkwise form of one layer",
        "torchscale's state dicts (none trained was released)",
    ),
    "bitnet.py": (
        "[Ma et al. 2024](https://arxiv.org/abs/2402.17764), [2025](https://arxiv.org/abs/2504.12285)",
        "weights in -1, 0, 1 and activations in 8 bits, trained so and run from 2 bits a weight",
        "microsoft/bitnet-b1.58-2B-4T, master and packed",
    ),
    "moe.py": (
        "[Jiang et al. 2024](https://arxiv.org/abs/2401.04088)",
        "eight feed-forward layers, two of them at work for each token; upcycling and merging",
        "Mixtral (Hugging Face), Grok-1 (load)",
    ),
    "lora_finetune.py": (
        "[Hu et al. 2021](https://arxiv.org/abs/2106.09685), [Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)",
        "a frozen Llama, in 16 or 4 bits, and the few million numbers that are trained",
        "Llama 1 to 3, Mistral, SmolLM2, TinyLlama; PEFT's adapters",
    ),
    "dit.py": (
        "[Peebles & Xie 2022](https://arxiv.org/abs/2212.09748), [Chen et al. 2023](https://arxiv.org/abs/2310.00426)",
        "diffusion with a Transformer: class labels or captions, DDPM or flow matching",
        "DiT-XL-2 and all sizes, PixArt-alpha",
    ),
    "unet.py": (
        "[Rombach et al. 2022](https://arxiv.org/abs/2112.10752)",
        "Stable Diffusion in one file: U-Net, autoencoder, text encoder",
        "Stable Diffusion 1.x (diffusers folders)",
    ),
}  # fmt: skip
# the rows that are trained: name in RESULTS.md -> command line
RUNS = ({f: f for f in FILES if f not in ("mamba.py", "lora_finetune.py")}
        | {"mamba.py": "mamba.py --version 1", "mamba.py --version 2": "mamba.py --version 2"})


def lines(file):
    return (ROOT / file).read_text().splitlines()


def own(file):
    """Lines outside the shared sections: the architecture."""
    text = re.sub(r"^# ----- \w+ \(shared\) -----\n.*?^# ----- end -----\n", "", (ROOT / file).read_text(),
                  flags=re.S | re.M)
    return len(text.splitlines())


def changed(file):
    """Lines of the file that `diff gpt2.py file` marks with >."""
    matcher = difflib.SequenceMatcher(None, lines("gpt2.py"), lines(file), autojunk=False)
    return sum(j2 - j1 for tag, _, _, j1, j2 in matcher.get_opcodes() if tag in ("replace", "insert"))


def measured():
    """file -> (seconds, val loss), from the table that `run` printed into RESULTS.md."""
    rows = re.findall(r"^\| `python (\S+)([^`]*)` \| ([\d,]+) s \| ([\d.]+) \|",
                      (ROOT / "bench/RESULTS.md").read_text(), re.M)
    return {file + ("" if more in ("", " --version 1") else more): (seconds, loss)
            for file, more, seconds, loss in rows}


def table():
    found = measured()
    yield ("| file | paper | special | official checkpoints, both ways | lines (its own) | changed against gpt2.py "
           "| `cpu` preset: s, val loss |")
    yield "|---" * 7 + "|"
    for file, (paper, special, checkpoints) in FILES.items():
        reached = "; ".join(f"{s} s, {loss}" for name, (s, loss) in found.items() if name.split()[0] == file) or "-"
        away = f"{changed(file):,}" if file != "gpt2.py" else ""
        yield (f"| `{file}` | {paper} | {special} | {checkpoints} | {len(lines(file)):,} ({own(file):,}) "
               f"| {away} | {reached} |")


def run(names, data):
    print("| command | wall time | val loss |\n|---|---|---|", flush=True)
    for name in names or RUNS:
        out, start = ROOT / "out" / "files" / name.replace(" ", ""), time.perf_counter()
        pictures = name in ("dit.py", "unet.py")
        where = [] if pictures or not data else ["--data", data]
        command = [sys.executable, *f"{ROOT}/{RUNS[name]}".split(), *where, "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"files.py: {name} failed:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
        seconds = time.perf_counter() - start
        with open(out / "log.csv", newline="") as f:
            val = [float(r["val"]) for r in csv.DictReader(f) if r["val"]][-1]
        print(f"| `python {RUNS[name]}` | {seconds:.0f} s | {val:.3f} |", flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["run", "table"])
    p.add_argument("names", nargs="*", metavar="file", help=f"of run; default: {' '.join(RUNS)}")
    p.add_argument("--data", default="", help="text for the language models; default: their own")
    p.add_argument("--write", action="store_true", help="of table: into README.md")
    a = p.parse_args(argv)
    for name in a.names:
        if name not in RUNS:
            p.error(f"{name}: one of {', '.join(RUNS)}")
    if a.what == "run":
        return run(a.names, a.data)
    text = "\n".join(table())
    if not a.write:
        return print(text)
    readme = ROOT / "README.md"
    readme.write_text(re.sub(r"(<!-- files -->\n).*?(<!-- end -->)", lambda m: m[1] + text + "\n" + m[2],
                             readme.read_text(), flags=re.S))


if __name__ == "__main__":
    main()
