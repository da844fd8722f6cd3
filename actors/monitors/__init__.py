"""Where numbers of a running training go: files, Prometheus, trackers; nothing is decided by them."""
