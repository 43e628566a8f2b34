"""Measure any Hugging Face directory: python launchers/evaluate.py --help"""

import sys

from homodistil.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
