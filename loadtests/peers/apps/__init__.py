"""What the frameworks serve: one file a peer, as its documentation has it, run in the peer's own environment."""
