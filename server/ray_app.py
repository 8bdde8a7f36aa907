"""The application for Ray Serve: ``serve run server.ray_app:app``, with the settings of ``bitdial serve``."""

from ray.serve import Application

from server.ray.deployments import Arguments, build
from server.settings.server import Settings


def app(arguments: Arguments) -> Application:
    """Builds the application, with settings from the environment."""
    return build(arguments, Settings())
