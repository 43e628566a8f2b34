"""Turn text into shards: python data_prep/build_shards.py --help"""

import sys

from homodistil.cli import main

if __name__ == "__main__":
    main(["build-shards", *sys.argv[1:]])
