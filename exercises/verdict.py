"""verdict.py: what an exercise answers when it is run.

A student's function is tried in several situations beside the right one, which is diwa.py's own code
(checks.py).  The verdict names the properties that hold and those that do not, shows the numbers where the
first one fails, and if the answer is the same as a known mistake's, says which mistake that is.
"""
import argparse
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Callable, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))                        # diwa.py


class Property(NamedTuple):
    """What must be so: `observe(function)` makes tensors of it, {what: tensor}."""
    sentence: str
    observe: Callable
    hint: str


class Check(NamedTuple):
    name: str                       # of the function
    right: Callable                 # diwa.py's
    properties: list
    mistakes: list                  # (hint, a function that makes this mistake)
    lesson: str                     # what is worth remembering once it is right


EMPTY = "nothing is there yet: replace the line `raise NotImplementedError` by your own"


def load(path):
    """The module in a file whose name begins with a number."""
    spec = importlib.util.spec_from_file_location(f"exercise_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attempt(property, function):
    """What a function gives in a situation -> {what: tensor}, or a sentence that says why it gives none."""
    torch.manual_seed(0)
    try:
        return property.observe(function)
    except NotImplementedError:
        return EMPTY
    except Exception as error:                              # a student's code may fail in any way
        file = function.__code__.co_filename                # the last line there; torch's own say little
        places = [one for one in traceback.extract_tb(error.__traceback__) if one.filename == file]
        where = f" ({Path(file).name}, line {places[-1].lineno}: {places[-1].line})" if places else ""
        return f"it stops with {type(error).__name__}: {error}{where}"


def difference(got, want):
    """Where an observation is not what it should be -> a sentence, or None."""
    if isinstance(got, str):
        return got
    for what, right in want.items():
        mine = got[what]
        if not isinstance(mine, torch.Tensor):
            return f"{what} is a {type(mine).__name__}, and should be a tensor {list(right.shape)}"
        if mine.shape != right.shape:
            return f"{what} has the shape {list(mine.shape)}, and should have {list(right.shape)}"
        error = (mine - right).abs()
        wrong = ~(error <= 1e-4 + 1e-3 * right.abs())       # NaN is wrong, too
        if wrong.any():
            place = tuple(torch.nonzero(wrong)[0].tolist())
            index = f", at [{', '.join(map(str, place))}]," if place else ""
            return (f"{what}{index} is {mine[place].item():.4g}, and should be {right[place].item():.4g} "
                    f"({int(wrong.sum())} of {wrong.numel()} numbers differ)")
    return None


def verdict(check, function):
    """-> (is it right?, the lines to print)"""
    got = [attempt(one, function) for one in check.properties]
    if got[0] == EMPTY:
        return False, [f"{check.name}: {EMPTY}."]
    want = [attempt(one, check.right) for one in check.properties]
    problems = [difference(a, b) for a, b in zip(got, want)]
    lines = []
    for one, problem in zip(check.properties, problems):
        lines.append(f"  {'NOT YET' if problem else 'holds  '}  {one.sentence}")
    if not any(problems):
        return True, [f"{check.name}: right, as in diwa.py.", *lines, "", check.lesson]
    failed = next(i for i, problem in enumerate(problems) if problem)
    lines = [f"{check.name}: not yet.", *lines, "", f"  {problems[failed]}"]
    if "numbers differ" in problems[failed]:                # else it says itself what is wrong
        lines.append(f"  Hint: {recognised(check, got, failed) or check.properties[failed].hint}")
    return False, lines


def recognised(check, got, failed):
    """The hint of the known mistake with the same answers, everywhere or at least where it first fails."""
    partly = None
    for words, mistaken in check.mistakes:
        same = [attempt(one, mistaken) for one in check.properties]
        alike = [not isinstance(a, str) and not isinstance(b, str) and not difference(a, b)
                 for a, b in zip(got, same)]
        if all(alike):
            return words
        if alike[failed] and not partly:
            partly = words
    return partly


def judge(path, argv=None):
    """Print the verdict on the function in the file -> exit code: 0 when it is right, else 1."""
    from checks import CHECKS
    parser = argparse.ArgumentParser(description="a function to write; see the file's first lines")
    parser.add_argument("--solution", action="store_true", help="judge the answer in solutions/ instead")
    args = parser.parse_args(argv)
    check = CHECKS[Path(path).stem]
    file = HERE / "solutions" / Path(path).name if args.solution else path
    right, lines = verdict(check, getattr(load(file), check.name))
    print("\n".join(lines))
    return 0 if right else 1
