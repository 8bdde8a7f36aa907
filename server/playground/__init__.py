"""The page that browsers get at ``/``: HTML, CSS and modules, served by ``server.routes.playground``."""
