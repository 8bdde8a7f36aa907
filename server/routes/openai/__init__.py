"""OpenAI's dialect: its routes, schemas and shapes."""
