"""The OpenAI-style server: requests in OpenAI's shapes, answers of an engine, many at a time."""
