"""`python -m fastalign`, which `accelerate launch -m fastalign train ...` needs."""

import sys

from fastalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
