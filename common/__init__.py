"""The data flow of the suite, and the wings in which it lies. Imports go down only, as a test reads them.

image, caption ─ data/dataset ─▶ Sample ─ data/caching ─▶ moments, text ─ data/batching ─▶ Batch ─ model/noise ─▶ x_t
     (model/loading: VAE and text encoders are on the GPU only while they encode)                                    │
                                                                                                                     ▼
images ◀─ render/sampling ◀─ adapter file ◀─ train/results ◀─ train/loops ◀─ train/engine: unet ─▶ loss ─▶ flat gradient
     (model/adapters: LoRA layers, the flat parameter buffer, optimizer, EMA)

train          assembly, the step, the loop, checkpoints, results
render         adapters -> pictures and grids
data           pictures and captions -> Batch             adapter_files  one file per format, writer facing reader
fast           the same numbers, sooner; skip it first    model          SDXL and its adapter on the device
cli            flags, checks, errors; without torch       system         the machine, launchers, signals; without torch
"""

import os
import sys


def _interrupted_or(hook):
    """`hook` for every error that nothing has caught, but for Ctrl-C before `run` can answer it: one line."""

    def excepthook(kind, error, traceback):
        if issubclass(kind, KeyboardInterrupt):
            sys.stderr.write(
                f"{os.path.basename(sys.argv[0])}: interrupted\n"
            )  # Python then ends by SIGINT: 130 in a shell
        else:
            hook(kind, error, traceback)

    return excepthook


sys.excepthook = _interrupted_or(sys.excepthook)

# PEFT refuses to make any adapter beside a torchao older than 0.16, which Kaggle and Colab have. Nothing here uses it.
sys.modules["torchao"] = None
