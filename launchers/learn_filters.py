"""Learn the task-aware filters of a teacher or a student: deepspeed launchers/learn_filters.py --help"""

import sys

from homodistil.cli import main

if __name__ == "__main__":
    main(["learn-filters", *sys.argv[1:]])
