"""What a search or a comparison ends in: the table, the best trial's configuration, and the page."""

from collections.abc import Callable
from pathlib import Path

from orchestrator.reports.search_report import write_search_report
from orchestrator.search.bound_space import BoundSpace
from orchestrator.search.ledger import Search
from orchestrator.search.results import best_trial, describe_best, print_trial_table, write_best, write_trial_tables


def show_search(search: Search, space: BoundSpace, folder: Path, say: Callable[[str], None]) -> None:
    """Write ``trials.csv``, ``trials.parquet``, ``best.yaml`` and ``report.html``, and end with the table and where to look."""
    write_trial_tables(search, folder)
    print_trial_table(search)
    if (best := best_trial(search)) is not None:
        write_best(search, space.config_of(best.begun.point), folder / "best.yaml")
        say(describe_best(search, best))
        say(f"its configuration: {folder / 'best.yaml'}")
    say(f"report: {write_search_report(folder)}")
