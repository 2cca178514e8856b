"""The command `qverify`, also as `python -m qverify`: Ctrl-C is one line and 130 even while modules
are loading."""

import os
import sys


def main() -> int:
    """Load the command line and run it."""
    try:
        from qverify.cli import main as command

        return command()
    except KeyboardInterrupt:
        os.write(2, b"qverify: interrupted\n")  # the printer may be among what is not loaded yet
        return 130


if __name__ == "__main__":
    sys.exit(main())
