"""The driver's side of scoring at the size of a large cluster: the real books, a Ray and a clock on paper."""
