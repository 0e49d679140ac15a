"""An exception that nobody thought of leaves what it went through half changed: report it.

Owns the difference between an error that is told to a caller and one that is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from mili.router.errors import RequestError

OnFault = Callable[[Exception], None]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Faulty(Protocol):
    """on_fault: this object is broken and must not be used any more."""

    on_fault: OnFault


_S = TypeVar("_S", bound=Faulty)


def reports_faults(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
    """Call on_fault for every exception of the method that is no RequestError, and raise it."""

    def watched(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return method(self, *args, **kwargs)
        except RequestError:
            raise
        except Exception as error:
            self.on_fault(error)
            raise

    update_wrapper(watched, method)
    return watched
