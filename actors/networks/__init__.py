"""Small classifiers that are made from scratch, and what classifiers of every kind are given."""
