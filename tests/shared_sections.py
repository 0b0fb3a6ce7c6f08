"""The sections that files share, `# ----- name (shared) -----` ... `# ----- end -----`, are the same text everywhere.

    python tests/shared_sections.py            names the first line that differs, exit code 1
    python tests/shared_sections.py --write    copies each owner's text into the other files
"""

import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECTION = re.compile(r"^# ----- (\w+) \(shared\) -----\n.*?^# ----- end -----\n", re.S | re.M)
# one owner per section: gpt2.py for text and for training, dit.py for images, a file of kernels/ for kernels
OWNER = {name: "gpt2.py"
         for name in ("cli", "data", "load", "schedule", "optimizer", "checkpoint", "read", "train", "sample", "main")}
OWNER |= {name: "dit.py" for name in ("diffusion", "shapes", "images")}
OWNER |= {"dispatch": "kernels/norm.py", "product": "kernels/matmul.py", "c": "kernels/bitlinear.py",
          "gemm": "kernels/attention.py"}


def sections(path):
    return {m.group(1): m.group(0) for m in SECTION.finditer(path.read_text())}


def differences(root=ROOT, write=False):
    """One line for each section that differs from its owner's, or has none; with write, mends them."""
    found = []
    own = {name: sections(root / file).get(name) for name, file in OWNER.items() if (root / file).is_file()}
    for path in sorted([*root.glob("*.py"), *root.glob("kernels/*.py"), *root.glob("data/*.py")]):
        text = path.read_text()
        if text.count(" (shared) -----\n") != len(SECTION.findall(text)):
            found.append(f"{path.relative_to(root)}: a shared section has no end mark, or stands in another one")
        for name, here in sections(path).items():
            if own.get(name) is None:
                found.append(f"{path.relative_to(root)}: no owner has a section {name}; see OWNER")
            elif here != own[name]:
                theirs, ours = own[name].splitlines(), here.splitlines()
                line = next(d for d in difflib.unified_diff(theirs, ours, lineterm="", n=0)
                            if d[0] in "+-" and d[:3] not in ("---", "+++"))
                found.append(f"{path.relative_to(root)}: section {name} differs from {OWNER[name]}: {line}")
                text = text.replace(here, own[name])
        if write and text != path.read_text():
            path.write_text(text)
    return found


if __name__ == "__main__":
    write = sys.argv[1:] == ["--write"]
    found = differences(write=write)
    print("\n".join(("written: " if write else "") + f for f in found) or "all shared sections are identical")
    sys.exit(bool(found) and not write)
