"""Every error that nettrim raises: one root, and one child for each thing a caller may want to tell apart."""


class NetTrimError(Exception):
    """Root of all errors raised by nettrim."""


class ArgumentError(NetTrimError, ValueError):
    """An argument is not what was expected; the message says what was given, what was expected and what to do."""


class CalibrationError(ArgumentError):
    """The calibration data, or what the model makes of it, cannot be used (empty, NaN, wrong shape, forward failed)."""


class RouteError(CalibrationError):
    """A layer does not run in every batch, or not alike in the dense and in the pruned network."""


class UnsupportedProgramError(ArgumentError):
    """The solver does not take this kind of program; the message names the solvers that do."""


class InfeasibleError(NetTrimError):
    """No weights satisfy the layer program; the message names the layer and the smallest feasible budget."""


class ConvergenceError(NetTrimError):
    """A solver stopped without a feasible point; nothing was written into the model."""


class MaskError(NetTrimError):
    """Weights that a mask says are zero are not; the message names the parameters and how many."""


class FormatError(ArgumentError):
    """A file is not what its format says: another kind of file, damaged, or cut off."""


class CheckpointError(NetTrimError):
    """A checkpoint folder cannot be used: another call works there, it holds another run, or it cannot be read or written."""
