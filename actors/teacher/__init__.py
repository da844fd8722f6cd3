"""The pool of replicas that score shards or single rows, and the proof that they score rightly."""
