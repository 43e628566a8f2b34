"""Check shards against their index: python data_prep/verify_shards.py --help"""

import sys

from homodistil.cli import main

if __name__ == "__main__":
    main(["verify-shards", *sys.argv[1:]])
