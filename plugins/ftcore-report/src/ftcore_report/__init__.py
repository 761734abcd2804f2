"""Comparisons with error bars, the state of a sweep, and one page about a run: commands of ftcore.

`compare` and `find_runs` are for notebooks; the command line is in `commands`.
"""

from ftcore_report._compare import Comparison, Line, compare
from ftcore_report._runs import Problem, Run, find_runs

__all__ = ["Comparison", "Line", "Problem", "Run", "compare", "find_runs"]
