"""Two points, to see that a search works: for continuous integration and a first try."""

from tune_spaces.space import read_space

SPACE = read_space({"loss.easy_ratio": [0.3, 0.7]})
