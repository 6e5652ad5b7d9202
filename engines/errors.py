"""Every error that RecallSeg raises on purpose.

::

    RecallSegError
    ├── InputError            a caller's image, mask, label, option (also a ValueError)
    ├── BundleError           a bundle that is missing, damaged, too new or incomplete
    ├── EngineError
    │   ├── EngineUnavailableError   the engine's library, driver or device is not here
    │   ├── EngineRunError           an engine failed, or was called with wrong tensors
    │   │   ├── HostMemoryError      the machine has too little memory
    │   │   ├── DeviceMemoryError    the GPU has too little memory
    │   │   └── DeviceLostError      the GPU failed for good, as far as this process goes
    │   ├── ModelClosedError         a model was used after it had been closed
    │   ├── StaleViewError           what was seen of an image is not on the model any more
    │   ├── PlanError                a compiled plan is missing, damaged, foreign or cannot be kept
    │   └── VerificationError        an engine did not reproduce the bundle's golden tensors
    ├── SignatureError        not signed by a trusted key, or changed since
    ├── AuditError            the audit log was changed, or cannot be written
    ├── OutputError           a result cannot be written in its format
    ├── DeadlineError         not done in time; what was done so far is thrown away
    ├── CancelledError        ended because the caller said so
    ├── ForkedError           what a parent process had opened, in a process forked from it
    ├── LibraryError
    │   ├── LibraryNotFoundError     no library in that folder
    │   ├── LibraryCorruptError      stored bytes do not match their digests
    │   ├── LibraryVersionError      written by a newer format
    │   ├── LibraryMismatchError     made by another bundle
    │   ├── LibraryLockedError       another process is writing
    │   └── LibraryWriteError        the folder cannot be written (read-only, disk full)
    └── ExportError
        ├── CheckpointError          a tensor is missing, unexpected or misshapen
        └── ParityError              an exported graph differs from the PyTorch model

A message says what happened, what was received and expected, and how to mend it.
"""

__all__ = [
    "AuditError",
    "BundleError",
    "CancelledError",
    "CheckpointError",
    "DeadlineError",
    "DeviceLostError",
    "DeviceMemoryError",
    "EngineError",
    "EngineRunError",
    "EngineUnavailableError",
    "ExportError",
    "ForkedError",
    "HostMemoryError",
    "InputError",
    "LibraryCorruptError",
    "LibraryError",
    "LibraryLockedError",
    "LibraryMismatchError",
    "LibraryNotFoundError",
    "LibraryVersionError",
    "LibraryWriteError",
    "ModelClosedError",
    "OutputError",
    "ParityError",
    "PlanError",
    "RecallSegError",
    "SignatureError",
    "StaleViewError",
    "VerificationError",
]


class RecallSegError(Exception):
    """Root of the tree: catch this to catch everything that RecallSeg raises on purpose."""


class InputError(RecallSegError, ValueError):
    """A caller's image, mask, label or option cannot be used as it is."""


class BundleError(RecallSegError):
    """A bundle is missing, damaged, too new, or lacks what was asked for."""


class EngineError(RecallSegError):
    """Root of everything that goes wrong while making or running an engine."""


class EngineUnavailableError(EngineError):
    """The engine's library, driver or device is not on this machine."""


class EngineRunError(EngineError):
    """An engine failed while running, or was called with the wrong tensors."""


class HostMemoryError(EngineRunError):
    """The machine has too little free memory for what a model would have to hold."""


class DeviceMemoryError(EngineRunError):
    """The GPU has too little free memory."""


class DeviceLostError(EngineRunError):
    """The GPU failed for good, as far as this process goes; other engines can go on."""


class ModelClosedError(EngineError):
    """A model was used after it had been closed."""


class StaleViewError(EngineError):
    """Another image is on the model now, or a kept look had to make room for others."""


class PlanError(EngineError):
    """A compiled plan is missing, damaged, made for something else, or cannot be kept."""


class VerificationError(EngineError):
    """An engine's outputs differ from the bundle's golden tensors."""


class SignatureError(RecallSegError):
    """Something is not signed by a key that is trusted, or was changed after it was signed."""


class AuditError(RecallSegError):
    """The audit log was changed, or cannot be written or read."""


class OutputError(RecallSegError):
    """A result cannot be written in its format; the input is not at fault."""


class ForkedError(RecallSegError):
    """What a parent process had opened was used in a process that was forked from it."""


class DeadlineError(RecallSegError):
    """A query was not done in time."""


class CancelledError(RecallSegError):
    """A query ended because the caller did not want it any more."""


class LibraryError(RecallSegError):
    """Root of everything that goes wrong with a library folder."""


class LibraryNotFoundError(LibraryError):
    """There is no library in that folder."""


class LibraryCorruptError(LibraryError):
    """Stored bytes do not match the digests recorded for them."""


class LibraryVersionError(LibraryError):
    """The library was written in a newer format than this version reads."""


class LibraryMismatchError(LibraryError):
    """The library was made by the encoders of another bundle."""


class LibraryLockedError(LibraryError):
    """Another process is writing to the library."""


class LibraryWriteError(LibraryError):
    """The library folder cannot be written: read-only, or the disk is full."""


class ExportError(RecallSegError):
    """Root of everything that goes wrong while a bundle is made."""


class CheckpointError(ExportError):
    """A checkpoint has a missing, unexpected or misshapen tensor, or is no checkpoint at all."""


class ParityError(ExportError):
    """An exported graph does not reproduce the PyTorch model within its tolerance."""


for _name in __all__:  # tracebacks and pickles name what a caller can import and catch
    globals()[_name].__module__ = "recallseg.errors"
