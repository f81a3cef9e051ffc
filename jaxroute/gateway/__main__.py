"""`python -m jaxroute.gateway`, the same as `python -m jaxroute gateway`."""

import sys

from jaxroute.commands.gateway import main

if __name__ == "__main__":
    sys.exit(main())
