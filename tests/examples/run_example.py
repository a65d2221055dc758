"""Program that runs an example on one rank and saves values of expressions over its variables.

run_example.py PROGRAM EXPRESSION...: writes rank-<r>.pt to the working folder.
"""

import os
import runpy
import sys

import torch

program, *expressions = sys.argv[1:]
sys.argv = [program]
variables = runpy.run_path(program, run_name="__main__")
values = [eval(expression, variables) for expression in expressions]
torch.save(values, f"rank-{os.environ['RANK']}.pt")
