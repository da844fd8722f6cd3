"""A model over held-out rows: metrics, answers and where they end, texts token by token; and over benchmarks."""
