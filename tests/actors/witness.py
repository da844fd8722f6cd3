"""A judge of students for tests; its own file, so that the process it lives in need not load torch."""

from collections.abc import Mapping


class Witness:
    """Keeps what it hears and answers as it was told to."""

    def __init__(self) -> None:
        self._last_rung: int | None = None
        self._heard: list[tuple[int, int, dict[str, float]]] = []

    def begin(self, last_rung: int | None) -> None:
        """Forget everything; say stop at a rung, or never."""
        self._last_rung, self._heard = last_rung, []

    def measured(self, trial: int, rung: int, step: int, measures: Mapping[str, float], seconds: float) -> bool:
        """Hear of a student."""
        assert trial == 7 and seconds > 0
        self._heard.append((rung, step, dict(measures)))
        return rung != self._last_rung

    def heard(self) -> list[tuple[int, int, dict[str, float]]]:
        """Return rung, step and measures, in the order in which they came."""
        return self._heard
