"""The OpenAI API: bodies in, answers out, errors in its envelope."""
