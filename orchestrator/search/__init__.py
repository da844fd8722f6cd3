"""Many trainings on one scoring: searches and comparisons, their trials, ledger and statistics; no page is drawn here."""
