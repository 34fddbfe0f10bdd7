"""Maths on plain tensors: definitions and fast forms of the recurrences, scans, convolutions and attentions."""
