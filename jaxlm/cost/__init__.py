"""What a run will cost: its memory, its operations, its traffic."""
