"""The errors of this library: one parent, and a child for each thing that can be wrong.

Every child is also the built-in exception that fits, so an `except ValueError` written for PEFT or transformers
catches these errors too.
"""

from __future__ import annotations

from typing import Any


class PlasticityError(Exception):
    """Parent of every error that this library raises on purpose."""


class ConfigError(PlasticityError, ValueError):
    """An argument, or a combination of arguments, that is not allowed."""


class SelectionError(ConfigError):
    """A budget into which nothing fits.

    Attributes:
        report: the `PlasticityReport` to select from, so that a measurement is not lost; None if the error was found
            before measuring.
    """

    report: Any = None


class DataError(PlasticityError, ValueError):
    """Images that are missing, too few, or not of a form that the model takes."""


class ModelError(PlasticityError, ValueError):
    """A model whose components cannot be found with certainty, or with values that cannot be measured."""


class NonFiniteError(PlasticityError, ArithmeticError):
    """NaN or infinity in a weight, an image, an activation or a score."""


class AdapterError(PlasticityError, ValueError):
    """An adapter that cannot be read, or that does not fit the model."""


class ReportError(PlasticityError, ValueError):
    """A report that cannot be read, or that was measured on another architecture."""


class MissingExtraError(PlasticityError, ImportError):
    """A package that only some uses need, and that is not installed."""


class FileError(PlasticityError, OSError):
    """A file that cannot be written. `errno` is the system's reason."""

    def __str__(self) -> str:
        """Returns the message without `errno`, whose meaning the message contains in words."""
        return str(self.strerror)
