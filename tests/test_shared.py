"""The shared sections are identical, and the check that says so can fail."""

import shutil

from shared_sections import ROOT, differences


def test_identical():
    assert differences() == []


def test_a_difference_is_found_and_mended(tmp_path):
    shutil.copy(ROOT / "gpt2.py", tmp_path)
    text = (ROOT / "gpt2.py").read_text()
    (tmp_path / "copy.py").write_text(text.replace("def flag(name):", "def flag(nom):"))
    found = differences(tmp_path)
    assert len(found) == 1 and "copy.py: section cli differs from gpt2.py" in found[0] and "flag(n" in found[0]
    differences(tmp_path, write=True)
    assert (tmp_path / "copy.py").read_text() == text and differences(tmp_path) == []
    (tmp_path / "copy.py").write_text(text.replace("# ----- end -----\n", "", 1))
    assert differences(tmp_path)
