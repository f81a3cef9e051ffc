"""Thin entry point; see jaxroute/cli.py and `python eval.py --help`."""

import sys

from jaxroute.cli import eval_main

if __name__ == "__main__":
    sys.exit(eval_main())
