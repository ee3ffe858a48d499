"""How `make test` shares the suite out: a module with one federation, or one cluster, for all its tests stays together.

With pytest 9.2, `--dist loadgroup` of pytest-xdist 3.8 shares groups out test by test without a word: it writes the
group into an attribute that pytest reads no more.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = 12


def test_the_tests_of_one_module_run_in_one_process(tmp_path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    sharing = re.findall(r"python -m pytest -q (-n 2 --dist \w+)$", makefile, re.MULTILINE)
    assert len(sharing) == 1
    (tmp_path / "test_module.py").write_text(
        f"import os, pytest\n"
        f"from pathlib import Path\n"
        f"pytestmark = pytest.mark.xdist_group('one')\n"
        f"@pytest.mark.parametrize('n', range({TESTS}))\n"
        f"def test_it(n):\n"
        f"    with Path('workers').open('a') as file:\n"
        f"        file.write(os.environ['PYTEST_XDIST_WORKER'] + ' ')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sharing[0].split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    workers = (tmp_path / "workers").read_text().split()
    assert len(workers) == TESTS
    assert len(set(workers)) == 1
