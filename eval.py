"""Thin entry point; see jaxroute/commands/eval.py and `python eval.py --help`."""

import sys

from jaxroute.commands.eval import main

if __name__ == "__main__":
    sys.exit(main())
