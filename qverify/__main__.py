"""`python -m qverify` is the command `qverify`."""

import sys

from qverify.cli import main

if __name__ == "__main__":
    sys.exit(main())
