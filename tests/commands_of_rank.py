"""``python commands_of_rank.py COMMANDS``: stages' commands, a list of lists in JSON, one after another."""

import json
import sys

from weakmedsam.system.fast_import import many_imports

if __name__ == "__main__":
    with many_imports():
        from weakmedsam import cli

    for command in json.loads(sys.argv[1]):
        cli.main(command)
