"""The errors that qfx raises: each says who, what is so, and what to do."""


class QfxError(Exception):
    """Base of all errors that qfx raises on purpose."""


class RecipeError(QfxError):
    """The recipe cannot be read or does not fit the model."""


class CaptureError(QfxError):
    """The model does not capture into a graph."""


class CalibrationError(QfxError):
    """Calibration data are missing, empty, or not finite."""


class PassError(QfxError):
    """A pass failed; the message names the pass and those that ran before it."""


class SolverError(QfxError):
    """A rounding method was given tensors that it cannot use."""


class KernelError(QfxError):
    """An op was given a shape, dtype, or device that it does not take."""


class PackageError(QfxError):
    """A saved model cannot be written or is not intact."""
