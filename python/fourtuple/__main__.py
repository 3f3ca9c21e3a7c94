"""`python -m fourtuple` and the command `fourtuple`. Decides only that Ctrl-C is no traceback, not even at start."""

import sys


def main() -> int:
    """Run the command line and return its exit status."""
    try:
        from fourtuple.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
