"""From a file to a checked radiograph and the model's input."""
