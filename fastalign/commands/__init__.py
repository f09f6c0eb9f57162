"""What the commands of `fastalign.cli` share, and those that are long enough for a module."""
