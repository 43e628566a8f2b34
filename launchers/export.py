"""Turn a checkpoint into a Hugging Face directory, or DeepSpeed's format: python launchers/export.py --help"""

import sys

from homodistil.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
