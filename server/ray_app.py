"""The application for Ray Serve: ``serve run server.ray_app:app``, with the settings of ``bitdial serve``."""

from pydantic import ValidationError
from ray.serve import Application

from server.ray.deployments import Arguments, build
from server.settings.errors import in_words
from server.settings.server import Settings


def app(arguments: Arguments) -> Application:
    """Builds the application, with settings from the environment.

    Raises:
        ValueError: a variable is not valid.
    """
    try:
        settings = Settings()
    except ValidationError as error:
        raise ValueError(in_words(Settings, error)) from None
    return build(arguments, settings)
