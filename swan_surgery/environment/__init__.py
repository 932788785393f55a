"""What surrounds the library: the machine, optional packages, files."""
