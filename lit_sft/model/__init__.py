"""A directory to loss and text. Nothing here imports the data stages or Lightning."""
