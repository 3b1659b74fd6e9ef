"""The stages of `benchmarks/gpu.py`, one per file. A stage is a module with

measurements(bench)   names and functions; the dictionary that each returns is written at once
SECONDS               its share of the total time
EACH                  time limit of one measurement
COLUMNS               keys shown in the table; none: all, as text
"""
