"""`python -m weakseg` is `weakseg`."""

import sys

from weakseg.cli import main

if __name__ == "__main__":
    sys.exit(main())
