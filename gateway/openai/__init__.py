"""The OpenAI API: request bodies, replies, and errors in its envelope."""
