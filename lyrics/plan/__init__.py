"""What a preset costs before it is run: parameters, storage, memory by strategy, time per stage (`lyrics plan`)."""
