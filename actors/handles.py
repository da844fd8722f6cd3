"""Types of handles of Ray actors, whose methods are called by ``.remote`` in another process."""

from typing import Any, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result", covariant=True)


class RemoteMethod(Protocol[P, Result]):
    """A method of an actor, as its handle has it; ``RemoteMethod[[int, str], bool]`` takes a number and a text."""

    def remote(self, *arguments: P.args, **named: P.kwargs) -> Any:
        """Begin the call; return a reference to its result, of type ``Result``."""
        ...

    def options(self, **settings: Any) -> Any:
        """Return the method with other settings, such as ``num_returns``."""
        ...
