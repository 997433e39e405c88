"""What a run costs before it starts: its memory, its operations, its traffic."""
