"""The commands of a source and of a destination, in order."""
