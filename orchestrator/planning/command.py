"""The command ``plan``: makes a plan and prints it, for people or for machines."""

import json
from collections.abc import Callable

from orchestrator.config.run import RunConfig
from orchestrator.planning.plan import Asked, make_plan
from orchestrator.planning.report import as_plain, print_plan


def plan(config: RunConfig, asked: Asked, say: Callable[[str], None]) -> int:
    """Make a plan and print it; return 0 if the run fits, 1 if it does not.

    Raises:
        ValueError: naming what is missing or cannot be.
    """
    made = make_plan(config, asked, (lambda line: None) if asked.as_json else say)
    if asked.as_json:
        print(json.dumps(as_plain(made), indent=1))
    else:
        print_plan(made)
    return 0 if made.fits else 1
