"""Every exception refattn raises on purpose.

A message says what was given, what was expected, and what to do; nothing is computed from a guess.
"""

from __future__ import annotations


class RefattnError(Exception):
    """Root of the tree: catch this to catch everything refattn raises on purpose."""


class SpecError(RefattnError, ValueError):
    """A Spec field is out of range, or fields contradict each other."""


class ShapeError(RefattnError, ValueError):
    """An array is missing, unknown, or has a rank or a shape that the signature does not allow."""


class DTypeError(RefattnError, TypeError):
    """An array or a scalar has a type that the signature does not allow."""


class LayoutError(RefattnError, ValueError):
    """A layout is unknown, or an option belongs to another layout."""


class Unsupported(RefattnError, NotImplementedError):
    """An engine cannot run this problem; the message is the engine's sentence."""


class EngineUnavailable(RefattnError, RuntimeError):
    """An engine or a command needs an extra that is not installed; the message names it."""


class DeviceError(RefattnError, RuntimeError):
    """A GPU or its driver cannot do what was asked; the message says what, and what to do."""


class Undecided(RefattnError, ArithmeticError):
    """Ball arithmetic cannot settle a decision at this precision; the certified engine doubles the bits."""


class GoldenFormatError(RefattnError, ValueError):
    """A golden file is damaged, foreign, or of another version."""


class GoldenError(RefattnError, ArithmeticError):
    """A golden file cannot be made: some of a case's values are not proved."""


class GoldenMismatch(RefattnError, AssertionError):
    """A golden file differs from what it should hold."""


class StorageError(RefattnError, OSError):
    """A file cannot be written; what stood there before is untouched."""
