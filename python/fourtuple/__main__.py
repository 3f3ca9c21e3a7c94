"""`python -m fourtuple`: the same as the command `fourtuple`. Decides nothing."""

import sys

from fourtuple.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
