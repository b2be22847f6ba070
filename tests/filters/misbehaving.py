"""Filters that do what filters must not do, to the sample whose completion says BAD. Loaded in workers only."""

from __future__ import annotations

import ctypes
import json
import locale
import os
import random
import signal
import subprocess
import sys
import threading
import time

from iterative_sft_cli.types import Verdict


def bad(sample):
    return "BAD" in sample.completion


class Tensor:
    pass


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def raises(sample):
    if bad(sample):
        print("about to fail on", sample.sample_id)
        raise ValueError("seven is not eight")
    return True


def raises_unprintable(sample):
    if bad(sample):
        raise Unprintable
    return True


def raises_system_exit(sample):
    if bad(sample):
        raise SystemExit(0)
    return True


def calls_sys_exit(sample):
    if bad(sample):
        sys.exit("enough")
    return True


def raises_keyboard_interrupt(sample):
    if bad(sample):
        raise KeyboardInterrupt
    return True


def raises_base_exception(sample):
    if bad(sample):
        raise BaseException("base")
    return True


def exits_zero(sample):
    if bad(sample):
        os._exit(0)
    return True


def exits_three(sample):
    if bad(sample):
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
    return True


def kills_itself(sample):
    if bad(sample):
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def kills_its_group(sample):
    if bad(sample):
        os.killpg(0, signal.SIGTERM)
    return True


def crashes_in_c(sample):
    if bad(sample):
        ctypes.string_at(0)
    return True


def aborts(sample):
    if bad(sample):
        os.abort()
    return True


def stops_itself(sample):
    if bad(sample):
        os.kill(os.getpid(), signal.SIGSTOP)
    return True


def hangs_in_python(sample):
    while bad(sample):
        pass
    return True


def hangs_asleep(sample):
    if bad(sample):
        time.sleep(1000)
    return True


def hangs_in_c(sample):
    if bad(sample):
        ctypes.PyDLL(None).sleep(1000)
    return True


def hangs_without_signals(sample):
    if bad(sample):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(1)
    return True


def deadlocks(sample):
    if bad(sample):
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    return True


def swallows_everything(sample):
    while bad(sample):
        try:
            time.sleep(1000)
        except BaseException:
            continue
    return True


def fork_bomb(sample):
    while bad(sample):
        os.fork()
    return True


def process_bomb(sample):
    if bad(sample):
        children = [subprocess.Popen(["sleep", "1000"]) for _ in range(200)]
        children[0].wait()
    return True


def allocates_10_gb(sample):
    if bad(sample):
        return len(b"x" * (10 << 30)) > 0
    return True


def grows_slowly(sample):
    held = []
    while bad(sample):
        held.append(b"x" * (8 << 20))
        time.sleep(0.01)
    return True


def recurses(sample):
    return recurses(sample) if bad(sample) else True


def returns_none(sample):
    return None if bad(sample) else True


def returns_nan(sample):
    return float("nan") if bad(sample) else True


def returns_inf(sample):
    return float("inf") if bad(sample) else True


def returns_int(sample):
    return 1 if bad(sample) else True


def returns_text(sample):
    return "yes" if bad(sample) else True


def returns_numpy(sample):
    import numpy

    return numpy.float64(0.5) if bad(sample) else True


def returns_tensor(sample):
    return Tensor() if bad(sample) else True


def returns_dict(sample):
    return {"keep": True, "sample_id": sample.sample_id} if bad(sample) else True


def returns_tuple(sample):
    return (True, 1.0) if bad(sample) else True


def returns_generator(sample):
    return (x for x in [True]) if bad(sample) else True


def returns_coroutine(sample):
    async def later():
        return True

    return later() if bad(sample) else True


def returns_function(sample):
    return returns_function if bad(sample) else True


def verdict_nan(sample):
    return Verdict(True, float("nan")) if bad(sample) else True


def verdict_int_keep(sample):
    return Verdict(1) if bad(sample) else True


def verdict_forged(sample):
    verdict = Verdict(True)
    if bad(sample):
        object.__setattr__(verdict, "keep", "yes")
    return verdict


def verdict_forged_score(sample):
    verdict = Verdict(True)
    if bad(sample):
        object.__setattr__(verdict, "score", "0.5")
    return verdict


def extra_object(sample):
    return Verdict(True, extra={"x": object()}) if bad(sample) else True


def extra_nan(sample):
    return Verdict(True, extra={"x": float("nan")}) if bad(sample) else True


def extra_huge(sample):
    return Verdict(True, extra={"x": "y" * 1_000_000}) if bad(sample) else True


def extra_cycle(sample):
    loop: dict = {}
    loop["self"] = loop
    return Verdict(True, extra=loop) if bad(sample) else True


def reason_essay(sample):
    return Verdict(False, reason="because " * 100) if bad(sample) else True


def reason_escape(sample):
    return Verdict(False, reason="\x1b[2Jgone") if bad(sample) else True


def reason_number(sample):
    return Verdict(False, reason=7) if bad(sample) else True


def mutates_field(sample):
    if bad(sample):
        sample.completion = "fine"
    return True


def closes_all_descriptors(sample):
    if bad(sample):
        os.closerange(0, 1000)
    return True


def prints_one_gb(sample):
    if bad(sample):
        line = "x" * (1 << 20)
        for _ in range(1024):
            print(line)
    return True


def writes_everywhere(sample):
    if bad(sample):
        for descriptor in range(3, 30):
            try:
                os.write(descriptor, b"PASSED\n" * 100)
            except OSError:
                pass
        time.sleep(1000)
    return True


def group_short(group):
    return [True] * (len(group) - 1)


def group_long(group):
    return [True] * (len(group) + 1)


def group_empty(group):
    return []


def group_none(group):
    return [None for _ in group]


def group_one_bool(group):
    return True


def group_generator(group):
    return (True for _ in group)


def group_ids_twice(group):
    return {sample.sample_id: True for sample in [*group, *group]}


def group_exits(group):
    os._exit(0)


def group_hangs(group):
    time.sleep(1000)


def samples_short(samples):
    return [True] * (len(samples) // 2)


def samples_hangs(samples):
    time.sleep(1000)


def samples_raises(samples):
    return [samples[len(samples)] for _ in samples]


class SetupRaises:
    def setup(self):
        raise OSError("no such model")

    def __call__(self, sample):
        return True


class SetupExits:
    def setup(self):
        print("loading", flush=True)
        os._exit(7)

    def __call__(self, sample):
        return True


class SetupHangs:
    def setup(self):
        time.sleep(1000)

    def __call__(self, sample):
        return True


# --- what has no error: the call is undone, the run is not changed


def mutates_row(sample):
    sample.row["question"] = "changed"
    sample.row["new"] = 1
    return sample.row["question"] == "changed"


def changes_folder(sample):
    before = os.getcwd()
    os.makedirs("deeper", exist_ok=True)
    os.chdir("deeper")
    return Verdict(True, extra={"cwd": before})


def changes_seed(sample):
    value = random.random()
    random.seed(len(sample.completion))
    return Verdict(True, extra={"draw": value})


def changes_locale(sample):
    before = locale.setlocale(locale.LC_ALL)
    locale.setlocale(locale.LC_ALL, "C" if before != "C" else "C.UTF-8")
    return Verdict(True, extra={"locale": before})


def changes_environment(sample):
    before = os.environ.get("ISFT_LEAK", "")
    os.environ["ISFT_LEAK"] = "leaked"
    return Verdict(True, extra={"before": before})


def changes_streams(sample):
    sys.stdout = None
    return True


def sets_alarm(sample):
    signal.setitimer(signal.ITIMER_REAL, 0.15)
    return True


def ends_later(sample):
    threading.Timer(0.1, os._exit, (3,)).start()
    return True


def breaks_json(sample):
    json.dumps = json.loads = None
    return True


def reads_stdin(sample):
    return Verdict(True, extra={"read": sys.stdin.read()})


def writes_file(sample):
    with open("left_behind.txt", "w") as file:
        file.write("x")
    return Verdict(True, extra={"folder": os.getcwd()})


def leaves_process(sample):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return Verdict(True, extra={"pid": child.pid})


def leaves_fork(sample):
    pid = os.fork()
    if pid == 0:
        os.setsid()
        time.sleep(1000)
        os._exit(0)
    return Verdict(True, extra={"pid": pid})


def leaves_thread(sample):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return True


def prints_a_little(sample):
    print("scoring", sample.sample_id)
    print("warning", file=sys.stderr)
    return True


def depends_on_hash_order(sample):
    return Verdict(True, extra={"first": next(iter({"alpha", "beta", "gamma", "delta"}))})


def reads_environment(sample):
    return Verdict(True, extra={"names": sorted(os.environ)})


def returns_wide_reply(samples):
    return [Verdict(True, float(i), "r", {"x": "y" * 100}) for i, _ in enumerate(samples)]


def leaks_in_extra(sample):
    return Verdict(True, extra={"key": os.environ["GRADER_KEY"]})


def leaks_in_error(sample):
    raise ValueError(f"bad key {os.environ['GRADER_KEY']}")


def leaks_in_output(sample):
    print("using", os.environ["GRADER_KEY"], flush=True)
    os._exit(1)


class LeaksInSetup:
    def setup(self):
        raise OSError(os.environ["GRADER_KEY"])

    def __call__(self, sample):
        return True
