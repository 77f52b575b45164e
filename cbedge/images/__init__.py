"""Reading, checking and preprocessing radiographs."""
