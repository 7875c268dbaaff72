"""Errors of the HTTP interface, in the shape that OpenAI's clients expect."""

import logging
import math
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from elit.errors import ElitError
from elit.serving import schema
from elit.serving.parse import MissingFieldError
from elit.serving.request import EngineClosedError, QueueFull

logger = logging.getLogger(__name__)

FIELDS = tuple(schema.ImagesRequest.model_fields)
RETRY_SECONDS = 5.0  # after which a server that is starting or stopping may be asked again


class ApiError(Exception):
    """An answer other than success, in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {} if retry is None else {"Retry-After": str(max(1, math.ceil(retry)))}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        details = schema.ErrorDetails(message=str(self), type=kind, param=self.param, code=self.code)
        return schema.ErrorResponse(error=details).model_dump()

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def api_error(error: Exception) -> ApiError:
    """Turns whatever went wrong into an answer."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(429, str(error), "queue_full", retry=error.retry_after)
        case MissingFieldError():
            return ApiError(422, str(error), "missing_required_parameter", "prompt")
        case ElitError():
            return ApiError(400, str(error), "invalid_value")
        case EngineClosedError():
            return ApiError(503, "the server is stopping; try again later", "unavailable", retry=RETRY_SECONDS)
        case TimeoutError():
            return ApiError(503, "the image was not finished in time", "timeout", retry=RETRY_SECONDS)
        case RequestValidationError():
            return _validation_error(error)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
    logger.error("an image failed: %r", error)
    return ApiError(500, "the image could not be made; the server's log says why", "image_failed")


def _validation_error(error: RequestValidationError) -> ApiError:
    """Names the first field that is wrong; what was sent is not repeated."""
    first = error.errors()[0]
    field = next((part for part in first["loc"][1:2] if part in FIELDS), None)
    if first["type"] == "missing":
        return ApiError(422, f"{field or 'the body'} is missing", "missing_required_parameter", field)
    if first["type"] == "extra_forbidden":
        known = ", ".join(FIELDS)
        return ApiError(400, f"the body has a field that does not exist; there are {known}", "unknown_parameter")
    return ApiError(400, f"{field or 'the body'}: {first['msg']}", "invalid_value", field)
