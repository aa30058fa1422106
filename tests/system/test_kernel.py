"""The notebooks' way of running a command, in a real Jupyter kernel: what it shows, an interrupt, a failure, a kernel that dies."""

import os

import psutil
import pytest

from tools.notebooks import CELLS

jupyter_client = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")
FOREVER = 'run(sys.executable, "train_opt.py", "--demo", "--max_train_steps", "100000", "--output_dir", "run")'
PATIENCE_S = 120


class Kernel:
    """A kernel with the cell that defines `run`, in a folder of its own."""

    def __init__(self, folder, root):
        (folder / "train_opt.py").symlink_to(root / "train_opt.py")
        self.manager = jupyter_client.KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder), env={**os.environ, "PYTHONPATH": str(root)})
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=PATIENCE_S)
        self.run((CELLS / "run.py").read_text())

    def start(self, source):
        self.sent = self.client.execute(source)

    def reply(self):
        """(what the cell has printed since, its reply)."""
        printed = self.printed_until(lambda text: False)
        while (message := self.client.get_shell_msg(timeout=PATIENCE_S))["parent_header"]["msg_id"] != self.sent:
            pass
        return printed, message["content"]

    def printed_until(self, enough):
        """What the cell prints until `enough` of it, or until the cell is done."""
        text = ""
        while not enough(text):
            message = self.client.get_iopub_msg(timeout=PATIENCE_S)
            if message["parent_header"].get("msg_id") == self.sent:
                text += message["content"]["text"] if message["msg_type"] == "stream" else ""
                if message["content"].get("execution_state") == "idle":
                    break
        return text

    def run(self, source):
        self.start(source)
        return self.reply()

    def children(self):
        return psutil.Process(self.manager.provisioner.process.pid).children(recursive=True)


@pytest.fixture
def kernel(tmp_path, root):
    kernel = Kernel(tmp_path, root)
    yield kernel
    if kernel.manager.is_alive():
        kernel.manager.shutdown_kernel(now=True)
    kernel.client.stop_channels()


def test_an_interrupt_ends_the_run_with_a_checkpoint_and_leaves_no_process(kernel, tmp_path):
    kernel.start(FOREVER)
    shown = kernel.printed_until(lambda text: "loss" in text)  # of the bar: it is shown while the command runs
    assert "training: 100000 steps" in shown
    (script,) = kernel.children()
    kernel.manager.interrupt_kernel()
    printed, reply = kernel.reply()
    assert reply["status"] == "ok" and "SIGINT received after step" in printed
    assert list((tmp_path / "run").glob("checkpoint-*/state.json"))
    assert not script.is_running() and kernel.children() == []
    assert kernel.run("print('and on')")[0] == "and on\n"


def test_a_command_that_fails_fails_the_notebook(kernel):
    printed, reply = kernel.run('run(sys.executable, "train_opt.py", "--demo", "--lr", "1")')
    assert reply["status"] == "error" and reply["ename"] == "CalledProcessError"
    assert "train_opt.py --demo --lr 1' returned non-zero exit status 2" in reply["evalue"]
    assert "train_opt.py: error: unrecognized arguments: --lr 1" in printed and "Traceback" not in printed


def test_characters_and_carriage_returns_arrive_as_they_were_written(kernel):
    """A bar is drawn over itself, and a character may come in two pieces."""
    pieces = "import os, time; os.write(1, b'a\\rb \\xe2\\x96'); time.sleep(0.3); os.write(1, b'\\x88\\n')"
    printed, reply = kernel.run(f'run(sys.executable, "-c", {pieces!r})')
    assert reply["status"] == "ok" and printed == "a\rb █\n"


def test_a_kernel_that_dies_leaves_no_process_behind(kernel, tmp_path):
    kernel.start(FOREVER)
    kernel.printed_until(lambda text: "loss" in text)
    (script,) = kernel.children()
    kernel.manager.shutdown_kernel(now=True)
    script.wait(PATIENCE_S)
    assert not script.is_running()
