"""The README's table is what bench/files.py makes of the files and of bench/RESULTS.md."""

import importlib.util
import re

from house import ROOT

spec = importlib.util.spec_from_file_location("files", ROOT / "bench" / "files.py")
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)


def test_table():
    shown = re.search(r"<!-- files -->\n(.*?)\n<!-- end -->", (ROOT / "README.md").read_text(), re.S)[1]
    assert shown == "\n".join(files.table()), "python bench/files.py table --write"


def test_every_model_file_has_a_row():
    models = {p.name for p in ROOT.glob("*.py") if "# ----- main (shared) -----" in p.read_text()}
    assert models == set(files.FILES)
