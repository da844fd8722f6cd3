"""The spaces a user may name. To add one, write its file and its line here."""

import difflib

from tune_spaces import atkd, atkd_full, losses, optim, smoke
from tune_spaces.space import Space

SPACES: dict[str, Space] = {
    "atkd": atkd.SPACE,
    "atkd_full": atkd_full.SPACE,
    "losses": losses.SPACE,
    "optim": optim.SPACE,
    "smoke": smoke.SPACE,
}


def space_named(name: str) -> Space:
    """Return a space by its name.

    Raises:
        ValueError: if there is none of that name; it tells the nearest and all others.
    """
    if name not in SPACES:
        nearest = difflib.get_close_matches(name, SPACES, n=1)
        guess = f"did you mean {nearest[0]}? There" if nearest else "there"
        raise ValueError(f"no space is called {name!r}; {guess} are {', '.join(SPACES)}, or write your own as a mapping")
    return SPACES[name]
