"""
CIFAR-10: 60,000 colour photographs of ten things, 32 x 32 (Krizhevsky 2009). Its binary form: nothing is unpickled.

    python data/cifar10.py                      50,000 + 10,000 pictures
"""
import io
import sys
import tarfile

import common
import numpy as np

NAME, PICTURES = "cifar10", True
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
DIGEST = "md5:c32a1d4ab5d03f1284b67883e8d87530"
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "val": ["test_batch.bin"]}


def main(argv=None):
    args = common.parser(__doc__, NAME).parse_args(argv)
    out, cache = common.folders(NAME, args)
    path, raw = common.locate(args, URL, cache, None, DIGEST), {}
    try:
        with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:  # read here, never unpacked onto the disk
            for m in tar:
                if m.isfile() and m.name.endswith(".bin"):
                    raw[m.name.rsplit("/", 1)[-1]] = np.frombuffer(tar.extractfile(m).read(), np.uint8)
    except (tarfile.TarError, EOFError, OSError) as e:
        raise common.DataError(f"{path}: no tar archive, or a damaged one ({e})") from None
    splits = {}
    for split, files in FILES.items():
        if missing := [f for f in files if f not in raw or raw[f].size % 3073]:
            raise common.DataError(f"{path}: {missing[0]} is missing, or not made of records of 3,073 bytes")
        rows = np.concatenate([raw[f] for f in files]).reshape(-1, 3073)  # label; 32 x 32 of red, of green, of blue
        labels = rows[:, 0].astype(np.int64)
        if labels.max() > 9:
            raise common.DataError(f"{path}: a label {labels.max()}, and there are ten")
        images = np.ascontiguousarray(rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        splits[split] = dict(images=images, labels=labels, captions=np.array([f"a {NAMES[i]}" for i in labels]))
    common.write_pictures(out, NAME, splits, names=NAMES, flip=True, source=args.url or URL)


if __name__ == "__main__":
    sys.exit(common.run(main))
