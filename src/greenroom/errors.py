"""Every error greenroom raises on purpose.

    GreenroomError                 a user can act on it: one line that names the thing and the remedy
    ├── ConfigError                a value or flag that cannot be (also a ValueError)
    ├── CheckpointError            the source checkpoint is missing, truncated, dense or not understood
    │   └── UnsupportedModelError  a family or seam combination greenroom cannot serve
    ├── PackedModelError           a packed model is missing, foreign, truncated or corrupted
    ├── PackError                  packing could not go on: disk space, other settings, interrupted
    ├── BudgetError                the memory budget is too small (says what would fit)
    ├── ClosedError                a model that was closed, or loaded before a fork, is called (also a RuntimeError)
    ├── TraceError                 a routing trace is missing, foreign, truncated or corrupted, or cannot be written
    └── DemoError                  the demo model could not be fetched or built

The command line prints `greenroom: <message>` and exits with 2; `--verbose` adds the traceback.
Anything that is not a GreenroomError is a bug in greenroom.
"""


class GreenroomError(Exception):
    """Base of all errors a user can act on; the message is one line."""


class ConfigError(GreenroomError, ValueError):
    """A setting that cannot be."""


class CheckpointError(GreenroomError):
    """The source checkpoint is missing, truncated, dense or not understood."""


class UnsupportedModelError(CheckpointError):
    """A model family or experts-seam combination that greenroom cannot serve."""


class PackedModelError(GreenroomError):
    """A packed model that is missing, foreign, truncated or corrupted."""


class PackError(GreenroomError):
    """Packing could not go on; what is written so far is kept and resumed."""


class BudgetError(GreenroomError):
    """A memory budget that cannot hold the model's fixed parts."""


class ClosedError(GreenroomError, RuntimeError):
    """A model is called whose engine no longer runs, or not in this process."""


class DemoError(GreenroomError):
    """The demo model could not be fetched or built."""


class TraceError(GreenroomError):
    """A routing trace that is missing, foreign, truncated or corrupted, or cannot be written."""


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line: its first, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
