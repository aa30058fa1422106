"""One-file scripts and notebooks for Kaggle and Colab: dist/SCRIPT.py and dist/SCRIPT.ipynb.

    python tools/bundle.py              # write dist/
    python tools/bundle.py --check      # exit 1 when dist/ is not what the sources make
    python tools/bundle.py --execute    # run every notebook in its --demo form, in an empty folder

--execute takes minutes and needs nbclient and ipykernel. How a bundle is made: tools/one_file.py; what is in a
notebook: tools/notebooks.py.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.notebooks import SUBJECTS, execute, notebook  # noqa: E402
from tools.one_file import bundle  # noqa: E402

DIST = ROOT / "dist"
SCRIPTS = (*SUBJECTS, "verify_setup")


def results() -> dict[str, str]:
    """{file name in dist/: text}."""
    scripts = {f"{script}.py": bundle(script) for script in SCRIPTS}
    return scripts | {f"{script}.ipynb": notebook(script) for script in SUBJECTS}


def stale() -> list[str]:
    """Names in dist/ that are not what the sources make."""
    return [name for name, text in results().items() if not (DIST / name).exists() or (DIST / name).read_text() != text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when dist/ is stale")
    executed = "run these notebooks (default: all) with this Python"
    parser.add_argument("--execute", nargs="*", metavar="SCRIPT", help=executed)
    kept = "with --execute: write the notebooks with their outputs here"
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help=kept)
    options = parser.parse_args()

    # Asked for something else than writing
    if options.check:
        names = stale()
        sys.exit(f"stale: {', '.join(names)}; run python tools/bundle.py" if names else 0)
    if options.execute is not None:
        return run_notebooks(options.execute or list(SUBJECTS), options.keep)

    # Every file, made anew
    files = results()
    DIST.mkdir(exist_ok=True)
    for name, text in files.items():
        (DIST / name).write_text(text)
    print(f"{len(files)} files in {DIST}")


def run_notebooks(scripts: list[str], keep: Path | None) -> None:
    """Each to its end; one that fails or shows no picture ends the process."""
    for script in scripts:
        started_s = time.monotonic()
        pictures = execute(script, keep)
        seconds = time.monotonic() - started_s
        print(f"{script}.ipynb: ran to its end in {seconds:.0f} s, shows {len(pictures)} pictures", flush=True)
        if not pictures:
            sys.exit(f"{script}.ipynb shows no picture")


if __name__ == "__main__":
    main()
