"""Mixer Bench: what does a sequence mixer's memory buy?"""

__version__ = "0.1.0"
