"""
The source of Python's own library, as it lies on every machine: about 10 MB of real text without a network
(licence: PSF). One file in twenty, chosen by a hash of its path, is val; the rest is train. The same Python version
gives the same text: tests, optional parts and files made by the installation are left out.

    python data/stdlib.py                       bytes
    python data/stdlib.py --tok gpt2

--url takes another folder of .py files.
"""
import hashlib
import os
import platform
import sys
import sysconfig
from pathlib import Path

import common

NAME, TOK = "stdlib", "byte"
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests",  # these and the next: not everywhere
            "idlelib", "tkinter", "turtledemo", "turtle.py", "ensurepip", "distutils", "lib2to3"}
MADE = ("_sysconfigdata", "_sysconfig_vars", "config-", "sitecustomize", "usercustomize")  # differ by machine


def sources(root):
    """(path below root, text as utf-8), sorted by path."""
    found = {}
    for folder, below, files in os.walk(root):
        below[:] = [d for d in below if d not in LEFT_OUT and not d.startswith(MADE)]  # where os.walk goes next
        for file in files:
            if file.endswith(".py") and file not in LEFT_OUT and not file.startswith(MADE):
                path = Path(folder, file)
                found[path.relative_to(root).as_posix()] = path
    for name, path in sorted(found.items()):
        text = path.read_bytes().replace(b"\r\n", b"\n")  # Windows
        if text.strip():
            yield name, text.decode("utf-8", "replace").encode()


def main(argv=None):
    args = common.parser(__doc__, NAME, TOK).parse_args(argv)
    out, _ = common.folders(NAME, args)
    root = Path(args.url or sysconfig.get_paths()["stdlib"])
    files = list(sources(root))
    if not files:
        raise common.DataError(f"{root}: no .py files there")
    splits = {"train": [text for name, text in files if not common.held_out(name)],
              "val": [text for name, text in files if common.held_out(name)]}
    digest = hashlib.sha256(b"".join(splits["train"] + splits["val"])).hexdigest()
    common.write_bins(out, NAME, args.tok, {s: lambda t=texts: t for s, texts in splits.items()}, documents=True,
                      source=f"Python {platform.python_version()}, {len(files)} files", sha256=digest)


if __name__ == "__main__":
    sys.exit(common.run(main))
