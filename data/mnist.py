"""
MNIST: 70,000 handwritten digits, 28 x 28 in grey (LeCun, Cortes and Burges; CC BY-SA 3.0). No mirrored digits.

    python data/mnist.py                        60,000 + 10,000 pictures
    python data/mnist.py --url FOLDER           the four .gz files from a mirror, or from a local folder
"""
import gzip
import struct
import sys
import zlib

import common
import numpy as np

NAME, PICTURES = "mnist", True
URL = "https://ossci-datasets.s3.amazonaws.com/mnist"
NAMES = "zero one two three four five six seven eight nine".split()
FILES = {  # md5
    "train": ("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873",
              "train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
    "val": ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
}  # fmt: skip


def read_idx(path):
    """IDX, gzipped: big-endian magic 0x0000080n (unsigned bytes, n dimensions), the n sizes, the numbers."""
    try:
        raw = gzip.decompress(path.read_bytes())
        n = raw[3]
        shape = struct.unpack(f">{n}I", raw[4 : 4 + 4 * n])
        if raw[:3] != b"\0\0\x08":
            raise ValueError
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * n).reshape(shape)
    except (ValueError, IndexError, struct.error, EOFError, OSError, zlib.error):
        raise common.DataError(f"{path}: no gzipped IDX file of bytes, or a damaged one") from None


def build(argv, doc, name, url, files, names, caption, flip):
    """What this set and Fashion-MNIST share."""
    args = common.parser(doc, name).parse_args(argv)
    out, cache = common.folders(name, args)
    splits = {}
    for split, (images, images_md5, labels, labels_md5) in files.items():
        found = [read_idx(common.locate(args, url, cache, None, f"md5:{md5}", file))
                 for file, md5 in ((images, images_md5), (labels, labels_md5))]
        x, y = found
        if len(x) != len(y):
            raise common.DataError(f"{name}: {len(x)} pictures and {len(y)} labels in {split}")
        splits[split] = dict(images=x[..., None], labels=y.astype(np.int64),
                             captions=np.array([caption(names[i]) for i in y]))
    common.write_pictures(out, name, splits, names=names, flip=flip, source=args.url or url)


def main(argv=None):
    build(argv, __doc__, NAME, URL, FILES, NAMES, lambda digit: f"the digit {digit}", flip=False)


if __name__ == "__main__":
    sys.exit(common.run(main))
