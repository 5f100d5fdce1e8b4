"""Measuring on this device, so that others can trust it.  Docs: docs/bench.md.

protocol     rounds in which everything takes its turn, until an interval is narrow enough
subjects     what takes turns: bundles with settings, each drawing in a process of its own (worker)
statistics   intervals, ratios, drift; verdict: what they mean, in words
machine      what it was measured on; sensors: clock, energy, what others took meanwhile
results      the JSON of a run; store: SQLite; export: CSV, Parquet
profile      ops against their ceiling; trace for Perfetto
report       the page and the Markdown; charts: its pictures
"""
