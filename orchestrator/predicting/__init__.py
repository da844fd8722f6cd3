"""Answers of a finished run's models to new rows: rows are read, asked and written here; the models answer in actors."""
