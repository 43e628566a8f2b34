"""Measure the weights of a recipe's loss terms: deepspeed launchers/measure_weights.py --help"""

import sys

from homodistil.cli import main

if __name__ == "__main__":
    main(["measure-weights", *sys.argv[1:]])
