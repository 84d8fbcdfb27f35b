"""What a step runs: pure decisions about sequences, KV blocks and recurrent states."""
