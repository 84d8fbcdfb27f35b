"""What a step runs: pure decisions about sequences, blocks and prompts."""
