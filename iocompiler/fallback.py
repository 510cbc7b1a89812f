"""What fails runs on aten, with one record and one warning; or it is raised, where the options ask
for that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch._dynamo.exc import RestartAnalysis

from iocompiler.compilation import Compilation, Fallback
from iocompiler.errors import (
    BadPlanFile,
    BudgetWarning,
    FallbackTooLarge,
    FallbackWarning,
    StrictFallback,
    UnboundedFallback,
    cause_of,
)
from iocompiler.options import Options

Result = TypeVar("Result")

_ON_ATEN = "runs on aten"
_ASKED_FOR = (StrictFallback, FallbackTooLarge, UnboundedFallback, BadPlanFile, BudgetWarning)


@dataclass(frozen=True)
class Attempts:
    """The steps of one compilation that may fail without breaking the program."""

    options: Options
    compilation: Compilation

    def attempt(
        self, region: str, step: Callable[[], Result], instead: str = _ON_ATEN
    ) -> Result | None:
        """What the step returns; None, one record and one warning where it fails.

        Args:
            region: as in `Fallback`.
            instead: what the graph does then.

        Raises:
            StrictFallback: under ``strict``, where it fails.
            UnboundedFallback: under ``no_fallback``, where it fails and would run on aten.
        """
        try:
            return step()
        except (RestartAnalysis, *_ASKED_FOR):
            raise  # Dynamo's way to start over; what has been through here
        except Exception as error:
            self._record(region, error, instead)
            return None

    def has_lost(self, region: str) -> bool:
        return any(lost.region == region for lost in self.compilation.fallbacks)

    def _record(self, region: str, error: Exception, instead: str) -> None:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        cause = cause_of(error) + notes
        self.compilation.fallbacks.append(Fallback(region, cause, getattr(error, "where", "")))
        if self.options.strict:
            raise StrictFallback(region=region, cause=cause) from error
        if self.options.no_fallback is not None and instead == _ON_ATEN:
            raise UnboundedFallback(region=region, cause=cause) from error
        text = f"iocompiler: {region} failed, the graph {instead}: {cause}"
        warnings.warn(text, FallbackWarning, stacklevel=2)
