"""Quantization that every target shares: which tensor gets which form, and the numbers themselves.

`recipe` chooses, `weights` computes.  Described in docs/quantize.md.
"""
