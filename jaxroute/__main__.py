"""`python -m jaxroute COMMAND`."""

import sys

from jaxroute.commands import main

if __name__ == "__main__":
    sys.exit(main())
