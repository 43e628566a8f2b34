"""Train a model on GLUE or SQuAD, with or without a teacher: deepspeed launchers/finetune.py --help"""

import sys

from homodistil.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
