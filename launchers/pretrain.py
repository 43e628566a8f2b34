"""Distil a student out of its teacher: deepspeed launchers/pretrain.py --help"""

import sys

from homodistil.cli import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
