"""Skip these tests on Windows, which has no limits on the size of files and memory."""

import sys

collect_ignore_glob = ["test_*.py"] if sys.platform == "win32" else []
