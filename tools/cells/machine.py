# @title What is here
import os
import sys

# One GPU: plain python. Two, as on Kaggle's T4 x2: a process for each, with the same images a step.
PYTHON = [sys.executable]
GPUS = len(os.popen("nvidia-smi --list-gpus 2>/dev/null").read().splitlines())
LAUNCH = PYTHON if GPUS < 2 else [*PYTHON, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", str(GPUS)]

# Colab forgets everything but your Drive; Kaggle keeps its working folder.
OUTPUT = "outputs"
if USE_DRIVE and "COLAB_RELEASE_TAG" in os.environ:
    from google.colab import drive

    drive.mount("/content/drive")
    OUTPUT = "/content/drive/MyDrive/sdxl_style"

# SUITE_DEMO=1 in the environment: everything runs with a tiny random model, for which a CPU is enough.
# That is only to try the notebook.
DEMO = os.environ.get("SUITE_DEMO") == "1"
