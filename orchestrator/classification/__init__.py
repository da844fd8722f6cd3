"""What is a classifier's own in a run: rows with labels, soft labels without a teacher, the exported folder."""
