import subprocess
import sys

from trainer.jobspec import LOG_FILE, LOG_INDEX_FILE, worker_log_file
from trainer.logs import MAX_LINE_BYTES, LogIndex, indexed_logs


def index_of(folder):
    return (folder / LOG_INDEX_FILE).read_text().splitlines()


def append(folder, name, text):
    with (folder / name).open("a") as file:
        file.write(text)


def test_complete_lines_are_indexed_in_the_order_of_updates(tmp_path):
    index = LogIndex(tmp_path)
    append(tmp_path, worker_log_file(0), "a\nhalf")
    append(tmp_path, LOG_FILE, "driver\n")
    index.update()
    append(tmp_path, worker_log_file(0), " a line\n")
    index.update()
    index.update()
    assert index_of(tmp_path) == [f"{LOG_FILE} 7", f"{worker_log_file(0)} 2", f"{worker_log_file(0)} 14"]


def test_a_long_unterminated_line_is_indexed(tmp_path):
    index = LogIndex(tmp_path)
    append(tmp_path, LOG_FILE, "x" * MAX_LINE_BYTES)
    index.update()
    assert index_of(tmp_path) == []
    append(tmp_path, LOG_FILE, "x")
    index.update()
    assert index_of(tmp_path) == [f"{LOG_FILE} {MAX_LINE_BYTES + 1}"]


def test_the_last_lines_are_indexed_at_the_end(tmp_path):
    with indexed_logs(tmp_path):
        append(tmp_path, LOG_FILE, "last\n")
    assert index_of(tmp_path) == [f"{LOG_FILE} 5"]


def test_output_of_child_processes_is_redirected(tmp_path):
    program = (
        "import subprocess, sys; from pathlib import Path; from trainer.logs import redirect_output; "
        "redirect_output(Path(sys.argv[1])); print('own', flush=True); subprocess.run(['echo', 'child'])"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "log"], check=True, timeout=60)
    assert (tmp_path / "log").read_text() == "own\nchild\n"
