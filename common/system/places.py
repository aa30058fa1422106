"""Where the suite keeps things on this machine. Nothing but Python is needed to ask."""

import os

CACHE_DIR = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "sdxl-style")
