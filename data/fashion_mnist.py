"""
Fashion-MNIST: 70,000 pictures of clothes, 28 x 28 in grey (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747; MIT licence).

    python data/fashion_mnist.py                60,000 + 10,000 pictures
    python data/fashion_mnist.py --url FOLDER   the four .gz files from a mirror, or from a local folder
"""
import sys

import common
from mnist import FILES, build

NAME, PICTURES = "fashion_mnist", True
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
NAMES = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
MD5 = {
    "train": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe"),
    "val": ("bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
}


def main(argv=None):
    files = {s: (images, MD5[s][0], labels, MD5[s][1]) for s, (images, _, labels, _) in FILES.items()}
    build(argv, __doc__, NAME, URL, files, NAMES, lambda thing: f"a {thing}", flip=True)


if __name__ == "__main__":
    sys.exit(common.run(main))
