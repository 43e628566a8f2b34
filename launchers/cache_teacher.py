"""Write down a teacher's knowledge, so that training needs no teacher: deepspeed launchers/cache_teacher.py --help"""

import sys

from homodistil.cli import main

if __name__ == "__main__":
    main(["cache-teacher", *sys.argv[1:]])
