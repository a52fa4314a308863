"""What runs a partitioned program: inductor, eager, simulate. Imported as ``fxpar.backends``."""
