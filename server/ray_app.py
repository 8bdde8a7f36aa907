"""The application for Ray Serve: ``serve run server.ray_app:app``, with the settings of ``bitdial serve``."""

from typing import Any

from pydantic import ValidationError
from ray.serve import Application

from loaders.errors import LoaderError
from server.errors import ServiceError
from server.ray.arguments import InvalidApplication, parse
from server.ray.deployments import build
from server.settings.errors import in_words
from server.settings.server import Settings


def app(arguments: dict[str, Any]) -> Application:
    """Builds the application, with settings from the environment.

    Args:
        arguments: those of ``Arguments``. Ray would show a traceback if it had to parse them itself.

    Raises:
        InvalidApplication: an argument or a variable is not valid, or the default precision can't be chosen.
    """
    parsed = parse(arguments)
    try:
        return build(parsed, Settings())
    except ValidationError as error:
        raise InvalidApplication(in_words(Settings, error)) from None
    except (LoaderError, ServiceError, ValueError) as error:
        raise InvalidApplication(str(error)) from error
