"""The tensors behind the scheduler's KV blocks and state slots."""
