"""Linearisation of pretrained Transformers: importing this package registers converted models with transformers."""

from bench.convert.student import LinearizedConfig, LinearizedForCausalLM

__all__ = ["LinearizedConfig", "LinearizedForCausalLM"]
