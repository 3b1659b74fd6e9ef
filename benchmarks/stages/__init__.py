"""What `benchmarks/gpu.py` measures, a stage a file.

A stage is a module with

    measurements(bench)   names and what to call for each; the dictionary that comes back is written down at once
    SECONDS               its share of the time of all stages
    EACH                  that one measurement may take before it is given up
    COLUMNS               of what was found, those that the table shows; none: all, as text
"""
