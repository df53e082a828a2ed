"""Whether this installation works here and how fast: what is installed, devices, decoding, disk."""
