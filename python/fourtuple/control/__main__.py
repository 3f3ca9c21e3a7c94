"""`python -m fourtuple.control`: the process of the API, started by the supervisor for its first client."""

import sys

from fourtuple.control.server import main

sys.exit(main())
