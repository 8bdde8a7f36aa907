"""Every error that a response can carry, with its HTTP status and its names in both dialects.

ServiceError
├── BadRequest            400  the body is not JSON, not UTF-8 or not an object
├── Invalid               422  an empty input; a bad or unknown parameter      (/v1: 400)
│   ├── PromptTooLong     422  more tokens than the context holds              (/v1: 400)
│   └── BadPrecision      422  no such precision                               (/v1: 400)
├── Unauthorized          401
├── NotFound              404  no such route, no report yet
│   └── UnknownModel      404
├── MethodNotAllowed      405
├── RequestTimeout        408  the request took too long to arrive
├── Unavailable           409  this host can't run the requested precision
├── PayloadTooLarge       413
├── UnsupportedMedia      415
├── HeadersTooLarge       431
├── GenerationFailed      424  out of memory, NaN logits, an error in the model (/v1: 500)
│   └── Unloaded          424  its precision was unloaded while it ran           (/v1: 500)
├── Overloaded            429  the queue is full
├── NotReady              503  loading, draining, worker dead, no memory to load
│   └── NotLoaded         503  a precision that only the client asked for can't be loaded
└── DeadlinePassed        504
"""

from typing import ClassVar


class ServiceError(Exception):
    """Base class. The message is sent to the client unchanged: no path, no prompt text, no traceback."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "generation"
    """``error_type`` of the native routes."""
    metric: ClassVar[str | None] = None
    """The metrics' outcome, where ``error_type`` doesn't tell the server's fault from the client's."""
    openai_status: ClassVar[int | None] = None
    """The status on ``/v1``, where it differs."""
    openai_type: ClassVar[str] = "api_error"
    openai_code: ClassVar[str | None] = None
    retry_after: float | None = None
    """Seconds for ``Retry-After``; None if a retry is of no use."""
    should_retry: ClassVar[bool | None] = None
    """``x-should-retry``, if clients would derive the wrong answer from the status."""
    retry_spread: float = 2.0
    """Seconds over which the retries of clients refused at the same time are spread."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        retry_spread: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param = message, param
        if retry_after is not None:
            self.retry_after = retry_after
        if retry_spread is not None:
            self.retry_spread = retry_spread

    @property
    def outcome(self) -> str:
        """How metrics and traces name the end of the request."""
        return self.metric or self.error_type


class BadRequest(ServiceError):
    status, error_type = 400, "validation"
    openai_type = "invalid_request_error"


class Invalid(ServiceError):
    status, error_type = 422, "validation"
    openai_status, openai_type = 400, "invalid_request_error"


class PromptTooLong(Invalid):
    """The message ends in the words by which litellm and LangChain recognize this error."""

    openai_code = "context_length_exceeded"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(f"{message.rstrip('.')}: the prompt is too long", param=param)


class BadPrecision(Invalid):
    def __init__(self, message: str) -> None:
        super().__init__(message, param="precision")


class Unauthorized(ServiceError):
    status, error_type = 401, "unauthorized"
    openai_type, openai_code = "invalid_request_error", "invalid_api_key"


class NotFound(ServiceError):
    """No such route, or no report yet."""

    status, error_type = 404, "not_found"
    openai_type = "invalid_request_error"


class UnknownModel(NotFound):
    openai_code = "model_not_found"


class MethodNotAllowed(ServiceError):
    status, error_type = 405, "validation"
    openai_type = "invalid_request_error"


class RequestTimeout(ServiceError):
    status, error_type = 408, "timeout"
    openai_type = "invalid_request_error"


class Unavailable(ServiceError):
    status, error_type, metric = 409, "unavailable", "unsupported"
    openai_type, openai_code = "invalid_request_error", "precision_unavailable"


class PayloadTooLarge(ServiceError):
    status, error_type = 413, "validation"
    openai_type = "invalid_request_error"


class UnsupportedMedia(ServiceError):
    status, error_type = 415, "validation"
    openai_type = "invalid_request_error"


class HeadersTooLarge(ServiceError):
    status, error_type = 431, "validation"
    openai_type = "invalid_request_error"


class GenerationFailed(ServiceError):
    status, error_type = 424, "generation"
    openai_status = 500
    should_retry = False


class Unloaded(GenerationFailed):
    """The next request for the precision loads it again."""

    should_retry = True


class Overloaded(ServiceError):
    status, error_type, retry_after = 429, "overloaded", 1.0
    openai_type, openai_code = "rate_limit_error", "overloaded"


class NotReady(ServiceError):
    status, error_type, retry_after = 503, "unavailable", 2.0
    openai_type = "server_error"


class NotLoaded(NotReady):
    """Unlike the precisions of ``PRECISIONS``, the operator has not promised this one: a client that asks for
    it again and again must not make the server look broken."""

    metric = "not_loaded"


class DeadlinePassed(ServiceError):
    status, error_type = 504, "timeout"
    openai_type = "server_error"
