"""`python -m jaxroute.emulate`, the same as `python -m jaxroute emulate`."""

import sys

from jaxroute.commands.emulate import main

if __name__ == "__main__":
    sys.exit(main())
