"""An OpenAI-compatible server without a model, for tests and trials."""
