import ctypes
import gc
import os
import subprocess
import sys

import pytest

from weakmedsam.system.fast_import import INTERRUPTED, many_imports, wait_asleep


def test_what_is_imported_is_out_of_the_collectors_way_and_what_comes_later_is_not():
    code = (
        "import gc\nfrom weakmedsam.system.fast_import import many_imports\n"
        "with many_imports():\n    assert not gc.isenabled()\n    import json.tool\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 1000, len(gc.get_objects()) < 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True"]


def test_an_import_that_fails_leaves_the_collector_on():
    with pytest.raises(ModuleNotFoundError), many_imports():
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def test_ctrl_c_leaves_without_a_traceback():
    code = (
        "import os, signal, time\nfrom weakmedsam.system.fast_import import INTERRUPTED, interruptible\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a command in the background ignores it
        "with interruptible():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "")


@pytest.mark.parametrize(("given", "wanted"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_the_environment_says_otherwise(monkeypatch, given, wanted):
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is taken back
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == wanted


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
@pytest.mark.parametrize(("environment", "few"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_memory_of_freed_arrays_is_kept_unless_the_environment_says_otherwise(environment, few):
    code = (
        "import resource\nfrom weakmedsam.system.fast_import import keep_freed_memory\nkeep_freed_memory()\n"
        "for n in range(20):\n    bytearray(b'x') * 2**26\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    pages = 2**26 // os.sysconf("SC_PAGESIZE")
    assert (int(done.stdout) < 5 * pages) == few  # of twenty times
