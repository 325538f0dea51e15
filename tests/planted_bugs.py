"""Plants bugs in a copy of the tree, one at a time, and counts those that the gate catches.

    python tests/planted_bugs.py            every bug; exit status 1 if fewer than 95 in 100 are caught
    python tests/planted_bugs.py --list     the bugs and their files
    python tests/planted_bugs.py --only composite-tanh-gelu ...

The checkout is only read. A bug counts as caught when one of its own tests fails, and where those stay green, when
anything of the whole gate does. The same tests must pass without a bug first, so that no failure is taken for a
catch. Bugs in csrc/ are compiled in the copy, which needs what ``make build`` needs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bugs import BUGS, Bug

ROOT = Path(__file__).resolve().parent.parent
SHARE = 0.95
_OWN_SECONDS = 600
_GATE_SECONDS = 3600


class Trouble(Exception):
    """Nothing can be said about the gate: the table, the copy or the tests themselves are at fault."""


class Outcome(NamedTuple):
    """How the tests ended: green, or red and why.

    ``test`` is the one that failed, where a process went on to say so; ``endless`` whether a limit of time was met.
    """

    green: bool
    why: str = ""
    test: str | None = None
    endless: bool = False

    def catches(self, bug: Bug) -> bool:
        """Whether this is what the bug may have done; a busy machine, too, runs out of time."""
        return not self.green and (bug.can_hang or not self.endless)


class Verdict(NamedTuple):
    """What became of one bug: caught or not, or left out on this machine."""

    bug: Bug
    word: str
    why: str
    seconds: float


class Copy:
    """The files of a checkout in another folder, mistakes planted there and taken out again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mistake: tuple[Path, str] | None = None
        self._built: str | None = None
        for name in _files():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("BEIT3_FAST_")
        }
        # Two versions of a file may have the same size and second, which is all that cached bytecode is checked by.
        self.environment |= {
            "BEIT3_FAST_BUILD": "1",
            # The tests compile the sources of the CUDA kernels themselves, for the CPU.
            "BEIT3_FAST_CUDA": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(folder),
        }

    def check_imports(self) -> None:
        """Raises Trouble unless Python in the copy imports the copy, whatever is installed, op library included."""
        code = (
            "import beit3_fast, bench; from beit3_fast.ops import library; "
            "print(beit3_fast.__file__, bench.__file__, library.load().path, sep='\\n')"
        )
        done = self._run([sys.executable, "-c", code], _OWN_SECONDS)
        found = [Path(line) for line in done.stdout.splitlines()]
        if done.returncode or len(found) != 3:
            raise Trouble(f"the copy does not run: {_last_line(done.stderr)}")
        strangers = [path for path in found if self.folder not in path.parents]
        if strangers:
            raise Trouble(f"Python in the copy imports {strangers[0]}")

    def runs(self, level: str) -> bool:
        """Whether the processor has an instruction-set level of the kernels."""
        environment = self.environment | {"BEIT3_FAST_CPU_ISA": level}
        code = "from beit3_fast import _native; print(_native.cpu_isa())"
        done = self._run([sys.executable, "-c", code], _OWN_SECONDS, environment)
        return done.returncode == 0 and done.stdout.split() == [level]

    def plant(self, bug: Bug | None) -> None:
        """The copy with this mistake and no other, compiled. Raises Trouble where it does not compile."""
        if self._mistake is not None:
            path, sound = self._mistake
            path.write_text(sound)
            self._mistake = None
        if bug is not None:
            path = self.folder / bug.file
            sound = path.read_text()
            path.write_text(bug.planted(sound))
            self._mistake = path, sound
        sources = sorted((self.folder / "csrc").rglob("*.*"))
        state = "".join(path.read_text() for path in sources)
        if state != self._built:
            self._built = None
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            done = self._run(command, _OWN_SECONDS)
            if done.returncode:
                errors = [line for line in done.stdout.splitlines() if "error:" in line]
                raise Trouble(f"the copy does not compile: {(errors or [done.stderr[-500:]])[0]}")
            self._built = state

    def test(self, arguments: Sequence[str], seconds: float) -> Outcome:
        """Runs pytest up to the first failure. Raises Trouble where it cannot run the tests at all."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:benchmark"]
        command += ["-p", "no:cacheprovider", "--tb=no", *arguments]
        try:
            done = self._run(command, seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"no end in {seconds:.0f} s", endless=True)
        if done.returncode == 0:
            return Outcome(True)
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            return Outcome(False, f"pytest ended by {name} in {' '.join(arguments)}")
        failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - (.*))?$", done.stdout, re.MULTILINE)
        if done.returncode != 1 or failed is None:
            raise Trouble(f"pytest ended with status {done.returncode}: {done.stdout[-1000:]}")
        endless = re.search("from pytest-timeout|TimeoutExpired", failed[2] or "")
        return Outcome(False, failed[1], failed[1], bool(endless))

    def _run(
        self, command: list[str], seconds: float, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A process of its own group, all of which is ended with it."""
        with subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment or self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=seconds)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def _files() -> list[str]:
    """What git tracks or would track, as it lies in the checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def table_faults(bugs: Iterable[Bug] = BUGS) -> list[str]:
    """What is wrong with the table: texts that are not in their files exactly once, or that change nothing."""
    faults = []
    for bug in bugs:
        text = (ROOT / bug.file).read_text()
        try:
            planted = bug.planted(text)
        except ValueError as error:
            faults.append(str(error))
            continue
        if planted == text:
            faults.append(f"{bug.name}: changes nothing")
    return faults


def union(selections: Iterable[Sequence[str]]) -> list[str]:
    """All selected tests, each once: what lies in a selected file, class or test is left out."""
    wanted = dict.fromkeys(test for selection in selections for test in selection)
    whole = tuple(f"{test}{inside}" for test in wanted for inside in ("::", "["))
    return [test for test in wanted if not test.startswith(whole)]


def judge(copy: Copy, bug: Bug, unsound: set[str]) -> tuple[str, str]:
    """("caught" or "SURVIVED", why). ``unsound`` gathers tests that prove nothing: they also fail without the bug."""
    copy.plant(bug)
    outcome = copy.test(bug.tests, _OWN_SECONDS)
    if outcome.catches(bug):
        return "caught", outcome.why
    print(f"  {bug.name}: not caught by its own tests, now the whole gate", flush=True)
    while True:
        # In the copy its text is gone from the file, which must not count.
        gate = ["tests", "--ignore=tests/test_planted_bugs.py"]
        outcome = copy.test([*gate, *(f"--deselect={test}" for test in unsound)], _GATE_SECONDS)
        if outcome.green or outcome.test is None:
            break
        if outcome.catches(bug):
            copy.plant(None)
            if copy.test([outcome.test], _OWN_SECONDS).green:
                break
            copy.plant(bug)
        unsound.add(outcome.test)
        print(
            f"  {outcome.test} fails without a bug or is out of time, and is left out", flush=True
        )
    if outcome.catches(bug):
        return "caught", f"the gate: {outcome.why}"
    return "SURVIVED", outcome.why or "everything is green"


def run(bugs: Sequence[Bug]) -> list[Verdict]:
    """A verdict on each bug. Raises Trouble."""
    # Compiled ones last: going back to sound kernels costs a build.
    bugs = sorted(bugs, key=lambda bug: bug.is_native)
    verdicts: list[Verdict] = []
    unsound: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="planted-bugs-") as folder:
        copy = Copy(Path(folder).resolve())
        print("compiling the copy", flush=True)
        copy.plant(None)
        copy.check_imports()
        here = {level: copy.runs(level) for bug in bugs for level in bug.isa}
        print("the selected tests without a bug", flush=True)
        sound = copy.test(union(bug.tests for bug in bugs), _GATE_SECONDS)
        if not sound.green:
            raise Trouble(f"the tests fail without a bug: {sound.why}")
        for number, bug in enumerate(bugs, 1):
            start = time.perf_counter()
            if bug.isa and not any(here[level] for level in bug.isa):
                word, why = "left out", f"no {' or '.join(bug.isa)} on this processor"
            else:
                word, why = judge(copy, bug, unsound)
            verdict = Verdict(bug, word, why, time.perf_counter() - start)
            verdicts.append(verdict)
            print(f"[{number}/{len(bugs)}] {_line(verdict)}", flush=True)
    return verdicts


def _line(verdict: Verdict) -> str:
    return f"{verdict.bug.name}: {verdict.word}, {verdict.why} ({verdict.seconds:.0f} s)"


def show(verdicts: Sequence[Verdict]) -> bool:
    """Prints the table; whether enough of the bugs were caught."""
    width = max(len(verdict.bug.name) for verdict in verdicts)
    print()
    for verdict in verdicts:
        name, word = verdict.bug.name.ljust(width), verdict.word.ljust(8)
        print(f"{name}  {word}  {verdict.seconds:5.0f} s  {verdict.why}")
    judged = [verdict for verdict in verdicts if verdict.word != "left out"]
    caught = sum(verdict.word == "caught" for verdict in judged)
    seconds = sum(verdict.seconds for verdict in verdicts)
    share = caught / len(judged) if judged else 1.0
    print(
        f"\n{caught} of {len(judged)} bugs are caught, {share:.1%}, in {seconds / 60:.0f} minutes"
    )
    return share >= SHARE


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 where too few bugs are caught or the table does not fit the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these bugs")
    parser.add_argument("--list", action="store_true", help="name the bugs and plant none")
    options = parser.parse_args(arguments)
    named = {bug.name: bug for bug in BUGS}
    unknown = [name for name in options.only or () if name not in named]
    if unknown:
        parser.error(f"no bug is named {', '.join(unknown)}; --list names them")
    bugs = [named[name] for name in dict.fromkeys(options.only or named)]
    if options.list:
        width = max(len(bug.name) for bug in bugs)
        print("\n".join(f"{bug.name.ljust(width)}  {bug.file}" for bug in bugs))
        return 0
    faults = table_faults()
    if faults:
        print("\n".join(faults))
        return 1
    # Ended from outside, it still ends what it started and clears its folder.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return 0 if show(run(bugs)) else 1
    except Trouble as trouble:
        print(f"planted bugs: {trouble}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
