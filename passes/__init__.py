"""The compiler's passes, one file each, and what they share. Imported as ``fxpar.passes``."""
