"""HTTP around every request: the process's server, middleware, keys, errors and documents."""
