"""Runs notebooks, each in a process of its own: they are forked from this one, which has imported what takes long to import and has run nothing.

A line on the standard input is the file of a notebook; the line that is written is a pair in JSON: whether it passed, and what it said."""
import json
import os
import sys
import tempfile
import traceback

import matplotlib.pyplot
import pandas
import scipy.stats
import sklearn.linear_model
import torch
import torchvision
from nbdev.test import test_nb # not fastai, whose import changes what tensors can be compared with


def run(file, root):
    "In the child: the notebook's exit code"
    try: return 0 if test_nb(file, skip_flags=['notest'], basepath=root)[0] else 1
    except BaseException:
        traceback.print_exc()
        return 1


def answer(file, root):
    "Whether the notebook passed, and what it wrote"
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child==0:
            for stream in (1, 2): os.dup2(said.fileno(), stream)
            code = run(file, root)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code==0, said.read().decode(errors='replace')[-6000:]


if __name__=='__main__':
    for line in sys.stdin: print(json.dumps(answer(line.strip(), sys.argv[1])), flush=True)
