"""The data flow of the suite, one module per arrow.

image, caption ─ dataset ─▶ Sample ─ caching ─▶ Batch(moments, text, time_ids) ─ noise ─▶ x_t, target
     (loading: VAE and text encoders are on the GPU only while they encode)                 │
                                                                                            ▼
images ◀─ sampling ◀─ adapter file ◀─ checkpoint ◀─ loops ◀─ engine: unet ─▶ loss ─▶ flat gradient ─▶ optimizer ─▶ EMA
                                                               (adapters: LoRA layers, the flat parameter buffer)
"""

import os
import sys


def _interrupted_or(hook):
    """`hook` for every error that nothing has caught, but for Ctrl-C before `running.run` is there to answer it: one line."""

    def excepthook(kind, error, traceback):
        if issubclass(kind, KeyboardInterrupt):
            sys.stderr.write(
                f"{os.path.basename(sys.argv[0])}: interrupted\n"
            )  # Python then ends by SIGINT: 130 in a shell
        else:
            hook(kind, error, traceback)

    return excepthook


sys.excepthook = _interrupted_or(sys.excepthook)

# PEFT refuses to make any adapter beside a torchao older than 0.16, which Kaggle and Colab ship with. Nothing here uses it.
sys.modules["torchao"] = None
