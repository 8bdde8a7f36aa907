"""The OpenAI dialect: routes, request schemas and response formats."""
