"""Train a tokenizer: python data_prep/train_tokenizer.py --help"""

import sys

from homodistil.cli import main

if __name__ == "__main__":
    main(["train-tokenizer", *sys.argv[1:]])
