"""python -m loadtests.bench: see loadtests.bench.request_cost."""

import sys

from .request_cost import main

if __name__ == "__main__":
    sys.exit(main())
