"""Thin entry point; see jaxroute/commands/train.py and `python train.py --help`."""

import sys

from jaxroute.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
