"""Every error that weakseg raises on purpose.

    WeaksegError
    ├── UsageError              arguments or configuration are wrong (exit code 2)
    │   ├── ConfigError         a recipe or flag: unknown key, wrong type, impossible value
    │   └── InUseError          another process works in the folder
    ├── DataError               what the user brought cannot be used
    │   ├── ImageError          IMAGE_UNDECODABLE, IMAGE_TOO_LARGE, UNSUPPORTED_FORMAT
    │   ├── DatasetError        a folder, list or label file: missing, empty, contradictory
    │   ├── UnknownClassError   a tag, class name or mask value outside the class table
    │   └── SealedTruthError    code that may not see true masks tried to
    ├── WeightsError            a weights file does not fit the model
    ├── TrainingError           training cannot go on (non-finite loss)
    ├── ParityError             an exported graph does not compute what torch computes
    ├── BundleError             a model bundle is missing, damaged or refused
    ├── PartialError            part of the work was done (exit code 3)
    ├── StorageError            an object store does not answer, also when asked again
    └── ServiceError            a request that cannot be answered, see serve/interceptors.py for the status codes
        ├── InvalidRequestError     INVALID_REQUEST
        ├── ModelNotFoundError      MODEL_NOT_FOUND
        ├── ModelLoadingError       MODEL_LOADING
        ├── ModelFailedError        MODEL_FAILED
        ├── ModelNeededError        MODEL_NEEDED
        ├── FoldersUnreadableError  FOLDERS_UNREADABLE
        ├── ModelUnhealthyError     MODEL_UNHEALTHY
        ├── OutputUnsupportedError  OUTPUT_UNSUPPORTED
        ├── QueueFullError          QUEUE_FULL
        ├── OutOfMemoryError        OUT_OF_MEMORY
        ├── DeadlineTooShortError   DEADLINE_TOO_SHORT
        ├── DrainingError           DRAINING
        ├── ResponseTooLargeError   RESPONSE_TOO_LARGE
        ├── UnauthenticatedError    UNAUTHENTICATED
        ├── PermissionDeniedError   PERMISSION_DENIED
        └── RateLimitedError        RATE_LIMITED

A message says what was expected, what came, and what to do. `reason` is the stable machine name of it.
"""

from __future__ import annotations


class WeaksegError(Exception):
    """Root of the tree; catch this to catch everything that weakseg reports."""

    reason: str = "INTERNAL"
    exit_code: int = 1


class UsageError(WeaksegError):
    reason = "USAGE"
    exit_code = 2


class ConfigError(UsageError):
    reason = "CONFIG"


class InUseError(UsageError):
    """`SAYS` is in the message, so that who started the process can tell."""

    reason = "IN_USE"
    SAYS = "is in use by another run"


class DataError(WeaksegError):
    reason = "DATA"


class ImageError(DataError):
    """An image that cannot be read; `reason` says in which way."""

    reason = "IMAGE_UNDECODABLE"

    def __init__(self, message: str, reason: str = "IMAGE_UNDECODABLE") -> None:
        super().__init__(message)
        self.reason = reason


class TooManyPartsError(ImageError):
    """An image of more segments or chunks than were to be looked at."""


class DatasetError(DataError):
    reason = "DATASET"


class UnknownClassError(DataError):
    reason = "UNKNOWN_CLASS"


class SealedTruthError(DataError):
    reason = "SEALED_TRUTH"


class WeightsError(WeaksegError):
    reason = "WEIGHTS"


class TrainingError(WeaksegError):
    reason = "TRAINING"


class ParityError(WeaksegError):
    reason = "PARITY"


class BundleError(WeaksegError):
    reason = "BUNDLE"


class PartialError(WeaksegError):
    reason = "PARTIAL"
    exit_code = 3


class StorageError(WeaksegError):
    reason = "STORAGE"


class ServiceError(WeaksegError):
    """`retry_s`: after how many seconds the same request is worth another try; None = it is not, or nobody knows."""

    reason = "SERVICE"
    retry_s: float | None = None


class InvalidRequestError(ServiceError):
    """`field` is the path of the offending request field, as in `outputs[0].class_ids`."""

    reason = "INVALID_REQUEST"

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class ModelNotFoundError(ServiceError):
    reason = "MODEL_NOT_FOUND"


class ModelLoadingError(ServiceError):
    reason = "MODEL_LOADING"


class ModelFailedError(ServiceError):
    reason = "MODEL_FAILED"


class ModelNeededError(ServiceError):
    reason = "MODEL_NEEDED"


class FoldersUnreadableError(ServiceError):
    reason = "FOLDERS_UNREADABLE"


class ModelUnhealthyError(ServiceError):
    """A model that is loaded and has only failed of late."""

    reason = "MODEL_UNHEALTHY"

    def __init__(self, message: str, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class OutputUnsupportedError(ServiceError):
    reason = "OUTPUT_UNSUPPORTED"


class QueueFullError(ServiceError):
    reason = "QUEUE_FULL"


class OutOfMemoryError(ServiceError):
    reason = "OUT_OF_MEMORY"


class DeadlineTooShortError(ServiceError):
    reason = "DEADLINE_TOO_SHORT"


class DrainingError(ServiceError):
    reason = "DRAINING"


class ResponseTooLargeError(ServiceError):
    reason = "RESPONSE_TOO_LARGE"


class UnauthenticatedError(ServiceError):
    reason = "UNAUTHENTICATED"


class PermissionDeniedError(ServiceError):
    reason = "PERMISSION_DENIED"


class RateLimitedError(ServiceError):
    reason = "RATE_LIMITED"

    def __init__(self, message: str, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_s = retry_s
