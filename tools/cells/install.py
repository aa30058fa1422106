# @title Install what is missing: the packages that are here stay, and torch is never touched
# Without internet: wheels in a data set that is attached to the notebook.
found = os.popen("find /kaggle/input -maxdepth 5 -name 'argparse_dataclass-*.whl' 2>/dev/null").read().splitlines()
SOURCE = ["--no-index", "--no-deps", "--find-links", os.path.dirname(found[0])] if found else []
INSTALL = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
run(*PYTHON, *INSTALL, *SOURCE, *REQUIREMENTS)
