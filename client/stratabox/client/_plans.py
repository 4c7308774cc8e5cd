"""What a method of the SDK does, said without saying whether it waits or awaits.

A *plan* is a request and what to make of the answer. `_sandboxes`, `_snapshots` and `_images`
write the plans, once; `sync` and `aio` carry them out. So both faces have the same methods, the
same parameters and the same documentation, and differ only in `await`.

```
Call     one request, one answer
Fold     one request, a stream of answers that `step` reduces to one result
Upload   a stream of requests, one answer
Download one request, a stream of answers that are written somewhere
Script   several of the above, one after another, each answer sent back into a generator
Stream   one request, answers for as long as the caller reads them
```
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, ParamSpec, Self, TypeVar, overload

from google.protobuf.message import Message

R = TypeVar("R")
X = TypeVar("X")
P = ParamSpec("P")


class Plan(Generic[R]):
    """Something that ends with one result."""


@dataclass(frozen=True)
class Call(Plan[R]):
    """One request, one answer.

    `waits` is how long, in seconds, the daemon was told that it may take; it comes on top of the
    client's own time-out.
    """

    service: str
    rpc: str
    request: Message
    convert: Callable[[Any], R]
    waits: float = 0


@dataclass(frozen=True)
class Fold(Plan[R]):
    """One request, a stream of answers until `step` returns something else than None."""

    service: str
    rpc: str
    request: Message
    step: Callable[[Any], R | None]
    timeout: float | None = None


@dataclass(frozen=True)
class Upload(Plan[R]):
    """A stream of requests, one answer."""

    service: str
    rpc: str
    requests: Iterable[Message]
    convert: Callable[[Any], R]


@dataclass(frozen=True)
class Download(Plan[R]):
    """One request, a stream of answers.

    `step` takes each, `finish` is called after the last, `close` at the end whatever happens. All
    of them may block.
    """

    service: str
    rpc: str
    request: Message
    step: Callable[[Any], None]
    finish: Callable[[], R]
    close: Callable[[], None]


Steps = Generator[Plan[Any], Any, R]


@dataclass(frozen=True)
class Script(Plan[R]):
    """Several plans in a row; what the generator returns is the result."""

    steps: Steps[R]


@dataclass(frozen=True)
class Stream(Generic[R]):
    """One request, answers without end."""

    service: str
    rpc: str
    request: Message
    convert: Callable[[Any], R]


class Face:
    """Base of what has methods made of plans: a resource of a client, or one sandbox."""

    def _carrier(self) -> tuple[Any, Any, tuple[Any, ...]]:
        """Return the plans, the transport that carries them out, and leading arguments."""
        raise NotImplementedError


class Method(Generic[P, X]):
    """A plan's function as a method of a face. `X` is what a call of it gives the caller.

    :param build: A function of the plans.
    :param carry: Which method of the face's transport takes what `build` returns.
    """

    def __init__(self, build: Callable[..., Any], carry: str = "run") -> None:
        self._build = build
        self._carry = carry
        self.__name__ = build.__name__
        self.__doc__ = build.__doc__

    @overload
    def __get__(self, face: None, owner: type) -> Self: ...
    @overload
    def __get__(self, face: Face, owner: type) -> Callable[P, X]: ...
    def __get__(self, face: Face | None, owner: type) -> Any:
        """Bind to the face, as a function with the name, text and signature of the plan's."""
        if face is None:
            return self
        plans, transport, leading = face._carrier()
        carry: Callable[[Callable[[], Any]], X] = getattr(transport, self._carry)

        def call(*args: P.args, **kwargs: P.kwargs) -> X:
            return carry(partial(self._build, plans, *leading, *args, **kwargs))

        call.__name__ = self.__name__
        call.__qualname__ = f"{owner.__qualname__}.{self.__name__}"
        call.__doc__ = self.__doc__
        call.__signature__ = self._signature(1 + len(leading))  # type: ignore[attr-defined]
        return call

    @cache  # noqa: B019 (methods live as long as their class)
    def _signature(self, hidden: int) -> inspect.Signature:
        whole = inspect.signature(self._build)
        return whole.replace(
            parameters=[*whole.parameters.values()][hidden:],
            return_annotation=inspect.Signature.empty,
        )
