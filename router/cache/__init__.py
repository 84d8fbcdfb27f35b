"""The tensors behind the scheduler's blocks and states."""
