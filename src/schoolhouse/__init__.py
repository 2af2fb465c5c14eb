"""schoolhouse: supervised fine-tuning that can be proved, from a raw row to an exam result."""

__version__ = "0.1.0"
